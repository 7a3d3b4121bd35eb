"""What orbax and TensorStore print by themselves, hidden where the program says it better."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator

from absl import logging

_LOOP_IS_CLOSED = "Event loop is closed"


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
  """Hides warnings: those of orbax concern its own formats; what a user can act on becomes a ConfigError."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.set_verbosity(verbosity)


@functools.cache
def hide_failed_writes() -> None:
  """Hides, from now on, what orbax prints from its own threads when writing fails: the caller gets the error as well.

  Orbax gives up at the first failure. Other writes that are under way end later, some at the very end of the program,
  with an error that Python hands to either of two hooks.
  """
  logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
  hook, unraisable_hook = sys.excepthook, sys.unraisablehook
  is_late = lambda error: str(error) == _LOOP_IS_CLOSED
  sys.excepthook = lambda kind, error, trace: is_late(error) or hook(kind, error, trace)
  sys.unraisablehook = lambda raised: is_late(raised.exc_value) or unraisable_hook(raised)
