"""How much a video moves, and how well its frames follow from one another.

All but the amount of motion reward a frozen video, so none of them should be read without it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from streamt1_jax.evaluation.metrics.flow import Flow

_DYNAMIC_FPS = 8
_FASTEST_SHARE = 0.05
# VBench's constants: pixels between frames at 8 frames per second, for a shorter side of 256; and pairs of 16 frames.
_DYNAMIC_LENGTH, _DYNAMIC_SIDE = 6.0, 256
_DYNAMIC_PAIRS, _DYNAMIC_FRAMES = 4, 16
# Sundaram, Brox and Keutzer (2010): where flow there and back do not cancel, something was hidden.
_HIDDEN_SHARE, _HIDDEN_LENGTH = 0.01, 0.5


class Pace(NamedTuple):
  """How much one video moves.

  Attributes:
    dynamic: VBench's rule for "moves", by DIS in the place of RAFT.
    speeds: mean length of the fastest twentieth of all pixels' flow, in pixels per second, of every pair of frames that
      was looked at.
  """

  dynamic: bool
  speeds: Float[np.ndarray, " pairs"]

  @property
  def speed(self) -> float:
    """The mean of `speeds`."""
    return float(np.mean(self.speeds))


class Motion(NamedTuple):
  """How one video moves.

  Attributes:
    pace: how much.
    warping_error: mean squared difference, colours in 0..1, of frames and their successors moved back, where nothing
      was hidden.
    warping_share: share of pixels where nothing was hidden.
    interpolation_error: mean absolute difference, in 0..1, of every second frame and its neighbours moved half-way.
    flicker: VBench's temporal flickering, 1 for a frozen video; here a diagnostic.
  """

  pace: Pace
  warping_error: float
  warping_share: float
  interpolation_error: float
  flicker: float


def measure(frames: UInt8[np.ndarray, "T H W 3"], fps: float, *, torus: bool = False) -> Motion:
  """Motion of at least three frames.

  Args:
    frames: RGB.
    fps: frames per second.
    torus: whether objects leave on one side and come in at the other.
  """
  flow = Flow(torus)
  warping = [_warping_error(a, b, flow) for a, b in zip(frames, frames[1:], strict=False)]
  share = float(np.mean([seen for _, seen in warping]))
  errors = [error for error, seen in warping if seen]
  between = zip(frames[:-2:2], frames[1:-1:2], frames[2::2], strict=True)
  return Motion(
    pace=pace(frames, fps, torus=torus),
    warping_error=float(np.mean(errors)) if errors else float("nan"),
    warping_share=share,
    interpolation_error=float(np.mean([_interpolation_error(*three, flow) for three in between])),
    flicker=flicker(frames),
  )


def flicker(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
  """(255 - mean absolute difference of neighbouring frames) / 255, as VBench has it."""
  differences = [np.abs(a.astype(np.int16) - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
  return float((255 - np.mean(differences)) / 255)


def pace(frames: UInt8[np.ndarray, "T H W 3"], fps: float, *, torus: bool = False) -> Pace:
  """How much at least two frames move; arguments as of `measure`, which needs seven times as many flows at 16 fps."""
  flow = Flow(torus)
  wanted = max(1, round(fps / _DYNAMIC_FPS))
  step = min(wanted, len(frames) - 1)
  sampled = frames[::step]
  speeds = np.array([_fastest(flow(a, b)) for a, b in zip(sampled, sampled[1:], strict=False)])
  threshold = _DYNAMIC_LENGTH * min(frames.shape[1:3]) / _DYNAMIC_SIDE * (step / wanted)
  needed = max(1, round(_DYNAMIC_PAIRS * len(sampled) / _DYNAMIC_FRAMES))
  return Pace(bool((speeds > threshold).sum() >= needed), speeds * (fps / step))


def _fastest(flow: np.ndarray) -> float:
  lengths = np.sort(np.linalg.norm(flow, axis=-1).ravel())
  return float(lengths[-max(1, int(_FASTEST_SHARE * lengths.size)) :].mean())


def _warping_error(first: np.ndarray, second: np.ndarray, flow: Flow) -> tuple[float, float]:
  """Mean squared difference of `first` and `second` moved back, and the share of pixels that it is the mean of."""
  there, back = flow(first, second), flow(second, first)
  returned = flow.warp(back, there)
  squared = lambda vectors: (vectors**2).sum(axis=-1)
  seen = squared(there + returned) <= _HIDDEN_SHARE * (squared(there) + squared(returned)) + _HIDDEN_LENGTH
  difference = (first.astype(np.float32) - flow.warp(second, there)) / 255
  return (float((difference**2)[seen].mean()) if seen.any() else 0.0), float(seen.mean())


def _interpolation_error(before: np.ndarray, frame: np.ndarray, after: np.ndarray, flow: Flow) -> float:
  """Mean absolute difference of a frame and the mean of its neighbours, each moved half-way along the flow."""
  forward, backward = flow(before, after), flow(after, before)
  halfway = (flow.warp(before, backward / 2) + flow.warp(after, forward / 2)) / 2
  return float(np.abs(halfway - frame).mean() / 255)
