"""A whole training of a reward, as a user runs it, of a model narrow enough for a test."""

import csv
import dataclasses
import functools
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.rewards import folder
from streamt1_jax.rewards.table import REWARDS
from tests import small_rewards
from tests.command_line import REPOSITORY, quick_compilation, result_of, start_function


def _train_narrow(name: str, *arguments: str) -> None:
  from experiments.train import reward as train_reward
  from streamt1_jax.cli import common

  spec, narrow = REWARDS[name], small_rewards.BACKBONE
  config = spec.training.config()
  backbone = dataclasses.replace(
    narrow,
    vision=dataclasses.replace(narrow.vision, patch_size=8),
    decoder=dataclasses.replace(narrow.decoder, vocab_size=config.backbone.decoder.vocab_size),
  )
  training = spec.training._replace(config=lambda: dataclasses.replace(config, backbone=backbone))
  train_reward.REWARDS = {**REWARDS, name: dataclasses.replace(spec, training=training)}
  train_reward.score_statistics = functools.partial(train_reward.score_statistics, batches=2)
  sys.argv = ["experiments/train_reward.py", f"--reward={name}", *arguments]
  common.run(train_reward.main)


@pytest.mark.parametrize(
  ("name", "options", "learns_to_compare"),
  [("hpsv3", [], False), ("videoalign", ["--windows=9", "--comparing_weight=1"], True)],
)
def test_two_steps(tmp_path, name, options, learns_to_compare):
  arguments = [
    f"--codec_dir={REPOSITORY}/checkpoints/tiny/codec", "--run_dir=run", "--steps=2", "--pairs=4", "--through_codec=0",
    "--log_every=1", *options,
  ]  # fmt: skip
  settings = quick_compilation(tmp_path / "compiled")
  process = start_function(tmp_path, _train_narrow, name, *arguments, jax_settings=settings)
  process.join()
  result = result_of(process.exitcode, tmp_path)
  assert result.code == 0, result
  with (tmp_path / "run/loss.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["step"] for row in rows] == ["1", "2"]
  # Readers begin with zeros, which give every word of the vocabulary the same odds.
  loaded = folder.load_reward(tmp_path / "run/reward", fps=16.0, dtype=jnp.float32)
  words = loaded.params["backbone"]["decoder"]["token_embedding"].shape[0]
  for reader, odds in (("words", words), ("correction", words), ("truth", 2)):
    np.testing.assert_allclose(float(rows[0][reader]), np.log(odds), rtol=1e-4)
  # A reader without a weight stays as it is.
  for reader in ("correction", "truth"):
    assert (float(rows[1][reader]) != float(rows[0][reader])) == learns_to_compare
