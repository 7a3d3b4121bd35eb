"""`experiments.generate` that writes down, as it goes, what it is doing: for `experiments.measure.kill_test`.

A mark is a line `SECONDS EVENT` of the clock that all processes share, written without a buffer: it outlives its
process. Events are `+PHASE` and `-PHASE`, with the phases of the manifest, `compile`, `save` from the copy of the state
until all files are written, and `copy`, that part of it which the search waits for. It touches nothing of what the
program computes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from streamt1_jax import saved_search
from streamt1_jax.io import manifest

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def run(folder: str, arguments: Sequence[str], marks: str, cache: str, quick_compilation: bool) -> None:
  """Runs the program in `folder`, with its output in `.stdout` and `.stderr` there; the target of a process.

  Args:
    folder: where it runs.
    arguments: its flags.
    marks: file of the marks.
    cache: folder of compiled programs.
    quick_compilation: whether XLA optimises little.
  """
  os.chdir(folder)
  for stream, name in ((1, ".stdout"), (2, ".stderr")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
  jax.config.update("jax_disable_most_optimizations", quick_compilation)
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  _install(os.open(marks, os.O_CREAT | os.O_WRONLY | os.O_APPEND))
  sys.argv = ["experiments/generate.py", *arguments]
  from streamt1_jax.cli import common

  common.run(importlib.import_module("experiments.generate").main)


def _install(file: int) -> None:
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

  def listen(event, duration, **unused):
    if event == _LOWERED:
      mark("+compile")
    elif event == manifest.COMPILE_EVENT:
      mark("-compile")

  manifest.PhaseTimer.phase = marked_phase
  saved_search.SavedSearch.save = marked_save
  saved_search.SavedSearch._seal = marked_seal
  jax.monitoring.register_event_duration_secs_listener(listen)


def read_marks(path: pathlib.Path) -> list[tuple[float, str]]:
  """Seconds and event of every mark; the last line may be cut short."""
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [(float(line.split()[0]), line.split()[1]) for line in lines]
