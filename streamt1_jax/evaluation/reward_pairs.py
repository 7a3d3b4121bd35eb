"""Pairs of clips of held-out captions, and a reward's scores of them."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from streamt1_jax.data import shapes
from streamt1_jax.evaluation import reward_report
from streamt1_jax.rewards.base import LoadedReward
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.training import preferences, reward_text, scene_pairs
from streamt1_jax.training.corruptions import CORRUPTIONS, NAMES
from streamt1_jax.training.preferences import PairConfig, Pairs
from streamt1_jax.typing import Params

WINDOWS = tuple(9 + 12 * chunk for chunk in range(10))
"""Frames of the windows that a search of `sliding_window=10` shows."""


def held_out_pairs(count: int, on_frames: bool) -> PairConfig:
  """Pairs whose worse clip alone has a defect; half of them go through the codec.

  Captions are complete, so none of the right ones equals a caption of training: scenes are divided by a hash of all six
  attributes. (Shortened, 93 % of them and more would be captions of training, word for word.) With single frames this
  says less: all visible combinations of size, colour, shape and background occur in training, with another direction
  or speed.
  """
  return PairConfig(count, on_frames, through_codec=count // 2, omit_probability=0.0, milder_probability=0.0)


def pair_scores(
  params: Params, spec: RewardSpec, loaded: LoadedReward, pairs: Pairs, captions: reward_text.CaptionTokens
) -> jax.Array:
  """Scores [B, 2 captions, 2 clips, R] (right, other) by (better, worse), through the reward's own interface."""
  reward = loaded.reward

  def score(tokens: PromptTokens, clip: jax.Array) -> jax.Array:
    condition = reward.init(params, tokens)
    if spec.on_frames:
      return reward.frame_scores(params, condition, clip)[:, 0]
    return reward.normalise(reward.raw_scores(params, condition, clip))

  def one(pair: Pairs) -> jax.Array:
    texts = [captions.of(row, pair.omit_size, pair.omit_speed) for row in (pair.scene, pair.other)]
    return jnp.stack([jnp.stack([score(text, clip) for clip in (pair.better, pair.worse)]) for text in texts])

  return jax.lax.map(one, pairs, batch_size=8)


def judge(
  spec: RewardSpec, loaded: LoadedReward, codec: preferences.Codec, split: str, seed: int, count: int
) -> dict[str, dict]:
  """What `reward_report.describe` says of each corruption.

  Args:
    spec: of the reward.
    loaded: the reward.
    codec: what half of the pairs go through.
    split: whose captions.
    seed: draws the pairs.
    count: pairs of each corruption and length of the window.
  """
  on_frames = spec.on_frames
  captions = reward_text.caption_tokens(loaded.prompt)
  scenes = scene_pairs.neighbours(split, shapes.SPLITS)
  windows = [(count * len(WINDOWS), 1, np.zeros(1, np.int32))] if on_frames else []
  if not on_frames:
    windows = [(count, length, loaded.reward.sample(length)) for length in WINDOWS]

  @functools.partial(jax.jit, static_argnames="number")
  def scores_of(params, key, times, length, corruption, number):
    pairs = preferences.draw_pairs(key, scenes, held_out_pairs(number, on_frames), times, length, codec, corruption)
    return pair_scores(params, spec, loaded, pairs, captions), pairs.late

  report = {}
  names = [name for name, corruption in CORRUPTIONS.items() if corruption.on_frames or not on_frames]
  for index, name in enumerate(tqdm.tqdm(names, desc="corruptions", file=sys.stderr)):
    found = []
    for number, length, times in windows:
      key = jax.random.fold_in(jax.random.key(seed), 1000 * index + length)
      which = jnp.int32(NAMES.index(name))
      found.append(scores_of(loaded.params, key, jnp.asarray(times), jnp.int32(length), which, number))
    scores, late = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*found))
    report[name] = reward_report.describe(scores, late, name)
  return report
