"""`streamt1 generate` in a process of its own, watched from outside: its memory, its CPU time, how far it is. Linux."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

_INTERVAL = 0.25
_HUNDRED = 100


class Sample(NamedTuple):
  """What the system says at one moment.

  Attributes:
    seconds: since the start.
    cpu_seconds: that all threads have taken.
    resident: bytes of memory.
    peak: the most that `resident` has been.
    chunks: that are made.
  """

  seconds: float
  cpu_seconds: float
  resident: int
  peak: int
  chunks: int


class Run:
  """One start of the program.

  Attributes:
    folder: where it runs.
    arguments: its flags.
    samples: in order.
  """

  def __init__(self, folder: pathlib.Path, arguments: Sequence[str], rows: str):
    """The program runs in `folder`, which may hold what an earlier start has left, and writes to `folder`/outputs.

    Args:
      folder: as it says.
      arguments: flags of `generate`.
      rows: name of the file that gets a line for every chunk.
    """
    self.folder, self.arguments, self.samples = folder, arguments, list[Sample]()
    folder.mkdir(parents=True, exist_ok=True)
    self._command = [sys.executable, "-m", "streamt1_jax", "generate", f"--output_dir={folder}/outputs", *arguments]
    self._rows, self._read, self._began = 0, 0, 0.0
    self._rows_name = rows

  def watch(self, kill_at: int | None = None) -> None:
    """Runs it to its end, or kills it after `kill_at` chunks. Raises CalledProcessError if it fails."""
    self._began = time.time()
    with open(self.folder / "stderr", "w") as errors:
      process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=errors)
      began = time.monotonic()
      while process.poll() is None:
        time.sleep(_INTERVAL)
        sample = self._sample(process.pid, began)
        if sample is not None:
          self.samples.append(sample)
        if kill_at is not None and self._rows >= kill_at:
          process.kill()
          process.wait()
          return
    if process.returncode:
      errors = (self.folder / "stderr").read_text()
      raise subprocess.CalledProcessError(process.returncode, self._command, stderr=errors)

  @functools.cached_property
  def manifest(self) -> dict[str, Any]:
    """The manifest of the result."""
    (path,) = self.folder.glob("outputs/*/manifest.json")
    return json.loads(path.read_text())

  def report(self) -> dict[str, Any]:
    """What was seen of a run that came to its end."""
    chunks, made = self.manifest["length"]["chunks"], [sample for sample in self.samples if sample.chunks]
    first, last = self.samples[-1].seconds, made[-1].chunks
    tenths = [next(s for s in made if s.chunks >= chunks * tenth / 10 or s is made[-1]) for tenth in range(1, 11)]
    return {
      "chunks": chunks,
      "frames": self.manifest["length"]["frames"],
      "wall_seconds": first,
      "peak_resident_bytes": max(sample.peak for sample in self.samples),
      "resident_bytes_by_tenths": [sample.resident for sample in tenths],
      # The first hundred compiles.
      "second_hundred": self._per_chunk(_HUNDRED, 2 * _HUNDRED),
      "last_hundred": self._per_chunk(last - _HUNDRED, last),
      "compilations": self.manifest["compilations"]["count"],
      "resumed_at_chunks": self.manifest["resumed_at_chunks"],
      "sha256": self.manifest["sha256"],
    }

  def _per_chunk(self, begin: int, end: int) -> dict[str, float] | None:
    """Seconds of a chunk between two chunks."""
    seen = [sample for sample in self.samples if begin <= sample.chunks <= end]
    if len(seen) < 2 or seen[-1].chunks == seen[0].chunks:
      return None
    first, last = seen[0], next(sample for sample in seen if sample.chunks == seen[-1].chunks)
    made = last.chunks - first.chunks
    return {
      "seconds": (last.seconds - first.seconds) / made,
      "cpu_seconds": (last.cpu_seconds - first.cpu_seconds) / made,
    }

  def _sample(self, process: int, began: float) -> Sample | None:
    """None if the process has just ended."""
    place = pathlib.Path(f"/proc/{process}")
    try:
      status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
      fields = (place / "stat").read_text().rpartition(")")[2].split()
      resident, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
      return None
    ticks = int(fields[11]) + int(fields[12])
    return Sample(time.monotonic() - began, ticks / os.sysconf("SC_CLK_TCK"), resident, peak, self._count_rows())

  def _count_rows(self) -> int:
    for path in self.folder.glob(f"outputs/.*.partial/{self._rows_name}"):
      # A start that was killed has left another.
      if path.stat().st_ctime < self._began:
        continue
      with path.open("rb") as file:
        file.seek(self._read)
        content = file.read()
      self._rows, self._read = self._rows + content.count(b"\n"), self._read + len(content)
    return self._rows
