"""Mapping tables of HPSv3 and VideoAlign at full size, and adapters that are merged while they are read."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.convert import engine, peft_merge
from streamt1_jax.convert.tables import hpsv3, qwen2_vl, videoalign
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.rewards import hpsv3 as rewards_hpsv3
from streamt1_jax.rewards import videoalign as rewards_videoalign
from streamt1_jax.rewards.hpsv3 import HPSv3Config
from streamt1_jax.rewards.qwen2_vl.config import qwen2_vl_preset
from streamt1_jax.rewards.table import PUBLISHED_REWARDS
from streamt1_jax.rewards.videoalign import VideoAlignConfig
from tests import small_rewards

_TINY = HPSv3Config(qwen2_vl_preset("qwen2_vl_tiny"), head_dims=(12, 6))
_BLOCK_LINEAR = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def test_both_lines_of_a_published_reward():
  """One says what the reward is, the other how its weights are converted."""
  assert set(CONVERSIONS) == set(PUBLISHED_REWARDS) == {"hpsv3", "videoalign"}


def _published_vision(dim: int, out: int) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the vision tower (docs/reference/rewards.md), 32 blocks."""
  shapes = {"visual.patch_embed.proj.weight": (dim, 3, 2, 14, 14)}
  merged = 4 * dim
  for name, rows, columns in (("mlp.0", merged, merged), ("mlp.2", out, merged)):
    shapes |= {f"visual.merger.{name}.weight": (rows, columns), f"visual.merger.{name}.bias": (rows,)}
  shapes |= {f"visual.merger.ln_q.{kind}": (dim,) for kind in ("weight", "bias")}
  for layer in range(32):
    block = f"visual.blocks.{layer}"
    shapes |= {f"{block}.{norm}.{kind}": (dim,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    for name, rows, columns in (
      ("attn.qkv", 3 * dim, dim),
      ("attn.proj", dim, dim),
      ("mlp.fc1", 4 * dim, dim),
      ("mlp.fc2", dim, 4 * dim),
    ):
      shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
  return shapes


def _published_decoder(vocab: int, dim: int, kv: int, ffn: int) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the language model, 28 blocks, and of its head."""
  shapes = {"model.embed_tokens.weight": (vocab, dim), "lm_head.weight": (vocab, dim), "model.norm.weight": (dim,)}
  rows_columns = {
    "self_attn.q_proj": (dim, dim),
    "self_attn.k_proj": (kv, dim),
    "self_attn.v_proj": (kv, dim),
    "self_attn.o_proj": (dim, dim),
    "mlp.gate_proj": (ffn, dim),
    "mlp.up_proj": (ffn, dim),
    "mlp.down_proj": (dim, ffn),
  }
  for layer in range(28):
    block = f"model.layers.{layer}"
    shapes |= {f"{block}.{norm}.weight": (dim,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{block}.{name}.weight": shape for name, shape in rows_columns.items()}
    shapes |= {
      f"{block}.self_attn.{name}.bias": (rows_columns[f"self_attn.{name}"][0],)
      for name in ("q_proj", "k_proj", "v_proj")
    }
  return shapes


def _with_adapters(shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
  """The same model wrapped by peft."""
  wrapped = {}
  for name, shape in shapes.items():
    module, _, kind = name.rpartition(".")
    if not name.startswith("model.layers.") or not module.endswith("_proj"):
      wrapped[f"base_model.model.{name}"] = shape
      continue
    wrapped[f"base_model.model.{module}.base_layer.{kind}"] = shape
    if kind == "weight":
      wrapped[f"base_model.model.{module}.lora_A.default.weight"] = (rank, shape[1])
      wrapped[f"base_model.model.{module}.lora_B.default.weight"] = (shape[0], rank)
  return wrapped


def _abstract(shapes):
  return {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}


def _count(params) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


class TestFullSize:
  def test_hpsv3(self):
    shapes = _published_vision(1280, 3584) | _published_decoder(151658, 3584, 512, 18944)
    heads = {0: (1024, 3584), 3: (16, 1024), 5: (2, 16)}
    for place, shape in heads.items():
      shapes |= {f"rm_head.{place}.weight": shape, f"rm_head.{place}.bias": shape[:1]}
    assert len(shapes) == 736
    config = HPSv3Config()
    params = rewards_hpsv3.abstract_params(config, jnp.bfloat16)
    for new_names in (False, True):
      rename = qwen2_vl.new_name if new_names else lambda name: name
      tensors = _abstract({rename(name): shape for name, shape in shapes.items()})
      engine.check(tensors, hpsv3.rules(config, new_names), params, ignore=qwen2_vl.UNUSED)
      assert qwen2_vl.has_new_names(tensors) == new_names
    assert _count(params["backbone"]["vision"]) == 675_759_104
    decoder = params["backbone"]["decoder"]
    assert _count(decoder["token_embedding"]) == 543_542_272
    assert _count(decoder) == 543_542_272 + 6_525_621_760
    assert {leaf.dtype for leaf in jax.tree.leaves(params["head"])} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params["backbone"])} == {np.dtype(ml_dtypes.bfloat16)}

  def test_videoalign(self):
    plain = _published_vision(1280, 1536) | _published_decoder(151660, 1536, 256, 8960) | {"rm_head.weight": (1, 1536)}
    published = _abstract(_with_adapters(plain, rank=64))
    assert len(published) == 1123
    assert sum(2 * math.prod(tensor.shape) for tensor in published.values()) == 5_030_744_064
    config = VideoAlignConfig()
    merged = peft_merge.merged(published, *videoalign.CONVERSION.lora)
    params = rewards_videoalign.abstract_params(config, jnp.bfloat16)
    engine.check(merged, videoalign.rules(config), params, ignore=qwen2_vl.UNUSED)
    assert _count(params["backbone"]["vision"]) == 665_271_296
    assert _count(params["backbone"]["decoder"]) == 232_949_760 + 1_310_340_608


class TestRoundTrip:
  @pytest.mark.parametrize("new_names", [False, True])
  def test_is_bitwise(self, new_names):
    rules = hpsv3.rules(_TINY, new_names)
    specs = engine.source_specs(rules, small_rewards.abstract_params(_TINY))
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}
    params = small_rewards.convert(tensors | {"lm_head.weight": np.zeros((256, 128), np.float32)}, _TINY)
    back = engine.invert(params, rules)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
      np.testing.assert_array_equal(back[name], tensor)

  def test_mixed_names_are_refused(self):
    specs = engine.source_specs(hpsv3.rules(_TINY), small_rewards.abstract_params(_TINY))
    tensors = {name: np.zeros(spec.shape, np.float32) for name, spec in specs.items()}
    tensors["model.language_model.norm.weight"] = tensors.pop("model.norm.weight")
    with pytest.raises(ConfigError, match="unknown"):
      small_rewards.convert(tensors, _TINY)


def _adapted(generator=None, out: int = 5, inputs: int = 4, rank: int = 2) -> dict[str, np.ndarray]:
  generator = generator or np.random.default_rng(0)
  draw = lambda *shape: generator.normal(size=shape).astype(np.float32)
  prefix = "base_model.model.layer"
  return {
    f"{prefix}.base_layer.weight": draw(out, inputs),
    f"{prefix}.base_layer.bias": draw(out),
    f"{prefix}.lora_A.default.weight": draw(rank, inputs),
    f"{prefix}.lora_B.default.weight": draw(out, rank),
    "base_model.model.norm.weight": draw(inputs),
  }


def _reshape(tensors, matrix: str, shape: tuple[int, ...]) -> None:
  tensors[f"base_model.model.layer.{matrix}.weight"] = np.zeros(shape, np.float32)


def _rename(tensors: dict, old: str, new: str) -> None:
  tensors[f"base_model.model.{new}"] = tensors.pop(f"base_model.model.{old}")


class TestAdapters:
  def test_merged_by_hand(self):
    tensors = _adapted()
    merged = peft_merge.merged(tensors, rank=2, alpha=6)
    base, _, down, up, norm = tensors.values()
    expected = base.astype(np.float64) + 3.0 * up.astype(np.float64) @ down.astype(np.float64)
    assert merged.keys() == {"layer.weight", "layer.bias", "norm.weight"}
    np.testing.assert_allclose(np.asarray(merged["layer.weight"]), expected, atol=1e-6)
    np.testing.assert_array_equal(merged["layer.bias"], tensors["base_model.model.layer.base_layer.bias"])
    assert merged["norm.weight"] is norm

  def test_bfloat16_is_merged_in_float32(self):
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in _adapted(inputs=64, out=32).items()}
    base, _, down, up, _ = (tensor.astype(np.float64) for tensor in tensors.values())
    found = np.asarray(peft_merge.merged(tensors, rank=2, alpha=4)["layer.weight"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, base + 2.0 * up @ down, atol=1e-5)

  def test_shape_and_dtype_need_no_reading(self):
    merged = peft_merge.merged(_abstract({name: x.shape for name, x in _adapted().items()}), rank=2, alpha=4)
    assert merged["layer.weight"].shape == (5, 4)
    assert merged["layer.weight"].dtype == np.float32

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (lambda t: t.pop("base_model.model.layer.lora_B.default.weight"), "layer is incomplete: .*lora_B"),
      (lambda t: t.pop("base_model.model.layer.lora_A.default.weight"), "layer is incomplete: .*lora_A"),
      (lambda t: t.pop("base_model.model.layer.base_layer.weight"), "incomplete: layer.base_layer.weight is missing"),
      (lambda t: t.update({"base_model.model.b.base_layer.weight": np.zeros(1)}), "b is incomplete: b.lora_A"),
      (lambda t: _rename(t, "layer.base_layer.weight", "layer.weight"), "incomplete: layer.base_layer.weight"),
      (lambda t: t.update({"base_model.model.layer.weight": np.zeros((5, 4))}), "has layer.weight twice: .*base_layer"),
      (lambda t: t.update({"base_model.model.layer.bias": np.zeros(5)}), "has layer.bias twice: .*base_layer.bias"),
      (lambda t: t.update({"stray": np.zeros(1)}), "names every tensor base_model.model..*, found stray"),
      (lambda t: t.update(_adapted(rank=3)), r"adapter of layer is \[5, 3\] by \[3, 4\]; rank 2"),
      (lambda t: _reshape(t, "lora_B.default", (5, 3)), r"adapter of layer is \[5, 3\] by \[2, 4\]; rank 2"),
      (lambda t: _reshape(t, "lora_B.default", (4, 2)), r"adapter of layer is \[4, 2\] by \[2, 4\]; rank 2"),
      (lambda t: _reshape(t, "lora_A.default", (3, 4)), r"adapter of layer is \[5, 2\] by \[3, 4\]; rank 2"),
      (lambda t: _reshape(t, "lora_A.default", (2, 5)), r"adapter of layer is \[5, 2\] by \[2, 5\]; rank 2"),
      (lambda t: _reshape(t, "base_layer", ()), r"adapter of layer belongs to a weight of \[\]; expected a matrix"),
      (lambda t: _reshape(t, "base_layer", (5,)), r"a weight of \[5\]; expected a matrix"),
      (lambda t: _reshape(t, "base_layer", (5, 4, 1)), r"a weight of \[5, 4, 1\]; expected a matrix"),
    ],
  )
  def test_faults(self, change, message):
    tensors = _adapted()
    change(tensors)
    with pytest.raises(ConfigError, match=message):
      peft_merge.merged(tensors, rank=2, alpha=4)
