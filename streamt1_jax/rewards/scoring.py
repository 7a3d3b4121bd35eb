"""Whole videos scored by a reward, one at a time: any length, size and speed.

  number of frames, fps ── look_at ── indices ── decoded by the caller ── frames uint8 ── scores by column

The search scores candidates inside its own compiled step. Here everything that differs from file to file is an
argument: XLA compiles once per frame size, and on top of it once per number of frames that VideoAlign looks at, once
per length for coherence, and once per 64 tokens of prompt. The frame rate decides which frames are looked at, on the
host, and compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, ImageReward
from streamt1_jax.rewards.coherence import TemporalCoherence
from streamt1_jax.rewards.folder import load_reward
from streamt1_jax.rewards.prompts import RewardPrompt
from streamt1_jax.rewards.quality import ImageQuality
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.videoalign import DIMENSIONS, VideoAlign
from streamt1_jax.typing import Params

Scores = Mapping[str, float | list[float]]
_LEAST_SIDE = 16  # pixels that the built-in rewards need on a side
_ONLY_CANDIDATE = CandidateInfo(np.int32(0), np.int32(0))


class VideoScorer(Protocol):
  """A reward that scores whole videos.

  Attributes:
    columns: the names of its scores.
    reads_prompt: whether the scores depend on a prompt.
  """

  columns: tuple[str, ...]
  reads_prompt: bool

  def look_at(self, num_frames: int, fps: float) -> np.ndarray:
    """Indices, int [N], of the frames it needs. Raises ConfigError if it cannot score such a video."""

  def __call__(self, prompt: str, frames: np.ndarray) -> Scores:
    """A score, or one per frame, for each of `columns`, of those frames, uint8 RGB [N, H, W, 3].

    Raises ConfigError if it cannot score them, or a score is NaN or Inf.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class FrameScorer:
  """An `ImageReward` on each frame: their mean in the column `name`, and each in `name_frames`.

  Attributes:
    name: of the reward.
    reward: scores pictures.
    params: its weights.
    prompt: turns a caption into its `prompt_features`; None for a reward that reads none.
    most_frames: evenly spaced frames that are looked at, the first and the last among them; None for all.
    batch: frames on the device at a time. The last ones are filled up, so the length of a video compiles nothing.
  """

  name: str
  reward: ImageReward
  params: Params
  prompt: RewardPrompt | None
  most_frames: int | None = None
  batch: int = 8

  @property
  def columns(self) -> tuple[str, ...]:
    return self.name, f"{self.name}_frames"

  @property
  def reads_prompt(self) -> bool:
    return self.prompt is not None

  def look_at(self, num_frames: int, fps: float) -> np.ndarray:
    count = min(num_frames, self.most_frames or num_frames)
    return np.round(np.linspace(0, num_frames - 1, count)).astype(np.int32)

  def __call__(self, prompt: str, frames: np.ndarray) -> Scores:
    if not self.reads_prompt:
      _require_size(self.name, frames)
    features = self.prompt(prompt) if self.reads_prompt else {}
    scores = []
    for start in range(0, len(frames), self.batch):
      some = frames[start : start + self.batch]
      filled = np.pad(some, ((0, self.batch - len(some)), (0, 0), (0, 0), (0, 0)), mode="edge")
      scores += np.asarray(_frame_scores(self.reward, self.params, features, filled))[: len(some)].tolist()
    return _finite(self.name, {self.name: float(np.mean(scores)), f"{self.name}_frames": scores})


