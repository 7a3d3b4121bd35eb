"""How exactly a video repeats, where its world does: the one measure of drift in which no motion is mixed.

In the shapes world objects move by whole pixels on a torus, so that a perfect video is the same again every 64 frames.
Whatever frames so far apart differ by is drift: of places, which is the phase error, and of looks, which is the period
error, what is left once the later frame is moved back. A frozen video repeats as well, so no figure here means anything
without the speed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

_MOST_PAIRS = 64
_TIE = 1e-6  # Relative to the largest correlation: rounding decides nothing.


class Repeat(NamedTuple):
  """What frames that are some periods apart differ by.

  Attributes:
    periods: how many.
    period_error: mean absolute difference, colours in 0..1, of a frame and the later one moved back by the phase error.
    phase_error: mean length, in pixels, of the cyclic shift with which the later one fits best.
    pairs: of frames that were compared.
  """

  periods: int
  period_error: float
  phase_error: float
  pairs: int


def measure(frames: UInt8[np.ndarray, "T H W 3"], period: int) -> list[Repeat]:
  """For every number of periods that the video holds, at most 64 evenly spread pairs of frames; [] if it holds none.

  Args:
    frames: RGB; what leaves them on one side comes in at the other.
    period: frames after which a perfect video is the same again.
  """
  found = []
  for periods in range(1, (len(frames) - 1) // period + 1):
    lag = periods * period
    count = min(len(frames) - lag, _MOST_PAIRS)
    chosen = np.linspace(0, len(frames) - lag - 1, count).round().astype(int)
    errors, shifts = zip(*(_compared(frames[first], frames[first + lag]) for first in chosen), strict=True)
    found.append(Repeat(periods, float(np.mean(errors)), float(np.mean(shifts)), count))
  return found


def _compared(first: UInt8[np.ndarray, "H W 3"], second: UInt8[np.ndarray, "H W 3"]) -> tuple[float, float]:
  """Mean absolute difference once the second frame is moved to where it fits best, and how far that is."""
  a, b = (frame.astype(np.float64) / 255 for frame in (first, second))
  rows, columns = _shift(a, b)
  return float(np.abs(a - np.roll(b, (rows, columns), axis=(0, 1))).mean()), float(np.hypot(rows, columns))


def _shift(first: Float[np.ndarray, "H W 3"], second: Float[np.ndarray, "H W 3"]) -> tuple[int, int]:
  """Rows and columns by which the second frame moves to fit best: where their correlation is largest, by FFT."""
  spectra = np.fft.rfft2(first, axes=(0, 1)) * np.fft.rfft2(second, axes=(0, 1)).conj()
  correlation = np.fft.irfft2(spectra.sum(axis=-1), s=first.shape[:2])
  best = correlation.max()
  if correlation[0, 0] >= best - _TIE * abs(best):
    return 0, 0
  place = np.unravel_index(correlation.argmax(), correlation.shape)
  rows, columns = (int(at - size if at > size // 2 else at) for at, size in zip(place, correlation.shape, strict=True))
  return rows, columns
