"""Agreement of a small reward with pairs of clips of captions that it was not trained on.

  python -m experiments.evaluate.reward --reward_dir=runs/hpsv3/reward --split=test
  python -m experiments.evaluate.reward --reward_dir=runs/videoalign/reward --split=test

prints a Markdown table and, last, one JSON line: per corruption the share of pairs in which the better clip scores
higher, by the score that a search uses (mu, or Overall) and by the scores that the corruption concerns; and how often
the caption that is right scores higher than one that differs in one attribute, for the same clip. Windows have all the
lengths that a search shows. Captions of the split "tune" are for choosing anything at all; those of "test" are for
reporting.

Which captions are right, and what they have in common with those of training: `reward_report.held_out_pairs`.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.evaluation import reward_report
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.rewards.base import LoadedReward
from streamt1_jax.rewards.folder import load_config as load_reward_config
from streamt1_jax.rewards.folder import load_reward
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.training import preferences, reward_text
from streamt1_jax.training.preferences import CORRUPTIONS, Pairs

_REWARD_DIR = common.define_path("reward_dir", None, "Folder of the reward.", required=True)
_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder of the model whose codec is used.")
_SPLIT = flags.DEFINE_enum("split", "tune", shapes.SPLITS, "Whose captions.")
_PAIRS = common.define_integer("pairs", 8, "Pairs of each corruption and length of the window.", 2, 10_000)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "int8"], "Of the backbone.")
_SEED = common.define_integer("seed", 0, "Of the pairs.", 0, 10**9)

WINDOWS = tuple(9 + 12 * chunk for chunk in range(10))
"""Frames of the windows that a search of `sliding_window=10` shows."""


def pair_scores(
  kind: str, loaded: LoadedReward, params, pairs: Pairs, captions: reward_text.CaptionTokens
) -> jax.Array:
  """Scores [B, 2 captions, 2 clips, R] (right, other) by (better, worse), through the reward's own interface."""
  reward = loaded.reward

  def score(tokens: PromptTokens, clip: jax.Array) -> jax.Array:
    condition = reward.init(params, tokens)
    if kind == "image":
      return reward.frame_scores(params, condition, clip)[:, 0]
    return reward.normalise(reward.raw_scores(params, condition, clip))

  def one(pair: Pairs) -> jax.Array:
    texts = [captions.of(row, pair.omit_size, pair.omit_speed) for row in (pair.scene, pair.other)]
    return jnp.stack([jnp.stack([score(text, clip) for clip in (pair.better, pair.worse)]) for text in texts])

  return jax.lax.map(one, pairs, batch_size=8)


def judge(
  kind: str, loaded: LoadedReward, codec: preferences.Codec, split: str, seed: int, count: int
) -> dict[str, dict]:
  """Shares by corruption, for a reward of this kind; see the module's docstring."""
  on_frames = kind == "image"
  captions = reward_text.caption_tokens(loaded.prompt)
  scenes = preferences.neighbours(split, shapes.SPLITS)
  windows = [(count * len(WINDOWS), 1, np.zeros(1, np.int32))] if on_frames else []
  if not on_frames:
    windows = [(count, length, loaded.reward.sample(length)) for length in WINDOWS]

  @functools.partial(jax.jit, static_argnames="number")
  def scores_of(params, key, times, length, corruption, number):
    config = reward_report.held_out_pairs(number, on_frames)
    pairs = preferences.draw_pairs(key, scenes, config, times, length, codec, corruption)
    return pair_scores(kind, loaded, params, pairs, captions), pairs.late

  report = {}
  names = [name for name, corruption in CORRUPTIONS.items() if corruption.on_frames or not on_frames]
  for index, name in enumerate(tqdm.tqdm(names, desc="corruptions", file=sys.stderr)):
    found = []
    for number, length, times in windows:
      key = jax.random.fold_in(jax.random.key(seed), 1000 * index + length)
      which = jnp.int32(preferences.NAMES.index(name))
      found.append(scores_of(loaded.params, key, jnp.asarray(times), jnp.int32(length), which, number))
    scores, late = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*found))
    report[name] = reward_report.describe(scores, late, name)
  return report


def load_codec() -> preferences.Codec:
  """The codec of `--checkpoint`, as `preferences.draw_pairs` wants it."""
  checkpoint = common.find_folder(_CHECKPOINT.value)
  config = load_config(checkpoint)
  if config.codec is None:
    raise ConfigError(f"--checkpoint={checkpoint} has no codec")
  return preferences.through_codec(common.load_codec(config, checkpoint / "codec"))


def main() -> None:
  path = common.find_folder(_REWARD_DIR.value)
  spec, _ = load_reward_config(path)
  loaded = load_reward(path, fps=shapes.FPS, dtype=jnp.dtype(_DTYPE.value))
  report = judge(spec.kind, loaded, load_codec(), _SPLIT.value, _SEED.value, _PAIRS.value)
  print(reward_report.table(report))
  print(json.dumps({"split": _SPLIT.value, **reward_report.summary(report), "corruptions": report}), flush=True)


if __name__ == "__main__":
  common.run(main)
