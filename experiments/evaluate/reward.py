"""Agreement of a small reward with pairs of clips of captions that it was not trained on.

  python -m experiments.evaluate.reward --reward_dir=runs/hpsv3/reward --split=test
  python -m experiments.evaluate.reward --reward_dir=runs/videoalign/reward --split=test

prints a Markdown table and, in the last line, JSON. For each corruption: the share of pairs in which the better clip
scores higher, by the score that a search uses (mu, or Overall) and by the scores that the corruption concerns; and how
often the caption that is right scores higher than one that differs in one attribute, with the same clip. Windows have
all the lengths that a search shows. Captions of the split "tune" are for choosing anything at all; those of "test" are
for reporting.

Which captions are right, and what they have in common with those of training: `reward_pairs.held_out_pairs`.
"""

import json
import sys
from collections.abc import Sequence

import jax.numpy as jnp
from absl import flags

from streamt1_jax.cli import command, device_flags, files, flag_types
from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.evaluation import reward_pairs, reward_report
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.rewards import folder
from streamt1_jax.training import pair_frames
from streamt1_jax.training.codec import load_codec


def define_flags(values: flags.FlagValues) -> None:
  """The reward, and the pairs it is asked about."""
  flag_types.define_path(values, "reward_dir", None, "Folder of the reward.", required=True)
  flag_types.define_checkpoint(values, "Folder of the model whose codec is used")
  flag_types.define_choice(values, "split", "tune", shapes.SPLITS, "Whose captions.")
  pairs = "Pairs of each corruption and length of the window."
  flag_types.define_integer(values, "pairs", 8, pairs, 2, 10_000)
  device_flags.define_dtype(values, ["float32", "bfloat16", "int8"], "Dtype of the backbone.")
  flag_types.define_integer(values, "seed", 0, "Seed of the pairs.", 0, 10**9)


def run(values: flags.FlagValues) -> None:
  """Scores the pairs and prints the report."""
  checkpoint = files.find_checkpoint(values.checkpoint)
  config = load_config(checkpoint)
  if config.codec is None:
    raise ConfigError(f"--checkpoint={checkpoint} has no codec")
  spec, _ = folder.load_config(values.reward_dir)
  loaded = folder.load_reward(values.reward_dir, fps=shapes.FPS, dtype=jnp.dtype(device_flags.use_dtype(values.dtype)))
  codec = pair_frames.through_codec(load_codec(checkpoint / "codec", config))
  report = reward_pairs.judge(spec, loaded, codec, values.split, values.seed, values.pairs)
  print(reward_report.table(report))
  print(json.dumps({"split": values.split, **reward_report.summary(report), "corruptions": report}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
