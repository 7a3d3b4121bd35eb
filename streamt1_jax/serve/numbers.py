"""The numbers that a live service is judged by, and how Prometheus reads them."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterator

import numpy as np

_KEPT = 2048
"""Newest values that quantiles are of."""
_QUANTILES = (0.5, 0.95, 0.99)

_SERIES = {
  "first_chunk_seconds": "From the start of a session whose search was compiled to its first chunk, in seconds.",
  "cold_first_chunk_seconds": "The same of sessions whose search had to be compiled.",
  "chunk_seconds": "To make, encode and keep a chunk, in seconds.",
  "chunk_gap_seconds": "Between two chunks that were sent, in seconds.",
  "switch_seconds": "From the arrival of a prompt to the first chunk made under it, in seconds.",
}
_COUNTERS = {
  "sessions_total": "Sessions that began.",
  "chunks_total": "Chunks that were sent.",
  "chunks_on_time_total": "Those of them that came before the video had to stand still.",
  "media_seconds_total": "Seconds of video in them.",
  "making_seconds_total": "Seconds it took to make, encode and keep them.",
  "switches_total": "Prompts that took effect.",
  "refused_total": "Messages that were refused.",
  "previews_dropped_total": "Previews that slow viewers did not get.",
  "fragments_skipped_total": "Chunks that slow viewers did not get.",
  "failures_total": "Sessions that ended with an error.",
}
_GAUGES = {
  "viewers": "Open connections.",
  "waiting": "Clients that wait for a session.",
  "running": "1 while there is a session.",
}


@dataclasses.dataclass(frozen=True)
class Quantiles:
  """What is known of a series: how many values there were, their sum, and quantiles of the newest."""

  count: int
  total: float
  values: dict[float, float]


class Numbers:
  """Counts. May be used from any thread."""

  def __init__(self):
    self._lock = threading.Lock()
    self._counts: dict[str, float] = dict.fromkeys((*_COUNTERS, *_GAUGES), 0.0)
    self._series = {name: collections.deque[float](maxlen=_KEPT) for name in _SERIES}
    self._sums = {name: (0, 0.0) for name in _SERIES}

  def count(self, name: str, by: float = 1.0) -> None:
    """A counter goes up."""
    with self._lock:
      self._counts[name] += by

  def set(self, name: str, value: float) -> None:
    """A gauge has another value."""
    with self._lock:
      self._counts[name] = value

  def observe(self, name: str, value: float) -> None:
    """A series has another value."""
    with self._lock:
      self._series[name].append(value)
      count, total = self._sums[name]
      self._sums[name] = count + 1, total + value

  def __getitem__(self, name: str) -> float:
    with self._lock:
      return self._counts[name]

  def quantiles(self, name: str) -> Quantiles:
    """The quantiles of a series; no values if it is empty."""
    with self._lock:
      kept, (count, total) = list(self._series[name]), self._sums[name]
    values = {} if not kept else dict(zip(_QUANTILES, map(float, np.quantile(kept, _QUANTILES)), strict=True))
    return Quantiles(count, total, values)

  @property
  def real_time_factor(self) -> float | None:
    """Seconds it takes to make a second of video; below 1 is faster than real time. None before the first chunk."""
    media = self["media_seconds_total"]
    return self["making_seconds_total"] / media if media else None

  def prometheus(self) -> str:
    """All numbers in Prometheus' text format."""
    return "\n".join([*self._lines(), ""])

  def _lines(self) -> Iterator[str]:
    for kind, names in (("counter", _COUNTERS), ("gauge", _GAUGES)):
      for name, meaning in names.items():
        yield from _head(name, kind, meaning)
        yield f"streamt1_{name} {self[name]:.15g}"
    if self.real_time_factor is not None:
      yield from _head("real_time_factor", "gauge", "Seconds it takes to make a second of video.")
      yield f"streamt1_real_time_factor {self.real_time_factor:g}"
    for name, meaning in _SERIES.items():
      found = self.quantiles(name)
      yield from _head(name, "summary", meaning)
      for quantile, value in found.values.items():
        yield f'streamt1_{name}{{quantile="{quantile:g}"}} {value:g}'
      yield f"streamt1_{name}_sum {found.total:.15g}"
      yield f"streamt1_{name}_count {found.count}"


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
  yield f"# HELP streamt1_{name} {meaning}"
  yield f"# TYPE streamt1_{name} {kind}"
