"""What scores whole videos: the Protocol, and what serves any image reward and any video reward."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float32, Int

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, ImageReward, PromptReader, VideoReward
from streamt1_jax.typing import FloatScalar, Frames, Params

VideoScores = Mapping[str, float | list[float]]
"""Scores of one video by column: one for the video, or one per frame."""
_ONLY_CANDIDATE = CandidateInfo(np.int32(0), np.int32(0))


class ScoringOptions(NamedTuple):
  """How image rewards go through a video.

  Attributes:
    most_frames: evenly spaced frames that are looked at, the first and the last among them; None for all.
    batch: frames on the device at a time.
  """

  most_frames: int | None = None
  batch: int = 8


EVERY_FRAME = ScoringOptions()


@runtime_checkable
class VideoScorer(Protocol):
  """A reward that scores whole videos."""

  @property
  def columns(self) -> tuple[str, ...]:
    """The names of its scores."""
    ...

  @property
  def reads_prompt(self) -> bool:
    """Whether the scores depend on a prompt."""
    ...

  def look_at(self, num_frames: int, fps: float) -> Int[np.ndarray, " N"]:
    """Indices of the frames it needs. Raises ConfigError if it cannot score such a video."""
    ...

  def __call__(self, prompt: str | None, frames: Frames) -> VideoScores:
    """A score, or one per frame, for each of `columns`, of those frames; the prompt may be None if it is not read.

    Raises ConfigError if it cannot score them, or a score is NaN or Inf.
    """
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class FrameScorer:
  """An `ImageReward` on each frame: their mean in the column `name`, and each in `name_frames`.

  Attributes:
    name: of the reward.
    reward: scores pictures.
    params: its weights.
    prompt: turns a caption into its `prompt_features`.
    reads_prompt: whether it does.
    options: which frames, and how many at a time. The last batch is filled up, so that the length of a video compiles
      nothing.
  """

  name: str
  reward: ImageReward
  params: Params
  prompt: PromptReader
  reads_prompt: bool
  options: ScoringOptions = EVERY_FRAME

  @property
  def columns(self) -> tuple[str, ...]:
    return self.name, f"{self.name}_frames"

  def look_at(self, num_frames: int, fps: float) -> Int[np.ndarray, " N"]:
    count = min(num_frames, self.options.most_frames or num_frames)
    return np.round(np.linspace(0, num_frames - 1, count)).astype(np.int32)

  def __call__(self, prompt: str | None, frames: Frames) -> VideoScores:
    features, batch, scores = self.prompt(prompt or ""), self.options.batch, []
    for start in range(0, len(frames), batch):
      some = frames[start : start + batch]
      filled = np.pad(some, ((0, batch - len(some)), (0, 0), (0, 0), (0, 0)), mode="edge")
      scores += np.asarray(_frame_scores(self.params, self.reward, features, filled))[: len(some)].tolist()
    return require_finite(self.name, {self.name: float(np.mean(scores)), f"{self.name}_frames": scores})


@dataclasses.dataclass(frozen=True, eq=False)
class WindowScorer:
  """A `VideoReward` on all frames as one window, in the column `name`; compiled once per number of frames.

  Attributes:
    name: of the reward.
    reward: scores windows.
    params: its weights.
    prompt: turns a caption into its `prompt_features`.
    reads_prompt: whether it does.
  """

  name: str
  reward: VideoReward
  params: Params
  prompt: PromptReader
  reads_prompt: bool

  @property
  def columns(self) -> tuple[str, ...]:
    return (self.name,)

  def look_at(self, num_frames: int, fps: float) -> Int[np.ndarray, " N"]:
    return np.arange(num_frames)

  def __call__(self, prompt: str | None, frames: Frames) -> VideoScores:
    score = _window_score(self.params, self.reward, self.prompt(prompt or ""), frames)
    return require_finite(self.name, {self.name: float(score)})


@functools.partial(jax.jit, static_argnames="reward")
def _frame_scores(params: Params, reward: ImageReward, features: Any, frames: Frames) -> Float32[Array, " Q"]:
  condition = reward.init(params, features)
  return jax.vmap(lambda frame: reward(params, condition, frame[None], _ONLY_CANDIDATE))(frames)


@functools.partial(jax.jit, static_argnames="reward")
def _window_score(params: Params, reward: VideoReward, features: Any, frames: Frames) -> FloatScalar:
  return reward(params, reward.init(params, features), FrameWindow(frames[:0], 0, frames), _ONLY_CANDIDATE)


def require_finite(name: str, scores: VideoScores) -> VideoScores:
  """`scores`. Raises ConfigError if one of them is NaN or Inf."""
  if not all(np.isfinite(score).all() for score in scores.values()):
    raise ConfigError(f"the score of {name} is NaN or Inf")
  return scores
