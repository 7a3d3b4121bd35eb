"""How a command runs: it parses its own flags, does its work, and ends with an exit code.

  def define_flags(values): ...                      every flag of the command, on its own FlagValues
  def run(values): ...                               the work; a failure is an exception
  def main(argv=None): return command.main(__doc__, define_flags, run, argv)

One process may run many commands one after the other: no flag is kept, and signal handlers come back.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging

from streamt1_jax.cli import flagfiles
from streamt1_jax.cli.files import FULL_DISK
from streamt1_jax.config import ConfigError
from streamt1_jax.drivers import SearchError
from streamt1_jax.io import signals
from streamt1_jax.io.signals import Terminated, is_terminated, raise_if_interrupted, termination_deferred
from streamt1_jax.messages import one_line
from streamt1_jax.parallel import hosts
from streamt1_jax.saved_search import SaveError

__all__ = [
  "BAD_INPUT",
  "INTERRUPTED",
  "RUN_FAILED",
  "TERMINATED",
  "RunFailed",
  "Terminated",
  "flag_settings",
  "is_terminated",
  "main",
  "parse",
  "raise_if_interrupted",
  "termination_deferred",
]

BAD_INPUT, RUN_FAILED, INTERRUPTED, TERMINATED = 2, 3, 130, 143
"""Exit codes."""

_HELP = ("help", "helpfull", "helpshort")
_NO_SETTINGS = (*_HELP, "flagfile")


class RunFailed(Exception):
  """A command did its work, and some of it failed; what succeeded is kept."""


def main(
  doc: str | None,
  define_flags: Callable[[flags.FlagValues], None],
  run: Callable[[flags.FlagValues], None],
  argv: Sequence[str] | None = None,
  positional: str | None = None,
) -> int:
  """Runs a command.

  Args:
    doc: what --help shows above the flags.
    define_flags: defines the command's flags.
    run: does the work; its exceptions become a line on stderr and an exit code.
    argv: the arguments without the program's name; those of the process by default.
    positional: the flag, of a list, that arguments which are no flags are added to; None refuses them.

  Returns:
    0, or one of the exit codes above.
  """
  if argv is None:
    # The process runs nothing else: what the imports left need not be looked at in every later collection of garbage.
    gc.freeze()
  values = _define(define_flags)
  with signals.handled(), _warnings_as_lines():
    try:
      _parse(values, sys.argv[1:] if argv is None else argv, positional)
    except _HelpAsked:
      # In the order of their definition: the command's own flags come first.
      groups = [values.module_help(module).strip("\n") for module in values.flags_by_module_dict()]
      print("\n\n".join([(doc or "").strip(), "Flags:", *groups]))
      return 0
    except ConfigError as error:
      return _report(str(error), BAD_INPUT)
    return hosts.run_together(lambda: _exit_code(run, values))


def parse(define_flags: Callable[[flags.FlagValues], None], argv: Sequence[str]) -> flags.FlagValues:
  """The flags of a command as `argv` gives them, for tests of what reads flags; `main` parses those of a process.

  Raises ConfigError for an argument that is no flag of the command.
  """
  values = _define(define_flags)
  _parse(values, argv)
  return values


def flag_settings(values: flags.FlagValues) -> dict[str, Any]:
  """The value of every flag of a command, by name."""
  return {name: values[name].value for name in sorted(values) if name not in _NO_SETTINGS}


def _define(define_flags: Callable[[flags.FlagValues], None]) -> flags.FlagValues:
  values = flags.FlagValues()
  define_flags(values)
  for name in _HELP:
    flags.DEFINE_flag(_HelpFlag(name), values, module_name=__name__)
  flags.DEFINE_string("flagfile", None, "File of flags, one a line.", flag_values=values)
  return values


class _HelpAsked(Exception):
  """The user asks what the command does."""


class _HelpFlag(flags.BooleanFlag):
  """Stops the parsing, so that --help needs no other flag."""

  def __init__(self, name: str):
    super().__init__(name, False, "Show this text.")

  def parse(self, argument: str) -> None:
    super().parse(argument)
    if self.value:
      raise _HelpAsked


def _parse(values: flags.FlagValues, argv: Sequence[str], positional: str | None = None) -> None:
  """Raises ConfigError for an argument that is no flag of the command, and for a value that its flag refuses."""
  try:
    others = values(["", *flagfiles.expand(argv)])[1:]
  except (flags.Error, ValueError) as error:  # ValueError: --noNAME=value.
    raise ConfigError(str(error)) from error
  if others and positional is None:
    raise ConfigError(f"unexpected argument {others[0]!r}; every argument is a flag: --name=value")
  if positional is not None:
    setattr(values, positional, [*getattr(values, positional), *others])


class _Line(logging.Formatter):
  def format(self, record: logging.LogRecord) -> str:
    return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
  """What this package and its libraries log goes to stderr, a line each."""
  # JAX reports every platform that is not there.
  logging.getLogger("jax").setLevel(logging.WARNING)
  root = logging.getLogger()
  # absl calls `logging.basicConfig` when it is imported, and some libraries put absl's own handler there: either would
  # say everything twice.
  own = absl_logging.get_absl_handler()
  replaced = [handler for handler in root.handlers if type(handler) is logging.StreamHandler or handler is own]
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(_Line())
  root.handlers = [handler, *(other for other in root.handlers if other not in replaced)]
  try:
    yield
  finally:
    root.handlers = [*replaced, *(other for other in root.handlers if other is not handler)]


def _exit_code(run: Callable[[flags.FlagValues], None], values: flags.FlagValues) -> int:
  try:
    run(values)
  except ConfigError as error:
    return _report(str(error), BAD_INPUT)
  except OSError as error:
    # The system refuses a path, and has many reasons to. An error without a path is a fault of this program.
    if error.filename is None:
      raise
    return _report(f"{error.filename}: {error.strerror}", RUN_FAILED if error.errno in FULL_DISK else BAD_INPUT)
  except (SearchError, SaveError, RunFailed) as error:
    return _report(str(error), RUN_FAILED)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _report(f"the device has not enough memory for this search: {str(error).splitlines()[0]}", RUN_FAILED)
  except Terminated as error:
    return _report(str(error), TERMINATED)
  except KeyboardInterrupt:
    return _report("interrupted", INTERRUPTED)
  return 0


def _report(message: str, code: int) -> int:
  print(f"error: {one_line(' '.join(message.split()))}", file=sys.stderr, flush=True)
  return code
