"""Which rewards judge a search: names and weights to one image reward and one video reward.

  "videoalign+hpsv3" ─┬─ image rewards ── weighted sum ── short-term score
                      └─ video rewards ── weighted sum ── long-term score

`quality` and `coherence` are built in and never read the prompt; `hpsv3` and `videoalign` are what a checkpoint has in
`rewards/`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, LoadedReward
from streamt1_jax.rewards.coherence import TemporalCoherence
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.rewards.quality import ImageQuality
from streamt1_jax.typing import Frames, Params

BUILT_IN = {"quality": ImageQuality, "coherence": TemporalCoherence}
IMAGE_REWARDS = ("quality", "hpsv3")
VIDEO_REWARDS = ("coherence", "videoalign")
LEARNED = ("videoalign", "hpsv3")
PROMPT_FREE = ("quality", "coherence")
_KINDS = {"image": IMAGE_REWARDS, "video": VIDEO_REWARDS}


class Term(NamedTuple):
  """One reward of a sum; its weights and its condition are under its name."""

  name: str
  reward: Any
  weight: float


@dataclasses.dataclass(frozen=True)
class _WeightedSum:
  """Rewards of one kind as one: sum of weight times score."""

  terms: tuple[Term, ...]

  def init(self, params: Params, prompt_features: Mapping[str, Any]) -> dict[str, Any]:
    return {term.name: term.reward.init(params[term.name], prompt_features[term.name]) for term in self.terms}

  def _sum(self, params: Params, condition: Mapping[str, Any], frames: Any, info: CandidateInfo) -> jax.Array:
    scores = [
      term.weight * term.reward(params[term.name], condition[term.name], frames, info).astype(jnp.float32)
      for term in self.terms
    ]
    return sum(scores[1:], scores[0])


@dataclasses.dataclass(frozen=True)
class WeightedImageReward(_WeightedSum):
  """`ImageReward` that sums others.

  Attributes:
    terms: the rewards.
    num_frames: how many frames of a chunk they see, evenly spread; all of them by default, or if it has fewer.
  """

  num_frames: int | None = None

  def __call__(self, params: Params, condition: Mapping[str, Any], chunk: Frames, info: CandidateInfo) -> jax.Array:
    if self.num_frames is not None:
      chunk = chunk[spread(chunk.shape[0], self.num_frames)]
    return self._sum(params, condition, chunk, info)


@dataclasses.dataclass(frozen=True)
class WeightedVideoReward(_WeightedSum):
  """`VideoReward` that sums others.

  Attributes:
    terms: the rewards.
  """

  def __call__(self, params: Params, condition: Mapping[str, Any], window: FrameWindow, info: CandidateInfo):
    return self._sum(params, condition, window, info)


def spread(length: int, count: int) -> np.ndarray:
  """The middles of `count` equal parts of `length` frames, int [min(count, length)]: 12 to 3 are 2, 6, 10."""
  count = min(count, length)
  return ((np.arange(count) + 0.5) * length / count).astype(int)


@dataclasses.dataclass(frozen=True)
class RewardChoice:
  """What was asked for, complete and possible as far as names tell.

  Attributes:
    image: names and weights of the image rewards.
    video: names and weights of the video rewards.
    short_frames: frames of a chunk that the image rewards see; None is all of them.
  """

  image: dict[str, float]
  video: dict[str, float]
  short_frames: int | None

  @property
  def stored(self) -> list[str]:
    """Those that are parts of the checkpoint."""
    return sorted(name for name in (*self.image, *self.video) if name not in BUILT_IN)


class Rewards(NamedTuple):
  """Rewards ready to judge a search.

  Attributes:
    choice: what they are.
    image: the image reward.
    video: the video reward.
  """

  choice: RewardChoice
  image: LoadedReward
  video: LoadedReward


def choose(
  directory: epath.PathLike,
  reward: str | None,
  weights: Mapping[str, float] | None = None,
  *,
  short_frames: int | None = None,
  chunk_frames: int,
) -> RewardChoice:
  """Reads a choice of rewards; nothing is loaded.

  Args:
    directory: the checkpoint.
    reward: names joined by "+"; by default what the checkpoint has in `rewards/`, if that is both, else the built-in
      ones.
    weights: factor of each score; 1 by default, but where several of one kind are added each must have its own.
    short_frames: frames of a chunk that the image rewards see; all by default.
    chunk_frames: frames of a chunk; the first one may have fewer.

  Raises:
    ConfigError: a reward is unknown, missing, named twice or one of a kind that has several without weights; a kind
      has none; a weight is no positive number or of none of the rewards; `short_frames` is more than there are.
  """
  parts = epath.Path(directory) / REWARDS_FOLDER
  present = [name for name in LEARNED if (parts / name).exists()]
  if reward is None:
    names = list(LEARNED if len(present) == len(LEARNED) else PROMPT_FREE)
  else:
    names = [name.strip() for name in reward.split("+")]
  known = (*IMAGE_REWARDS, *VIDEO_REWARDS)
  for name in names:
    if name not in known:
      raise ConfigError(f"reward: {name!r} is none of {', '.join(known)}; names are joined by '+'")
    if names.count(name) > 1:
      raise ConfigError(f"reward: {name} is named twice")
    if name not in (*BUILT_IN, *present):
      there = ", ".join((*BUILT_IN, *present))
      raise ConfigError(
        f"reward: there is no {parts / name}, which experiments.convert --{name} makes; there are {there}"
      )
  weights = dict(weights or {})
  _check_weights(weights, names)
  by_kind = {}
  for kind, of_kind in _KINDS.items():
    chosen = [name for name in names if name in of_kind]
    if not chosen:
      raise ConfigError(f"reward: {'+'.join(names)} has no {kind} reward; add one of {', '.join(of_kind)}")
    missing = [name for name in chosen if name not in weights]
    if len(chosen) > 1 and missing:
      example = ",".join(f"{name}:1" for name in chosen)
      raise ConfigError(
        f"reward: {' and '.join(chosen)} are all {kind} rewards; reward_weights must say how they add up, as {example}"
      )
    by_kind[kind] = {name: float(weights.get(name, 1.0)) for name in chosen}
  if short_frames is not None and not 1 <= short_frames <= chunk_frames:
    raise ConfigError(f"short_frames must be in 1..{chunk_frames}, the frames of a chunk, got {short_frames}")
  return RewardChoice(**by_kind, short_frames=short_frames)


def _check_weights(weights: Mapping[str, float], names: Iterable[str]) -> None:
  for name, weight in weights.items():
    if name not in names:
      raise ConfigError(f"reward_weights: {name!r} is none of the rewards {', '.join(names)}")
    if not (math.isfinite(weight) and weight > 0):
      raise ConfigError(f"reward_weights: the weight of {name} must be positive and finite, got {weight}")


def load(
  directory: epath.PathLike, choice: RewardChoice, *, fps: float, dtype: Any, mesh: Mesh | None = None
) -> Rewards:
  """Loads chosen rewards.

  Args:
    directory: the checkpoint.
    choice: from `choose`.
    fps: frames per second of the videos to be judged.
    dtype: dtype of their backbones.
    mesh: devices that share their weights; None for one.

  Raises:
    ConfigError: a reward's folder is damaged, of another size than it says, or of another reward.
  """
  load_one = lambda name: _load_one(epath.Path(directory) / REWARDS_FOLDER / name, name, fps, dtype, mesh)
  image = {name: load_one(name) for name in choice.image}
  video = {name: load_one(name) for name in choice.video}
  terms = lambda loaded, weights: tuple(Term(name, x.reward, weights[name]) for name, x in loaded.items())
  return Rewards(
    choice,
    _join(WeightedImageReward(terms(image, choice.image), choice.short_frames), image),
    _join(WeightedVideoReward(terms(video, choice.video)), video),
  )


def _load_one(path: epath.Path, name: str, fps: float, dtype: Any, mesh: Mesh | None) -> LoadedReward:
  if name in BUILT_IN:
    return LoadedReward(BUILT_IN[name](), {}, lambda caption: ())
  found = reward_folder.reward_name(reward_folder.load_config(path))
  if found != name:
    raise ConfigError(f"{path} holds {found}, not {name}")
  return reward_folder.load_reward(path, fps=fps, dtype=dtype, mesh=mesh, embed_on_host=True)


def _join(reward: Any, loaded: Mapping[str, LoadedReward]) -> LoadedReward:
  return LoadedReward(
    reward,
    {name: one.params for name, one in loaded.items()},
    lambda caption: {name: one.prompt(caption) for name, one in loaded.items()},
  )
