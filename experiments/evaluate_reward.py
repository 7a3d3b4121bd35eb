"""Agreement of a small reward with pairs of clips of captions that it was not trained on.

  python -m experiments.evaluate_reward --reward_dir=runs/hpsv3/reward --split=test
  python -m experiments.evaluate_reward --reward_dir=runs/videoalign/reward --split=test

prints a Markdown table and, last, one JSON line: per corruption the share of pairs in which the better clip scores
higher, by the score that a search uses (mu, or Overall) and by the scores that the corruption concerns; and how often
the caption that is right scores higher than one that differs in one attribute, for the same clip. Windows have all the
lengths that a search shows. Captions of the split "tune" are for choosing anything at all; those of "test" are for
reporting.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from experiments import common
from streamt1_jax.config import ConfigError
from streamt1_jax.data import preferences, reward_text, shapes
from streamt1_jax.data.preferences import CORRUPTIONS, PairConfig, Pairs
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.rewards.folder import LoadedReward, load_reward
from streamt1_jax.rewards.hpsv3 import HPSv3
from streamt1_jax.rewards.qwen2_vl import PromptTokens
from streamt1_jax.rewards.videoalign import DIMENSIONS

_REWARD_DIR = common.define_path("reward_dir", None, "Folder of the reward.", required=True)
_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder of the model whose codec is used.")
_SPLIT = flags.DEFINE_enum("split", "tune", shapes.SPLITS, "Whose captions.")
_PAIRS = common.define_integer("pairs", 8, "Pairs of each corruption and length of the window.", 2, 10_000)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "int8"], "Of the backbone.")
_SEED = common.define_integer("seed", 0, "Of the pairs.", 0, 10**9)

WINDOWS = tuple(9 + 12 * chunk for chunk in range(10))
"""Frames of the windows that a search of `sliding_window=10` shows."""


def pair_scores(loaded: LoadedReward, params, pairs: Pairs, captions: reward_text.CaptionTokens) -> jax.Array:
  """Scores [B, 2 captions, 2 clips, R] (right, other) by (better, worse), through the reward's own interface."""
  reward = loaded.reward

  def score(tokens: PromptTokens, clip: jax.Array) -> jax.Array:
    condition = reward.init(params, tokens)
    if isinstance(reward, HPSv3):
      return reward.frame_scores(params, condition, clip)[:, 0]
    return reward.normalise(reward.raw_scores(params, condition, clip))

  def one(pair: Pairs) -> jax.Array:
    texts = [captions.of(row, pair.omit_size, pair.omit_speed) for row in (pair.scene, pair.other)]
    return jnp.stack([jnp.stack([score(text, clip) for clip in (pair.better, pair.worse)]) for text in texts])

  return jax.lax.map(one, pairs, batch_size=8)


def judge(loaded: LoadedReward, codec: preferences.Codec, split: str, seed: int, count: int) -> dict[str, dict]:
  """Shares by corruption; see the module's docstring."""
  on_frames = isinstance(loaded.reward, HPSv3)
  captions = reward_text.caption_tokens(loaded.prompt)
  scenes = preferences.neighbours(split, shapes.SPLITS)
  windows = [(count * len(WINDOWS), 1, np.zeros(1, np.int32))] if on_frames else []
  if not on_frames:
    windows = [(count, length, loaded.reward.sample(length)) for length in WINDOWS]

  @functools.partial(jax.jit, static_argnames="number")
  def scores_of(params, key, times, length, kind, number):
    config = PairConfig(number, on_frames, through_codec=number // 2, milder_probability=0.0)
    pairs = preferences.draw_pairs(key, scenes, config, times, length, codec, kind)
    return pair_scores(loaded, params, pairs, captions), pairs.late

  report = {}
  kinds = [name for name, corruption in CORRUPTIONS.items() if corruption.on_frames or not on_frames]
  for index, kind in enumerate(tqdm.tqdm(kinds, desc="corruptions", file=sys.stderr)):
    found = []
    for number, length, times in windows:
      key = jax.random.fold_in(jax.random.key(seed), 1000 * index + length)
      which = jnp.int32(preferences.NAMES.index(kind))
      found.append(scores_of(loaded.params, key, jnp.asarray(times), jnp.int32(length), which, number))
    scores, late = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*found))
    report[kind] = describe(scores, late, kind)
  return report


def describe(scores: np.ndarray, late: np.ndarray, kind: str) -> dict[str, float | int]:
  """Shares of pairs in the right order."""
  (better, worse), (better_other, _) = (scores[:, caption].swapaxes(0, 1) for caption in range(2))
  right = better.sum(axis=1) > worse.sum(axis=1)
  shares = {"pairs": len(right), "agreement": right.mean()}
  if late.any():
    shares |= {"whole_window": right[~late].mean(), "last_chunk_only": right[late].mean()}
  if scores.shape[-1] == len(DIMENSIONS):
    higher = (better > worse).mean(axis=0)
    shares |= {name: higher[DIMENSIONS.index(name)] for name in CORRUPTIONS[kind].falls}
  shares |= {"caption_swapped": (better[:, -1] > better_other[:, -1]).mean()}
  return {name: value if name == "pairs" else round(float(value), 3) for name, value in shares.items()}


def summary(report: dict[str, dict]) -> dict[str, float]:
  """Means over the corruptions: of all, and of each family."""
  mean = lambda names, column: round(float(np.mean([report[name][column] for name in names])), 3)
  families = {family: [n for n in report if CORRUPTIONS[n].family == family] for family in preferences.FAMILIES}
  result = {"agreement": mean(list(report), "agreement"), "caption_swapped": mean(list(report), "caption_swapped")}
  return result | {family: mean(names, "agreement") for family, names in families.items() if names}


def table(report: dict[str, dict]) -> str:
  """The report in Markdown."""
  columns = ["agreement", "whole_window", "last_chunk_only", *DIMENSIONS, "caption_swapped"]
  columns = [column for column in columns if any(column in row for row in report.values())]
  lines = [f"| corruption | pairs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
  for name, row in report.items():
    cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
    lines.append(f"| {name} | {row['pairs']} | {' | '.join(cells)} |")
  return "\n".join(lines)


def load_codec() -> preferences.Codec:
  """The codec of `--checkpoint`, as `preferences.draw_pairs` wants it."""
  checkpoint = common.find_folder(_CHECKPOINT.value)
  config = load_config(checkpoint)
  if config.codec is None:
    raise ConfigError(f"--checkpoint={checkpoint} has no codec")
  return preferences.through_codec(common.load_codec(config, checkpoint / "codec"))


def main() -> None:
  loaded = load_reward(common.find_folder(_REWARD_DIR.value), fps=shapes.FPS, dtype=jnp.dtype(_DTYPE.value))
  report = judge(loaded, load_codec(), _SPLIT.value, _SEED.value, _PAIRS.value)
  print(table(report))
  print(json.dumps({"split": _SPLIT.value, **summary(report), "corruptions": report}), flush=True)


if __name__ == "__main__":
  common.run(main)
