"""What a search was doing when it died: marks that it writes as it goes.

A mark is a line `SECONDS EVENT` of the clock that all processes share, written without a buffer: it outlives its
process. Events are `+PHASE` and `-PHASE`, with the phases of the manifest, `compile`, `save` from the copy of the state
until all files are written, and `copy`, that part of it which the search waits for. Marks touch nothing of what the
program computes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import statistics
import time
from collections import defaultdict
from typing import Any, cast

import jax

from streamt1_jax import saved_search
from streamt1_jax.io import manifest

Marks = list[tuple[float, str]]
"""Seconds and event of each."""
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def install(path: pathlib.Path) -> None:
  """Makes the searches of this process, which is to run one program, write their marks to the end of a file."""
  file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
  mark = lambda event: os.write(file, f"{time.monotonic():.6f} {event}\n".encode())
  mark("+start")
  phase, begin, seal = (
    manifest.PhaseTimer.phase,
    saved_search.SavedSearch.save,
    saved_search.SavedSearch._seal,
  )

  @contextlib.contextmanager
  def marked_phase(self, name):
    # The phase of this name ends before the files are written.
    if name != "save":
      mark(f"+{name}")
    with phase(self, name):
      yield
    if name != "save":
      mark(f"-{name}")

  def marked_save(self, *inputs):
    mark("+save")
    mark("+copy")
    begin(self, *inputs)
    mark("-copy")

  def marked_seal(self):
    seal(self)
    mark("-save")

  def listen(event: str, duration_secs: float, **unused):
    if event == _LOWERED:
      mark("+compile")
    elif event == manifest.COMPILE_EVENT:
      mark("-compile")

  timer, saver = cast(Any, manifest.PhaseTimer), cast(Any, saved_search.SavedSearch)
  timer.phase, saver.save, saver._seal = marked_phase, marked_save, marked_seal
  jax.monitoring.register_event_duration_secs_listener(listen)


def read(path: pathlib.Path) -> Marks:
  """The marks in a file; its last line may be cut."""
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [(float(line.split()[0]), line.split()[1]) for line in lines]


def longest(marks: Marks) -> dict[str, float]:
  """The most seconds that each phase took."""
  running, found = {}, defaultdict(float)
  for seconds, event in marks:
    if event[0] == "+":
      running[event[1:]] = seconds
    elif event[1:] in running:
      found[event[1:]] = max(found[event[1:]], seconds - running.pop(event[1:]))
  return found


def median_chunk(marks: Marks) -> float:
  """Median seconds of a chunk after the first."""
  starts, lengths = 0.0, []
  for seconds, event in marks:
    if event == "+search":
      starts = seconds
    elif event == "-search":
      lengths.append(seconds - starts)
  return statistics.median(lengths)
