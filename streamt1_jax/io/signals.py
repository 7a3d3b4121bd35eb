"""Ctrl-C and SIGTERM: a program ends at the next safe place, and no signal is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_interrupted, _terminated, _deferred = threading.Event(), threading.Event(), threading.Event()


class Terminated(KeyboardInterrupt):
  """SIGTERM has come, as a preempted machine gets it. The message says what is kept."""


@contextlib.contextmanager
def handled() -> Iterator[None]:
  """Inside the body SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated; the earlier handlers come back.

  Outside the main thread, where Python delivers no signal, the handlers stay as they are.
  """
  for event in (_interrupted, _terminated, _deferred):
    event.clear()
  before = {}
  if threading.current_thread() is threading.main_thread():
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _terminate)
    # Background jobs of a shell ignore Ctrl-C, and should.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
      before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
  try:
    yield
  finally:
    for number, handler in before.items():
      # None stands for a handler that was not installed from Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _interrupt(signal_number: int, frame: object) -> None:
  _interrupted.set()
  raise KeyboardInterrupt


def _terminate(signal_number: int, frame: object) -> None:
  again = _terminated.is_set()
  _terminated.set()
  if again or not _deferred.is_set():
    raise Terminated("terminated")


def raise_if_interrupted() -> None:
  """Loops call this: Python drops a KeyboardInterrupt that is raised inside a callback or a finaliser."""
  if _interrupted.is_set():
    raise KeyboardInterrupt
  if _terminated.is_set() and not _deferred.is_set():
    raise Terminated("terminated")


def is_terminated() -> bool:
  """Whether SIGTERM has come."""
  return _terminated.is_set()


@contextlib.contextmanager
def termination_deferred() -> Iterator[None]:
  """SIGTERM waits until the body ends, which looks at `is_terminated`. A second SIGTERM does not wait."""
  _deferred.set()
  try:
    yield
  finally:
    _deferred.clear()
