"""Does a video show every caption of its timeline, and after how many chunks?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.data import verify
from streamt1_jax.data.world import Description

LATEST = 2
"""Chunks after its beginning within which a caption must begin to hold."""


class Segment(NamedTuple):
  """What a video shows of one caption.

  Attributes:
    verdicts: of `verify.verify`, from the chunk with which the caption holds, or from its beginning if it never does.
    chunks_until: chunks after its beginning from which it holds up to its end; None if it does not within `LATEST`. The
      video's first caption must hold from the beginning.
  """

  verdicts: dict[str, bool]
  chunks_until: int | None


def verify_timeline(
  frames: UInt8[np.ndarray, "T 64 64 3"],
  descriptions: Sequence[Description],
  begins: Sequence[int],
  first: int,
  later: int,
) -> list[Segment]:
  """What a video shows of every caption.

  Args:
    frames: `[T, 64, 64, 3]` uint8 RGB.
    descriptions: of the captions.
    begins: the chunk with which each begins; the first is 0.
    first: frames of the first chunk.
    later: frames of every later chunk.
  """
  frame_of = lambda chunk: 0 if chunk == 0 else first + (chunk - 1) * later
  ends = [*map(frame_of, begins[1:]), len(frames)]
  return [
    _segment(frames, description, [frame_of(begin + late) for late in range(LATEST + 1 if begin else 1)], end)
    for description, begin, end in zip(descriptions, begins, ends, strict=True)
  ]


def _segment(frames: np.ndarray, description: Description, begins: list[int], end: int) -> Segment:
  found = []
  for late, begin in enumerate(begins):
    if end - begin < 2:
      break
    found.append(verify.verify(frames[begin:end], description))
    if found[-1]["all_at_once"]:
      return Segment(found[-1], late)
  return Segment(found[0], None)


def all_hold(segments: Sequence[Segment]) -> bool:
  """Whether a video shows all captions of its timeline: the first one from the beginning, the others soon enough."""
  return all(segment.chunks_until is not None for segment in segments)
