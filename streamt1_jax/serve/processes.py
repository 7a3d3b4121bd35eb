"""A live server of several processes: process 0 serves, and all of them make the same session.

  process 0     search thread ── Leader: open, idle, end ── Shared: switch, stop, next ──┐
  the others    follow() ── what process 0 says, in the same order ──────────────────────┴── devices of all

Before process 0 uses the devices it says what it is about to do, with the prompts that take effect there, so that all
apply the same events before the same chunk. While it has nothing to do it says so once a second: what connects the
processes does not wait for long.

Errors of a prompt or of a search come to all processes alike, and end a session. After any other error nobody knows
whether all are at the same chunk, and what they compute together would never end: the processes end instead.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from streamt1_jax.config import ConfigError, SessionConfig
from streamt1_jax.drivers import SearchError
from streamt1_jax.io import signals
from streamt1_jax.io.timeline import Timeline
from streamt1_jax.messages import one_line
from streamt1_jax.parallel import hosts
from streamt1_jax.receipts import Receipt
from streamt1_jax.serve.protocol import Start
from streamt1_jax.serve.studio import LiveSession, Studio
from streamt1_jax.session import Chunk
from streamt1_jax.state import ChunkTrace, Condition

Open = Callable[[Start, Callable[[ChunkTrace], None]], LiveSession]
_OF_ALL = (ConfigError, SearchError)
"""Errors that all processes have at the same place."""
_LOGGER = logging.getLogger(__name__)


class OutOfStep(RuntimeError):
  """Not all processes are known to be at the same chunk. The message is the line that a process ends with."""


def share(studio: Studio, terminated: Callable[[], object], failed: Callable[[OutOfStep], object]) -> Studio:
  """A studio of process 0 whose sessions all processes make; the others `follow`.

  Args:
    studio: of process 0 alone.
    terminated: called when SIGTERM has come to one of the others, in the search thread, and maybe more than once: the
      server is to save its session and to end.
    failed: called in the search thread, once, when the processes can do nothing together any more: the server is to
      end. Sessions that are opened after that fail.
  """
  leader = Leader(studio.open, terminated, failed)
  return dataclasses.replace(studio, open=leader.open, idle=leader.idle, end=leader.end)


class Leader:
  """What process 0 says to the others, from its search thread alone."""

  def __init__(self, open_session: Open, terminated: Callable[[], object], failed: Callable[[OutOfStep], object]):
    self._open, self._terminated, self._failed = open_session, terminated, failed
    self._lost: OutOfStep | None = None

  def open(self, start: Start, on_trace: Callable[[ChunkTrace], None]) -> LiveSession:
    """A session of all processes."""
    image = None if start.image is None else base64.b64encode(start.image).decode()
    self.say({"do": "open", "start": dataclasses.asdict(start) | {"image": image}})
    with self.together():
      return Shared(self._open(start, on_trace), self)

  def idle(self) -> None:
    """Nothing is to be done yet."""
    with contextlib.suppress(OutOfStep):
      self.say({"do": "nothing"})

  def end(self) -> None:
    """The others end too."""
    with contextlib.suppress(OutOfStep):
      self.say({"do": "end"})

  def say(self, command: Mapping[str, Any]) -> None:
    """Says what is done next, and hears whether a machine of another process is being taken away.

    Raises OutOfStep if nobody listens at this place.
    """
    if self._lost is not None:
      raise self._lost
    with self.together():
      _, *others = hosts.everyone(dict(command))
    if any(others):
      self._terminated()

  @contextlib.contextmanager
  def together(self) -> Iterator[None]:
    """The body does what all processes do at the same place. An error that the others may not have ends the server.

    Raises OutOfStep in its place.
    """
    try:
      yield
    except _OF_ALL:
      raise
    except Exception as error:
      self._lost = _out_of_step(error)
      self._failed(self._lost)
      raise self._lost from error


class Shared:
  """A session that all processes make. A prompt is read between two chunks, by all of them at the same time."""

  def __init__(self, session: LiveSession, leader: Leader):
    self._session, self._leader = session, leader
    self._lock, self._numbers = threading.Lock(), itertools.count()
    self._asked: list[Receipt] = []
    self._unanswered: list[tuple[Receipt, Receipt]] = []
    self._stopped = self._ended = False

  def switch(self, prompt: str) -> Receipt:
    """As `Session.switch`, but a prompt that cannot be read fails later."""
    with self._lock:
      receipt = Receipt(prompt, next(self._numbers))
      if self._ended:
        return receipt.decide("dropped", None, reason="the session has ended")
      self._asked.append(receipt)
    return receipt

  def stop(self) -> None:
    """As `Session.stop`."""
    self._stopped = True

  def __iter__(self) -> Iterator[Chunk]:
    return self

  def __next__(self) -> Chunk:
    with self._lock:
      asked, self._asked = self._asked, []
    command = {"do": "next", "prompts": [receipt.prompt for receipt in asked], "stop": self._stopped}
    self._leader.say(command)
    chunk = None
    try:
      with self._leader.together():
        self._unanswered += zip(asked, _tell(self._session, command), strict=True)
        chunk = next(self._session, None)
    finally:
      if chunk is None:
        self._end()
      self._answer()
    if chunk is None:
      raise StopIteration
    return chunk

  def _end(self) -> None:
    """No chunk comes any more: nothing else would answer what is asked from now on."""
    with self._lock:
      self._ended = True
      for receipt in self._asked:
        receipt.decide("dropped", None, reason="the session has ended")
      self._asked = []

  def _answer(self) -> None:
    # A chunk that was made before is shown without a look at what was asked since.
    decided = [pair for pair in self._unanswered if pair[1].status != "queued"]
    self._unanswered = [pair for pair in self._unanswered if pair not in decided]
    for receipt, answer in decided:
      receipt.decide(answer.status, answer.chunk, superseded_by=answer.superseded_by, reason=answer.reason)

  @property
  def config(self) -> SessionConfig:
    return self._session.config

  @property
  def num_given(self) -> int:
    return self._session.num_given

  @property
  def prompt(self) -> str:
    return self._session.prompt

  @property
  def segments(self) -> list[tuple[int, str]]:
    return self._session.segments

  @property
  def timeline(self) -> Timeline:
    return self._session.timeline

  @property
  def condition(self) -> Condition:
    return self._session.condition

  def prepare_save(self) -> Callable[[Any], None]:
    return self._session.prepare_save()


def follow(open_session: Open) -> None:
  """Does with the devices what process 0 does with them, until that ends. For all other processes.

  SIGTERM is passed on to process 0, which saves and ends all; a second one ends this process.

  Raises OutOfStep after an error that process 0 may not have.
  """
  session: LiveSession | None = None
  with signals.termination_deferred():
    while True:
      command = hosts.everyone(signals.is_terminated())[0]
      if command["do"] == "end":
        return
      try:
        if command["do"] == "open":
          session = None
          session = open_session(_start_of(command["start"]), lambda trace: None)
        elif command["do"] == "next" and session is not None:
          _tell(session, command)
          next(session, None)
      except _OF_ALL as error:
        # Process 0 has the same error, and tells the client.
        _LOGGER.info(one_line(str(error)))
      except Exception as error:
        raise _out_of_step(error) from error


def _out_of_step(error: Exception) -> OutOfStep:
  """What is raised for `error`, whose traceback is printed: it may be a fault of the program."""
  traceback.print_exception(error)
  reason = one_line(f"{type(error).__name__}: {error}", 300)
  return OutOfStep(f"process {jax.process_index()} cannot go on with the others: {reason}")


def _start_of(fields: Mapping[str, Any]) -> Start:
  image = fields["image"]
  return Start(**{**fields, "image": None if image is None else base64.b64decode(image)})


def _tell(session: LiveSession, command: Mapping[str, Any]) -> list[Receipt]:
  """Asks for the prompts of a command; returns the answers, which are decided before the next chunk."""
  answers = []
  for prompt in command["prompts"]:
    try:
      answers.append(session.switch(prompt))
    except ConfigError as error:
      answers.append(Receipt(prompt, -1).decide("failed", None, reason=str(error)))
  if command["stop"]:
    session.stop()
  return answers
