"""Pairs of clips of held-out captions, and a reward's scores of them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float32, Int32, UInt8

from streamt1_jax.data import shapes
from streamt1_jax.evaluation import reward_report
from streamt1_jax.rewards.base import LoadedReward
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.training import pair_frames, preferences, reward_text
from streamt1_jax.training.corruptions import CORRUPTIONS, NAMES
from streamt1_jax.training.pair_frames import PairClips
from streamt1_jax.training.preferences import PairConfig
from streamt1_jax.training.reward_text import CaptionTokens
from streamt1_jax.typing import HostArray, Params

WINDOWS = tuple(9 + 12 * chunk for chunk in range(10))
"""Frames of the windows that a search of `sliding_window=10` shows."""


def held_out_pairs(split: str, on_frames: bool) -> PairConfig:
  """Pairs whose worse clip alone has a defect.

  Captions are complete, so none of the right ones equals a caption of training: they are divided by hashes of all
  attributes. (Shortened, nearly all of them would be captions of training, word for word.) With single frames this says
  less: all visible combinations of size, colour, shape and background of an object occur in training, with another
  direction or speed.
  """
  return PairConfig(on_frames, split=split, other_splits=shapes.SPLITS, omit_probability=0.0, milder_probability=0.0)


def pair_scores(
  params: Params, spec: RewardSpec, loaded: LoadedReward, clips: UInt8[Array, "B 2 n 64 64 3"], tokens: CaptionTokens
) -> Float32[Array, "B 2 2 R"]:
  """Scores [B, 2 captions, 2 clips, R] (right, other) by (better, worse), through the reward's own interface.

  Args:
    params: weights of the reward.
    spec: of the reward.
    loaded: the reward.
    clips: [B, 2, n, 64, 64, 3] uint8.
    tokens: of the captions, [B, 2, ...].
  """
  reward = loaded.reward

  def score(tokens: PromptTokens, clip: jax.Array) -> jax.Array:
    condition = reward.init(params, tokens)
    if spec.on_frames:
      return reward.frame_scores(params, condition, clip)[:, 0]
    return reward.normalise(reward.raw_scores(params, condition, clip))

  def one(pair) -> jax.Array:
    clips, after, index = pair
    texts = [PromptTokens(tokens.before, after[side], index[side]) for side in range(2)]
    return jnp.stack([jnp.stack([score(text, clip) for clip in clips]) for text in texts])

  return jax.lax.map(one, (clips, tokens.after, tokens.reward_index), batch_size=8)


def judge(
  spec: RewardSpec, loaded: LoadedReward, codec: pair_frames.Codec, split: str, seed: int, count: int
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
  config = held_out_pairs(split, spec.on_frames)
  windows = [(count * len(WINDOWS), 1, np.zeros(1, np.int32))] if spec.on_frames else []
  if not spec.on_frames:
    windows = [(count, length, np.asarray(loaded.reward.sample(length), np.int32)) for length in WINDOWS]

  @jax.jit
  def scores_of(params: Params, clips: PairClips, times: Int32[HostArray, " n"], tokens: CaptionTokens) -> jax.Array:
    frames = jnp.stack(pair_frames.draw(clips, times, codec), axis=1)
    return pair_scores(params, spec, loaded, frames, tokens)

  report = {}
  names = [name for name, corruption in CORRUPTIONS.items() if corruption.on_frames or not spec.on_frames]
  for name in tqdm.tqdm(names, desc="corruptions", file=sys.stderr):
    scores, late = [], []
    for number, length, times in windows:
      rng = np.random.default_rng((seed, NAMES.index(name), length))
      pairs = preferences.draw_pairs(rng, config, number, length, name)
      texts = [caption for pair in pairs for caption in pair.texts]
      tokens = reward_text.caption_tokens(loaded.prompt, texts)
      shape = (number, 2, -1)
      tokens = tokens._replace(after=tokens.after.reshape(shape), reward_index=tokens.reward_index.reshape(shape))
      clips = pair_frames.pair_clips(pairs, times, number // 2)
      scores.append(np.asarray(scores_of(loaded.params, clips, times, tokens)))
      late += [pair.late for pair in pairs]
    report[name] = reward_report.describe(np.concatenate(scores), np.array(late), name)
  return report
