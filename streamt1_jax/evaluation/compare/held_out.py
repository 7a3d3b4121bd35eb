"""Who judges the videos of a comparison: the verifiers of the shapes world, or a reward that selects nothing."""

from __future__ import annotations

import base64
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.data import verify
from streamt1_jax.evaluation import room
from streamt1_jax.evaluation.compare.scenes import Scene
from streamt1_jax.evaluation.metrics import motion
from streamt1_jax.io.timeline import ChunkClock
from streamt1_jax.rewards.scorers import VideoScorer

WINDOW_SECONDS = 5.0
"""About the seconds of one point of a drift curve; a curve has at least two points."""
_SIGNATURE_FRAMES, _SIGNATURE_SIDE = 4, 8
SIGNATURE_BYTES = _SIGNATURE_FRAMES * _SIGNATURE_SIDE**2 * 3


class Found(NamedTuple):
  """What is said of one video.

  Attributes:
    held_out: numbers, or yes and no, by metric; None where there is nothing to say.
    windows: how well each part of the video shows its caption, in order of time; empty where nobody says.
  """

  held_out: dict[str, float | bool | None]
  windows: list[float]


class Judge(Protocol):
  """A held-out judge.

  Attributes:
    metrics: what it measures; the first is the primary metric, and more of it is better.
  """

  metrics: tuple[str, ...]

  def __call__(self, frames: UInt8[np.ndarray, "T H W 3"], scene: Scene, clock: ChunkClock) -> Found:
    """Judges frames [T, H, W, 3] uint8."""
    ...


class Verifiers:
  """The verifiers of the shapes world: all at once, one by one, and how near the nearest perfect video is."""

  metrics = (
    "all_at_once",
    *(name for name in verify.VERDICTS if name != "all_at_once"),
    "psnr",
    "color_distance",
    "outline_distance",
    "chunks_until",
  )

  def __call__(self, frames: UInt8[np.ndarray, "T 64 64 3"], scene: Scene, clock: ChunkClock) -> Found:
    prompt = room.Prompt(scene.descriptions, list(scene.begins))
    found = room.judge(frames, prompt, clock.first, clock.later)
    until = found["chunks_until"]
    held_out: dict[str, Any] = {name: name not in found["failed"] for name in verify.VERDICTS}
    held_out |= {"all_at_once": found["all_at_once"], "psnr": found["psnr"]}
    held_out |= {"color_distance": found["color"], "outline_distance": found["outline"]}
    # Where a caption is not shown at all there is no number of chunks: its verdicts say so.
    known = [chunks for chunks in until[1:] if chunks is not None]
    held_out["chunks_until"] = float(np.mean(known)) if known else None
    if len(until) > 1:
      windows = [float(chunks == 0 if number == 0 else chunks is not None) for number, chunks in enumerate(until)]
    else:
      (description,) = prompt.descriptions
      windows = [float(verify.verify(part, description)["all_at_once"]) for part in parts(frames, clock.fps)]
    return Found(_finite(held_out), windows)


class RewardJudge:
  """A reward that scores whole videos: the last of its scores that is one number is the primary metric."""

  def __init__(self, scorer: VideoScorer, frames: int, fps: float):
    """`frames` are those of every video. Raises ConfigError if it cannot score such videos."""
    self._scorer, self._looks_at, self._fps = scorer, scorer.look_at(frames, fps), fps
    singles = [column for column in scorer.columns if not column.endswith("_frames")]
    self.metrics = (singles[-1], *singles[:-1])

  def __call__(self, frames: UInt8[np.ndarray, "T H W 3"], scene: Scene, clock: ChunkClock) -> Found:
    scores = self._scorer(scene.text, frames[self._looks_at])
    return Found(_finite({name: scores[name] for name in self.metrics}), [])


def parts(frames: UInt8[np.ndarray, "T H W 3"], fps: float) -> list[UInt8[np.ndarray, "_ H W 3"]]:
  """The video in equal parts of about `WINDOW_SECONDS`, two at least."""
  return np.array_split(frames, max(2, round(len(frames) / fps / WINDOW_SECONDS)))


def measures_motion() -> bool:
  """Whether optical flow is there: the extra eval."""
  try:
    motion.Flow()
  except ConfigError:
    return False
  return True


def motion_of(frames: UInt8[np.ndarray, "T H W 3"], fps: float, torus: bool) -> dict[str, float]:
  """How much a video moves, by optical flow: `dynamic`, 0 or 1 by VBench's rule, and `speed` in pixels a second."""
  found = motion.pace(frames, fps, torus=torus)
  return {"dynamic": float(found.dynamic), "speed": found.speed}


def signature(frames: UInt8[np.ndarray, "T H W 3"]) -> str:
  """A few frames made small, by which two videos are compared: base64 of bytes [4, 8, 8, 3]."""
  chosen = frames[np.linspace(0, len(frames) - 1, _SIGNATURE_FRAMES).astype(int)].astype(np.float32)
  for axis in (1, 2):
    pieces = np.array_split(chosen, _SIGNATURE_SIDE, axis=axis)
    chosen = np.stack([piece.mean(axis=axis) for piece in pieces], axis=axis)
  return base64.b64encode(np.round(chosen).astype(np.uint8).tobytes()).decode()


def distance(one: str, other: str) -> float:
  """Root mean square difference of two signatures, 0 to 255."""
  values = [np.frombuffer(base64.b64decode(each), np.uint8).astype(np.float64) for each in (one, other)]
  return float(np.sqrt(np.mean(np.square(values[0] - values[1]))))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
  # JSON has no NaN.
  return {name: value if value is None or np.isfinite(value) else None for name, value in values.items()}
