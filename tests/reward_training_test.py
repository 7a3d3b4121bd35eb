"""A whole training of a reward, as a user runs it, of a model narrow enough for a test."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train import reward
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.table import REWARDS
from tests import small_rewards


def _narrow(config):
  backbone = small_rewards.BACKBONE
  return dataclasses.replace(
    config,
    backbone=dataclasses.replace(
      backbone,
      vision=dataclasses.replace(backbone.vision, patch_size=8),
      decoder=dataclasses.replace(backbone.decoder, vocab_size=config.backbone.decoder.vocab_size),
    ),
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "options", "learns_to_compare"),
  [
    ("hpsv3", [], False),
    ("videoalign", ["--windows=9", "--comparing_weight=1"], True),
  ],
)
def test_two_steps(tmp_path, monkeypatch, capsys, name, options, learns_to_compare):
  # The program trains the one size of the shapes world, which takes minutes.
  spec = REWARDS[name]
  training = spec.training._replace(config=lambda: _narrow(spec.training.config()))
  monkeypatch.setattr(reward, "REWARDS", {**REWARDS, name: dataclasses.replace(spec, training=training)})
  code = reward.main(
    [
      f"--reward={name}", f"--run_dir={tmp_path / 'run'}", "--steps=2", "--pairs=4", "--through_codec=0",
      "--log_every=1", "--score_batches=2", *options,
    ]
  )  # fmt: skip
  assert code == 0, capsys.readouterr().err
  first, *curve = map(json.loads, (tmp_path / "run/loss.jsonl").read_text().splitlines())
  assert first["settings"]["reward"] == name
  assert [row["step"] for row in curve] == [1, 2]
  # Readers begin with zeros, which give every word of the vocabulary the same odds.
  loaded = folder.load_reward(tmp_path / "run/reward", fps=16.0, dtype=jnp.float32)
  words = loaded.params["backbone"]["decoder"]["token_embedding"].shape[0]
  for reader, odds in (("words", words), ("truth", 2)):
    np.testing.assert_allclose(curve[0][reader], np.log(odds), rtol=1e-4)
  # A reader without a weight stays as it is.
  for reader in ("correction", "truth"):
    # Up to the rounding of a mean over other pairs.
    assert (abs(curve[1][reader] - curve[0][reader]) > 1e-5) == learns_to_compare
