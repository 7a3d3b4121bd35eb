"""Which rewards judge a search: names and weights to one image reward and one video reward.

  "videoalign+hpsv3" ─┬─ image rewards ── weighted sum ── short-term score
                      └─ video rewards ── weighted sum ── long-term score

Which rewards there are is said by a table, `rewards.table.REWARDS` by default. Rewards with weights are what a
checkpoint has in `rewards/`; the others are always there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int

from streamt1_jax.config import ConfigError
from streamt1_jax.parallel import hosts
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, LoadedReward
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.rewards.spec import KINDS, RewardSpec, RewardTable
from streamt1_jax.rewards.table import DEFAULT_REWARDS, LEARNED_REWARDS, REWARDS
from streamt1_jax.typing import Decoded, FloatScalar, Params


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

  def _sum(self, params: Params, condition: Mapping[str, Any], frames: Any, info: CandidateInfo) -> FloatScalar:
    scores = [
      term.weight * term.reward(params[term.name], condition[term.name], frames, info).astype(jnp.float32)
      for term in self.terms
    ]
    return functools.reduce(operator.add, scores)


@dataclasses.dataclass(frozen=True)
class WeightedImageReward(_WeightedSum):
  """`ImageReward` that sums others.

  Attributes:
    terms: the rewards.
    num_frames: how many frames of a chunk they see, evenly spread; all of them by default, or if it has fewer.
  """

  num_frames: int | None = None

  def __call__(self, params: Params, condition: Mapping[str, Any], chunk: Decoded, info: CandidateInfo) -> FloatScalar:
    if self.num_frames is not None:
      chunk = chunk[spread(chunk.shape[0], self.num_frames)]
    return self._sum(params, condition, chunk, info)


@dataclasses.dataclass(frozen=True)
class WeightedVideoReward(_WeightedSum):
  """`VideoReward` that sums others.

  Attributes:
    terms: the rewards.
  """

  def __call__(
    self, params: Params, condition: Mapping[str, Any], window: FrameWindow, info: CandidateInfo
  ) -> FloatScalar:
    return self._sum(params, condition, window, info)


def spread(length: int, count: int) -> Int[np.ndarray, " spread"]:
  """The middles of `count` equal parts of `length` frames, or all of fewer: 12 to 3 are 2, 6, 10."""
  count = min(count, length)
  return ((np.arange(count) + 0.5) * length / count).astype(int)


@dataclasses.dataclass(frozen=True)
class RewardChoice:
  """What was asked for, complete and possible as far as names tell.

  Attributes:
    image: names and weights of the image rewards.
    video: names and weights of the video rewards.
    short_frames: frames of a chunk that the image rewards see; None is all of them.
    stored: names of those that have weights, sorted.
    passed_over: the learned rewards that the checkpoint has and the default does not take.
  """

  image: dict[str, float]
  video: dict[str, float]
  short_frames: int | None
  stored: list[str]
  passed_over: tuple[str, ...] = ()


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
  table: RewardTable = REWARDS,
) -> RewardChoice:
  """Reads a choice of rewards; nothing is loaded.

  Args:
    directory: the checkpoint.
    reward: names joined by "+"; by default `LEARNED_REWARDS` if the checkpoint has them all, else `DEFAULT_REWARDS`.
    weights: factor of each score; 1 by default, but where several of one kind are added each must have its own.
    short_frames: frames of a chunk that the image rewards see; all by default.
    chunk_frames: frames of a chunk; the first one may have fewer.
    table: the rewards there are.

  Raises:
    ConfigError: a reward is unknown, missing or named twice; several of one kind have no weights; a kind has no reward;
      a weight is no positive number or belongs to no reward; `short_frames` is more than there are.
  """
  parts = epath.Path(directory) / REWARDS_FOLDER
  present = [name for name, spec in table.items() if not spec.is_stored or (parts / name).exists()]
  passed_over = ()
  if reward is not None:
    names = [name.strip() for name in reward.split("+")]
  elif set(LEARNED_REWARDS) <= set(present):
    names = list(LEARNED_REWARDS)
  else:
    names, passed_over = list(DEFAULT_REWARDS), tuple(name for name in LEARNED_REWARDS if name in present)
  _check_names(names, present, parts, table)
  weights = dict(weights or {})
  _check_weights(weights, names)
  by_kind = {kind: _of_kind(kind, names, weights, table) for kind in KINDS}
  if short_frames is not None and not 1 <= short_frames <= chunk_frames:
    raise ConfigError(f"short_frames must be in 1..{chunk_frames}, the frames of a chunk, got {short_frames}")
  stored = sorted(name for name in names if table[name].is_stored)
  return RewardChoice(**by_kind, short_frames=short_frames, stored=stored, passed_over=passed_over)


def _check_names(names: Sequence[str], present: Sequence[str], parts: epath.Path, table: RewardTable) -> None:
  for name in names:
    if name not in table:
      raise ConfigError(f"reward: {name!r} is not one of {', '.join(table)}; names are joined by '+'")
    if names.count(name) > 1:
      raise ConfigError(f"reward: {name} is named twice")
  missing = [name for name in names if name not in present]
  if missing:
    where = " and no ".join(str(parts / name) for name in missing)
    raise ConfigError(f"reward: there is no {where}{_origin(missing, parts, table)}; there are {', '.join(present)}")


def _origin(missing: Sequence[str], parts: epath.Path, table: RewardTable) -> str:
  """Says which command makes rewards that are missing, where one does."""
  flags = [f"--{name}=FILE --{name}_prompt=FILE" for name in missing if table[name].text is not None]
  if not flags:
    return ""
  return f", which streamt1 convert --output={parts.parent} --reward_tokenizer=FILE {' '.join(flags)} makes"


def _of_kind(kind: str, names: Sequence[str], weights: Mapping[str, float], table: RewardTable) -> dict[str, float]:
  """Names and weights of the chosen rewards of one kind."""
  chosen = [name for name in names if table[name].kind == kind]
  if not chosen:
    others = ", ".join(name for name, spec in table.items() if spec.kind == kind)
    raise ConfigError(f"reward: {'+'.join(names)} has no {kind} reward; add one of {others}")
  if len(chosen) > 1 and not set(chosen) <= set(weights):
    example = ",".join(f"{name}:1" for name in chosen)
    raise ConfigError(
      f"reward: {' and '.join(chosen)} are all {kind} rewards; reward_weights must say how they add up, as {example}"
    )
  return {name: float(weights.get(name, 1.0)) for name in chosen}


def _check_weights(weights: Mapping[str, float], names: Iterable[str]) -> None:
  for name, weight in weights.items():
    if name not in names:
      raise ConfigError(f"reward_weights: {name!r} is not one of the rewards {', '.join(names)}")
    if not (math.isfinite(weight) and weight > 0):
      raise ConfigError(f"reward_weights: the weight of {name} must be positive and finite, got {weight}")


def load(
  directory: epath.PathLike,
  choice: RewardChoice,
  *,
  fps: float,
  dtype: Any,
  mesh: Mesh | None = None,
  table: RewardTable = REWARDS,
) -> Rewards:
  """Loads chosen rewards.

  Args:
    directory: the checkpoint.
    choice: from `choose`.
    fps: frames per second of the videos to be judged.
    dtype: dtype of their backbones.
    mesh: devices that share their weights; None for one.
    table: the rewards there are.

  Raises:
    ConfigError: a reward's folder is damaged, of another size than it says, or holds another reward.
  """
  parts = epath.Path(directory) / REWARDS_FOLDER
  if choice.passed_over and hosts.is_first():
    logging.warning(
      "%s judge: %s has %s alone, whose scores are of another scale; --reward names others",
      "+".join([*choice.image, *choice.video]),
      parts,
      " and ".join(choice.passed_over),
    )
  load_one = lambda name: _load_one(parts / name, table[name], fps, dtype, mesh, table)
  image = {name: load_one(name) for name in choice.image}
  video = {name: load_one(name) for name in choice.video}
  terms = lambda loaded, weights: tuple(Term(name, x.reward, weights[name]) for name, x in loaded.items())
  return Rewards(
    choice,
    _join(WeightedImageReward(terms(image, choice.image), choice.short_frames), image),
    _join(WeightedVideoReward(terms(video, choice.video)), video),
  )


def _load_one(
  path: epath.Path, spec: RewardSpec, fps: float, dtype: Any, mesh: Mesh | None, table: RewardTable
) -> LoadedReward:
  if not spec.is_stored:
    return reward_folder.without_weights(spec, path, fps=fps)
  found, _ = reward_folder.load_config(path, table)
  if found.name != spec.name:
    raise ConfigError(f"{path} holds {found.name}, not {spec.name}")
  return reward_folder.load_reward(path, fps=fps, dtype=dtype, mesh=mesh, embed_on_host=True, table=table)


def _join(reward: Any, loaded: Mapping[str, LoadedReward]) -> LoadedReward:
  return LoadedReward(
    reward,
    {name: one.params for name, one in loaded.items()},
    lambda caption: {name: one.prompt(caption) for name, one in loaded.items()},
  )
