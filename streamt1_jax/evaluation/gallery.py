"""Plain and searched videos of the same captions, side by side."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.data import verify, world

_GAP, _WITHIN = 4, 2  # pixels around pairs, and between the two of one
_GRAY = 128


def failures(frames: UInt8[np.ndarray, "T 64 64 3"], caption: str) -> list[str]:
  """The verdicts that a video [T, 64, 64, 3] uint8 fails, without the one that sums up."""
  verdicts = verify.verify(frames, world.parse(caption))
  return [name for name, holds in verdicts.items() if not holds and name != "all_at_once"]


def sheet(
  above: Sequence[UInt8[np.ndarray, "T H W 3"]], below: Sequence[UInt8[np.ndarray, "T H W 3"]], columns: int
) -> UInt8[np.ndarray, "T sheet_height sheet_width 3"]:
  """Videos in pairs, one above the other, in reading order.

  Args:
    above: videos [T, H, W, 3] uint8 of one length and size.
    below: those that belong to them.
    columns: pairs in a row.

  Returns:
    Frames [T, sheet_height, sheet_width, 3] uint8.
  """
  line = np.full_like(above[0][:, :_WITHIN], _GRAY)
  pairs = [np.concatenate([one, line, other], axis=1) for one, other in zip(above, below, strict=True)]
  blank = np.full_like(pairs[0], _GRAY)
  framed = [np.pad(pair, _around(_GAP), constant_values=_GRAY) for pair in pairs + [blank] * (-len(pairs) % columns)]
  rows = [np.concatenate(framed[begin : begin + columns], axis=2) for begin in range(0, len(framed), columns)]
  return np.concatenate(rows, axis=1)


def _around(gap: int) -> tuple[tuple[int, int], ...]:
  return ((0, 0), (gap, gap), (gap, gap), (0, 0))
