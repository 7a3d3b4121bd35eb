"""Qwen2-VL as a reward backbone against transformers, and VideoAlign's adapters against peft."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

# ruff: noqa: E402
from streamt1_jax.convert.tables import hpsv3 as convert_hpsv3
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.rewards.hpsv3 import HPSv3
from tests import small_rewards
from tests.oracle import reward_libraries as libraries


@pytest.fixture(scope="module")
def hpsv3_oracle():
  return libraries.hpsv3_oracle()


@pytest.fixture(scope="module")
def videoalign_oracle():
  return libraries.videoalign_oracle()


@pytest.mark.parametrize("old_names", [False, True])
def test_hpsv3(hpsv3_oracle, old_names):
  params = small_rewards.convert(libraries.tensors(hpsv3_oracle, old_names), libraries.HPSV3.config)
  index = libraries.REWARD_INDEX[1]
  patches, ids = libraries.inputs(1, seed=1)

  @jax.jit
  def ours(params, patches, tokens):
    model = libraries.HPSV3.model(params)
    prompt = model.backbone.embed_prompt(tokens)
    return model.backbone.vision(patches, libraries.GRID), model(prompt, patches, libraries.GRID)

  media, hidden, positions = libraries.expected(hpsv3_oracle, patches, ids)
  with torch.no_grad():
    logits = hpsv3_oracle.rm_head(hidden[positions[1]])
  found_media, found = ours(params, patches, libraries.prompt(ids, [index]))
  np.testing.assert_allclose(found_media[0], media, **libraries.CLOSE)
  np.testing.assert_allclose(found[0], logits, **libraries.CLOSE)


@pytest.mark.parametrize("old_names", [False, True])
def test_videoalign_with_adapters(videoalign_oracle, old_names):
  tensors = libraries.tensors(videoalign_oracle, old_names)
  params = small_rewards.convert(tensors, libraries.VIDEOALIGN.config)
  patches, ids = libraries.inputs(3, seed=2)

  @jax.jit
  def ours(params, patches, tokens):
    model = libraries.VIDEOALIGN.model(params)
    prompt = model.backbone.embed_prompt(tokens)
    return model.backbone.vision(patches, libraries.GRID), model(prompt, patches, libraries.GRID)

  media, hidden, positions = libraries.expected(videoalign_oracle, patches, ids)
  with torch.no_grad():
    raw = videoalign_oracle.base_model.model.rm_head(hidden[positions])[:, 0]
  found_media, found = ours(params, patches, libraries.prompt(ids, libraries.REWARD_INDEX))
  np.testing.assert_allclose(found_media.reshape(media.shape), media, **libraries.CLOSE)
  np.testing.assert_allclose(found, raw, **libraries.CLOSE)


def test_rounded_frequencies(hpsv3_oracle):
  """The decoder with frequencies rounded to bfloat16, as the published models are run."""
  rotary = hpsv3_oracle.model.language_model.rotary_emb
  exact = rotary.inv_freq
  patches, ids = libraries.inputs(1, seed=3)
  rotary.inv_freq = exact.bfloat16().float()
  try:
    media, hidden, positions = libraries.expected(hpsv3_oracle, patches, ids)
  finally:
    rotary.inv_freq = exact
  backbone = dataclasses.replace(libraries.BACKBONE, rope_dtype="bf16_reference")
  reward = HPSv3(dataclasses.replace(libraries.HPSV3.config, backbone=backbone))
  params = small_rewards.convert(libraries.tensors(hpsv3_oracle, old_names=False), reward.config)

  @jax.jit
  def ours(params, media, tokens):
    backbone = reward.model(params).backbone
    return backbone.read(backbone.embed_prompt(tokens), media)

  found = ours(params, jnp.asarray(media.numpy()), libraries.prompt(ids, libraries.REWARD_INDEX))
  np.testing.assert_allclose(found, hidden[positions], **libraries.CLOSE)


def test_new_names_are_those_of_transformers(hpsv3_oracle):
  names = set(hpsv3_oracle.state_dict()) - set(qwen2_vl.UNUSED)
  assert {rule.source for rule in convert_hpsv3.rules(libraries.HPSV3.config, new_names=True)} == {
    name if ".blocks." not in name and ".layers." not in name else _templated(name) for name in names
  }


def _templated(name: str) -> str:
  parts = name.split(".")
  place = next(index for index, part in enumerate(parts) if part in ("blocks", "layers")) + 1
  return ".".join([*parts[:place], "{layer}", *parts[place + 1 :]])
