"""What a kind of file is, and the law that all of them are held to.

KINDS = {**weights.KINDS, **own_files.KINDS}       a room adds a table
for kind, path in cases(rng, folder, KINDS): ...   one changed file after the other, of random kinds
  outcome = try_file(KINDS[kind], path)            outcome.line: "" if it loads, else the one line of its refusal
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from streamt1_jax.config import ConfigError
from streamt1_jax.messages import MESSAGE_LIMIT

SECONDS = 5.0
PEAK_BYTES = 2**30
# What Python reports when a program is started, a pickle finds a class, or a port is opened.
_FORBIDDEN = (
  "os.system",
  "os.exec",
  "os.posix_spawn",
  "os.fork",
  "os.spawn",
  "subprocess.Popen",
  "pickle.find_class",
  "socket.bind",
  "socket.connect",
  "socket.getaddrinfo",
)


class Kind(NamedTuple):
  """One kind of file.

  Attributes:
    make: writes a changed file into an empty folder and returns the path that a user would give.
    read: reads that path as the program does, everything that it would read of it.
    refusals: the errors that `read` may raise; each is one line for the user.
  """

  make: Callable[[np.random.Generator, pathlib.Path], pathlib.Path]
  read: Callable[[pathlib.Path], Any]
  refusals: tuple[type[Exception], ...] = (ConfigError,)


class Outcome(NamedTuple):
  """What became of a file.

  Attributes:
    line: "" if it loaded, else the one line of its refusal.
    seconds: how long it took, without the time in which other processes had the cores.
    grown: bytes that the process held while it read the file, beyond those that it held before.
  """

  line: str
  seconds: float
  grown: int


def cases(
  rng: np.random.Generator, folder: pathlib.Path, kinds: Mapping[str, Kind]
) -> Iterator[tuple[str, pathlib.Path]]:
  """Name of a kind and a changed file of it, without end. A file is deleted when the next one is asked for."""
  names = sorted(kinds)
  while True:
    name = names[rng.integers(len(names))]
    place = folder / "case"
    place.mkdir(parents=True)
    try:
      yield name, kinds[name].make(rng, place)
    finally:
      shutil.rmtree(place, ignore_errors=True)


def try_file(kind: Kind, path: pathlib.Path) -> Outcome:
  """Reads a file. Raises AssertionError if it breaks the law: one line, five seconds, a gigabyte, nothing started."""
  outcome = _try_once(kind, path)
  if outcome.seconds > SECONDS:
    # A library's threads may have waited for a core or the disk. What takes long by itself does so again.
    outcome = _try_once(kind, path)
  assert outcome.seconds <= SECONDS, f"{outcome.seconds:.1f} s for {path}: {outcome.line}"
  return outcome


def _try_once(kind: Kind, path: pathlib.Path) -> Outcome:
  line, before = "", _reset_peak()
  start = _own_seconds()
  with _watched() as forbidden:
    try:
      kind.read(path)
    except kind.refusals as error:
      line = getattr(error, "line", None) or str(error)
      assert line, "a refusal says why"
  outcome = Outcome(line, _own_seconds() - start, max(0, _peak_bytes() - before))
  assert line.isprintable(), repr(line)
  assert len(line) <= MESSAGE_LIMIT, line
  assert not forbidden, f"{forbidden} while {path} was read"
  assert outcome.grown <= PEAK_BYTES, f"{outcome.grown} bytes for {path}: {line}"
  return outcome


_PROCESS = pathlib.Path("/proc/self")


def _own_seconds() -> float:
  """A clock that stands still while this thread waits for a core. It goes on while it waits for anything else."""
  try:
    waited = int((_PROCESS / "schedstat").read_text().split()[1]) / 1e9
  except (OSError, IndexError):
    waited = 0.0
  return time.perf_counter() - waited


def _reset_peak() -> int:
  """Bytes that the process holds now. Linux then counts its peak anew; elsewhere a peak is the highest one so far."""
  with contextlib.suppress(OSError):
    (_PROCESS / "clear_refs").write_text("5")
  return _peak_bytes()


def _peak_bytes() -> int:
  try:
    found = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())
  except OSError:
    found = None
  if found:
    return int(found[1]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_watchers: list[list[str]] = []
_hooked = False


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
  """Events of the body that no file may cause."""
  global _hooked
  if not _hooked:  # A hook of the interpreter cannot be taken away.
    sys.addaudithook(_note)
    _hooked = True
  seen: list[str] = []
  _watchers.append(seen)
  try:
    yield seen
  finally:
    _watchers.remove(seen)


def _note(event: str, _: tuple) -> None:
  if _watchers and event in _FORBIDDEN:
    _watchers[-1].append(event)
