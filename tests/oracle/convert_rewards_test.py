"""Files that torch, safetensors and peft wrote in the published layout, by the command, to the libraries' scores."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

# ruff: noqa: E402
from streamt1_jax.io import config_json
from streamt1_jax.rewards.folder import load_reward
from streamt1_jax.rewards.qwen2_vl import prompts
from tests import small_rewards
from tests.command_line import convert
from tests.oracle import reward_libraries as libraries


def _state_dict(model, old_names: bool) -> dict:
  """Contiguous copies: safetensors stores no shared memory, and the published file has the language-model head."""
  return {name: torch.from_numpy(array.copy()) for name, array in libraries.tensors(model, old_names=old_names).items()}


def _converted(folder: pathlib.Path, model: str, reward, weights: str):
  """What `load_reward` makes of the conversion of `weights`."""
  (folder / "config.json").write_text(json.dumps(config_json.to_json_value(reward.config)))
  stored = small_rewards.save_reward(folder / "stored", model)
  result = convert(
    folder,
    f"--{model}={weights}",
    f"--{model}_prompt={stored / prompts.TEMPLATE_FILE}",
    f"--{model}_config=config.json",
    f"--reward_tokenizer={stored}",
    "--output=out",
    "--dtype=float32",
  )
  assert result.code == 0, result
  return load_reward(folder / "out/rewards" / model, fps=16.0, dtype=jnp.float32)


def _logits(loaded, patches, ids, reward_index):
  @jax.jit
  def run(params, patches, tokens):
    model = loaded.reward.model(params)
    return model(model.backbone.embed_prompt(tokens), patches, libraries.GRID)

  return run(loaded.params, patches, libraries.prompt(ids, reward_index))


@pytest.mark.parametrize("old_names", [True, False])
def test_hpsv3(tmp_path, old_names):
  oracle = libraries.hpsv3_oracle()
  safetensors.save_file(_state_dict(oracle, old_names), tmp_path / "HPSv3.safetensors")
  loaded = _converted(tmp_path, "hpsv3", libraries.HPSV3, "HPSv3.safetensors")
  patches, ids = libraries.inputs(1, seed=4)
  _, hidden, positions = libraries.expected(oracle, patches, ids)
  with torch.no_grad():
    expected = oracle.rm_head(hidden[positions[1]])
  found = _logits(loaded, patches, ids, libraries.REWARD_INDEX[1:2])
  np.testing.assert_allclose(found[0], expected, **libraries.CLOSE)


@pytest.mark.parametrize("old_names", [True, False])
def test_videoalign(tmp_path, old_names):
  oracle = libraries.videoalign_oracle()
  (tmp_path / "VideoReward/checkpoint-11352").mkdir(parents=True)
  torch.save(_state_dict(oracle, old_names), tmp_path / "VideoReward/checkpoint-11352/model.pth")
  loaded = _converted(tmp_path, "videoalign", libraries.VIDEOALIGN, "VideoReward")
  patches, ids = libraries.inputs(3, seed=5)
  _, hidden, positions = libraries.expected(oracle, patches, ids)
  with torch.no_grad():
    expected = oracle.base_model.model.rm_head(hidden[positions])[:, 0]
  np.testing.assert_allclose(_logits(loaded, patches, ids, libraries.REWARD_INDEX), expected, **libraries.CLOSE)