@dataclasses.dataclass(frozen=True, eq=False)
class VideoAlignScorer:
  """VideoAlign on the frames its sampler takes at the video's own speed; columns `name_VQ`, `_MQ`, `_TA`, `_Overall`.

  Attributes:
    name: of the reward.
    reward: its `fps` is not used.
    params: its weights.
    prompt: turns a caption into tokens.
  """

  name: str
  reward: VideoAlign
  params: Params
  prompt: RewardPrompt

  reads_prompt = True

  @property
  def columns(self) -> tuple[str, ...]:
    return tuple(f"{self.name}_{column}" for column in (*DIMENSIONS, "Overall"))

  def look_at(self, num_frames: int, fps: float) -> np.ndarray:
    return dataclasses.replace(self.reward, fps=fps).sample(num_frames)

  def __call__(self, prompt: str, frames: np.ndarray) -> Scores:
    scores = _videoalign_scores(self.reward, self.params, self.prompt(prompt), frames)
    return _finite(self.name, dict(zip(self.columns, np.asarray(scores).tolist(), strict=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class CoherenceScorer:
  """`TemporalCoherence` of all frames; the search's own score of a whole video weighs only how it ends."""

  reward: TemporalCoherence = TemporalCoherence()

  columns = ("coherence",)
  reads_prompt = False

  def look_at(self, num_frames: int, fps: float) -> np.ndarray:
    if num_frames < 2:
      raise ConfigError(f"coherence needs at least 2 frames, got {num_frames}")
    return np.arange(num_frames)

  def __call__(self, prompt: str, frames: np.ndarray) -> Scores:
    _require_size("coherence", frames)
    return _finite("coherence", {"coherence": float(_window_score(self.reward, frames))})


def make_scorer(
  name: str, folder: epath.PathLike, *, dtype: Any = jnp.bfloat16, most_frames: int | None = None, batch: int = 8
) -> VideoScorer:
  """A reward that scores whole videos.

  Args:
    name: of the reward: one of `selection.BUILT_IN`, or any name for the one in `folder`.
    folder: what `convert.reward_part.write` wrote; a built-in reward reads nothing.
    dtype: dtype of the backbone.
    most_frames: see `FrameScorer`.
    batch: see `FrameScorer`.

  Raises:
    ConfigError: a file of the reward is missing, damaged or does not fit the others.
  """
  if name == "coherence":
    return CoherenceScorer()
  if name == "quality":
    return FrameScorer(name, ImageQuality(), {}, None, most_frames, batch)
  loaded = load_reward(folder, fps=1.0, dtype=dtype)
  if isinstance(loaded.reward, VideoAlign):
    return VideoAlignScorer(name, loaded.reward, loaded.params, loaded.prompt)
  return FrameScorer(name, loaded.reward, loaded.params, loaded.prompt, most_frames, batch)


@functools.partial(jax.jit, static_argnames="reward")
def _frame_scores(reward: ImageReward, params: Params, features: Any, frames: jax.Array) -> jax.Array:
  """float32 [N] of frames [N, H, W, 3]."""
  condition = reward.init(params, features)
  return jax.vmap(lambda frame: reward(params, condition, frame[None], _ONLY_CANDIDATE))(frames)


@functools.partial(jax.jit, static_argnames="reward")
def _videoalign_scores(reward: VideoAlign, params: Params, tokens: PromptTokens, frames: jax.Array) -> jax.Array:
  """float32 [4]: VQ, MQ, TA, Overall of the sampled frames."""
  raw = reward.raw_scores(params, reward.init(params, tokens), frames)
  return jnp.append(reward.normalise(raw) if reward.normalised else raw, reward.overall(raw))


@functools.partial(jax.jit, static_argnames="reward")
def _window_score(reward: TemporalCoherence, frames: jax.Array) -> jax.Array:
  return reward({}, {}, FrameWindow(frames[:0], jnp.int32(0), frames), _ONLY_CANDIDATE)


def _require_size(name: str, frames: np.ndarray) -> None:
  height, width = frames.shape[1:3]
  if min(height, width) < _LEAST_SIDE:
    raise ConfigError(f"{name} needs frames of at least {_LEAST_SIDE}x{_LEAST_SIDE}, got {height}x{width}")


def _finite(name: str, scores: Scores) -> Scores:
  if not all(np.isfinite(score).all() for score in scores.values()):
    raise ConfigError(f"the score of {name} is NaN or Inf")
  return scores
