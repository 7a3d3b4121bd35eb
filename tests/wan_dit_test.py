"""The causal DiT's mapping tables against the published names, and the LoRA merge."""

import dataclasses
import math

import jax
import ml_dtypes
import numpy as np
import pytest

from streamt1_jax.config import ConfigError, preset
from streamt1_jax.convert import adapters
from streamt1_jax.convert.tables import wan_dit
from streamt1_jax.convert.transforms import LINEAR
from tests import small_search as small

# Published names with their shapes (docs/reference/wan_dit.md).
# M width, H feed-forward width, E text, Q timestep features.
LINEAR_LAYERS = [
  ("text_embedding.0", "condition_embedder.text_embedder.linear_1", "ME"),
  ("text_embedding.2", "condition_embedder.text_embedder.linear_2", "MM"),
  ("time_embedding.0", "condition_embedder.time_embedder.linear_1", "MQ"),
  ("time_embedding.2", "condition_embedder.time_embedder.linear_2", "MM"),
  ("time_projection.1", "condition_embedder.time_proj", "6M M"),
  ("head.head", "proj_out", "O M"),
]
BLOCK_LINEAR_LAYERS = [
  ("self_attn.q", "attn1.to_q", "MM"),
  ("self_attn.k", "attn1.to_k", "MM"),
  ("self_attn.v", "attn1.to_v", "MM"),
  ("self_attn.o", "attn1.to_out.0", "MM"),
  ("cross_attn.q", "attn2.to_q", "MM"),
  ("cross_attn.k", "attn2.to_k", "MM"),
  ("cross_attn.v", "attn2.to_v", "MM"),
  ("cross_attn.o", "attn2.to_out.0", "MM"),
  ("ffn.0", "ffn.net.0.proj", "HM"),
  ("ffn.2", "ffn.net.2", "MH"),
]
BLOCK_VECTORS = [
  ("self_attn.norm_q.weight", "attn1.norm_q.weight"),
  ("self_attn.norm_k.weight", "attn1.norm_k.weight"),
  ("cross_attn.norm_q.weight", "attn2.norm_q.weight"),
  ("cross_attn.norm_k.weight", "attn2.norm_k.weight"),
  ("norm3.weight", "norm2.weight"),
  ("norm3.bias", "norm2.bias"),
]


WAN = wan_dit.wan_flavour(small.MODEL)


def _published(config):
  """Rows (Wan's name, diffusers' name, shape) of every tensor."""
  m, channels = config.dim, config.latent_channels
  size = {"M": m, "H": config.ffn_dim, "E": config.text_dim, "Q": config.freq_dim, "6M": 6 * m}
  size["O"] = channels * config.patch_size**2
  shape = lambda letters: tuple(size[x] for x in (letters.split() if " " in letters else letters))
  rows = [
    ("patch_embedding.weight", "patch_embedding.weight", (m, channels, 1, config.patch_size, config.patch_size)),
    ("patch_embedding.bias", "patch_embedding.bias", (m,)),
    ("head.modulation", "scale_shift_table", (1, 2, m)),
  ]
  layers = [(wan, theirs, shape(letters)) for wan, theirs, letters in LINEAR_LAYERS]
  for layer in range(config.num_layers):
    at = f"blocks.{layer}."
    rows.append((f"{at}modulation", f"{at}scale_shift_table", (1, 6, m)))
    rows += [(at + wan, at + theirs, (m,)) for wan, theirs in BLOCK_VECTORS]
    layers += [(at + wan, at + theirs, shape(letters)) for wan, theirs, letters in BLOCK_LINEAR_LAYERS]
  for wan, theirs, (outputs, inputs) in layers:
    rows.append((f"{wan}.weight", f"{theirs}.weight", (outputs, inputs)))
    rows.append((f"{wan}.bias", f"{theirs}.bias", (outputs,)))
  return rows


def _random(specs, seed=0):
  generator = np.random.default_rng(seed)
  return {name: generator.standard_normal(spec.shape).astype(np.float32) for name, spec in specs.items()}


def _wan_tensors(model=small.MODEL):
  return _random(wan_dit.wan_flavour(model).specs)


class TestFullSize:
  MODEL = preset("wan_1_3b")

  def test_parameters(self):
    leaves = jax.tree.leaves(wan_dit.abstract_params(self.MODEL))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 1_418_996_800

  @pytest.mark.parametrize("column", [0, 1], ids=["wan", "diffusers"])
  def test_names_and_shapes(self, column):
    specs = (wan_dit.wan_flavour, wan_dit.diffusers_flavour)[column](self.MODEL).specs
    published = {row[column]: row[2] for row in _published(self.MODEL.backbone)}
    assert len(published) == 27 * 30 + 15 == 825
    assert {name: spec.shape for name, spec in specs.items()} == published

  def test_every_name_translates(self):
    for wan, theirs, _ in _published(self.MODEL.backbone):
      assert wan_dit.diffusers_name(wan) == theirs

  def test_adapter(self):
    """Rank 256 on ten layers of 30 blocks: 600 tensors, 349,962,240 numbers (docs/reference/checkpoints.md)."""
    size = {"M": 1536, "H": 8960}
    expected = {}
    for layer in range(30):
      for wan, _, letters in BLOCK_LINEAR_LAYERS:
        name = f"base_model.model.blocks.{layer}.{wan}"
        outputs, inputs = (size[x] for x in letters)
        expected[f"{name}.lora_A.weight"] = (256, inputs)
        expected[f"{name}.lora_B.weight"] = (outputs, 256)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in expected.items()}
    assert len(tensors) == 600
    assert sum(math.prod(shape) for shape in expected.values()) == 349_962_240
    wan, diffusers = wan_dit.wan_flavour(self.MODEL), wan_dit.diffusers_flavour(self.MODEL)
    for flavour, column in ((wan, 0), (diffusers, 1)):
      layers, rank = adapters.fit(tensors, flavour, (wan, diffusers), "an adapter")
      assert rank == 256
      assert layers.keys() == {
        f"blocks.{layer}.{row[column]}.weight" for layer in range(30) for row in BLOCK_LINEAR_LAYERS
      }


class TestConvert:
  def test_wan_round_trip(self):
    tensors = _wan_tensors()
    back = WAN.invert(WAN.convert(tensors))
    assert back.keys() == tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, back, tensors)

  def test_both_sets_of_names_mean_the_same(self):
    tensors = _wan_tensors()
    translation = {wan: theirs for wan, theirs, _ in _published(small.MODEL.backbone)}
    renamed = {translation[name]: tensor for name, tensor in tensors.items()}
    diffusers = wan_dit.diffusers_flavour(small.MODEL)
    jax.tree.map(np.testing.assert_array_equal, diffusers.convert(renamed), WAN.convert(tensors))

  def test_only_rotated_channels_are_reordered(self):
    """Pairs (0, 1), (2, 3), ... of a head of 12 become (0, 6), (1, 7), ...; head by head, in queries and keys alone."""
    tensors = _wan_tensors()
    blocks = WAN.convert(tensors)["blocks"]
    head = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    order = head + [12 + channel for channel in head]
    for ours, wan in (("query", "q"), ("key", "k")):
      projection, source = blocks["self_attention"], "blocks.1.self_attn"
      np.testing.assert_array_equal(projection[ours]["kernel"][1], tensors[f"{source}.{wan}.weight"].T[:, order])
      np.testing.assert_array_equal(projection[ours]["bias"][1], tensors[f"{source}.{wan}.bias"][order])
      np.testing.assert_array_equal(
        projection[f"{ours}_norm"]["scale"][1], tensors[f"{source}.norm_{wan}.weight"][order]
      )
      cross = blocks["cross_attention"][ours]
      np.testing.assert_array_equal(cross["kernel"][1], tensors[f"blocks.1.cross_attn.{wan}.weight"].T)
    value = blocks["self_attention"]["value"]["kernel"]
    np.testing.assert_array_equal(value[1], tensors["blocks.1.self_attn.v.weight"].T)

  def test_bfloat16(self):
    params = WAN.convert(_wan_tensors(), ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}

  def test_another_depth_is_refused(self):
    deeper = dataclasses.replace(
      small.MODEL, backbone=dataclasses.replace(small.MODEL.backbone, num_layers=small.MODEL.backbone.num_layers + 1)
    )
    with pytest.raises(ConfigError, match="27 missing"):
      wan_dit.wan_flavour(deeper).convert(_wan_tensors())

  def test_foreign_name(self):
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.q"):
      wan_dit.diffusers_name("blocks.0.attn.q.weight")


def _adapter(rank=3, seed=1):
  config = small.MODEL.backbone
  size = {"M": config.dim, "H": config.ffn_dim}
  generator, tensors = np.random.default_rng(seed), {}
  for layer in range(config.num_layers):
    for wan, _, letters in BLOCK_LINEAR_LAYERS:
      outputs, inputs = (size[x] for x in letters)
      name = f"base_model.model.blocks.{layer}.{wan}"
      tensors[f"{name}.lora_A.weight"] = generator.standard_normal((rank, inputs)).astype(np.float32)
      tensors[f"{name}.lora_B.weight"] = generator.standard_normal((outputs, rank)).astype(np.float32)
  return tensors


def _fit(adapter, *, backbone=WAN):
  return adapters.fit(adapter, backbone, [WAN, wan_dit.diffusers_flavour(small.MODEL)], "an adapter")


def _merged(tensors, adapter, scale):
  layers, rank = _fit(adapter)
  return adapters.merged(tensors, adapters.Adapter(layers, rank, scale * rank, scale, [], []))


class TestLora:
  SCALE = 2.5

  def test_merge_is_weight_plus_scaled_product(self):
    """In the checkpoint's own layout, tensor by tensor: W + scale * B A; nothing else changes."""
    tensors, adapter = _wan_tensors(), _adapter()
    merged = _merged(tensors, adapter, self.SCALE)
    assert merged.keys() == tensors.keys()
    changed = 0
    for name, tensor in tensors.items():
      key = f"base_model.model.{name.removesuffix('.weight')}"
      if f"{key}.lora_A.weight" not in adapter:
        assert merged[name] is tensor
        continue
      product = adapter[f"{key}.lora_B.weight"].astype(np.float64) @ adapter[f"{key}.lora_A.weight"]
      expected = tensor.astype(np.float64) + self.SCALE * product
      np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-5)
      changed += 1
    assert changed == 20

  def test_bfloat16_weights_are_merged_in_float32(self):
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in _wan_tensors().items()}
    adapter, name = _adapter(), "blocks.1.ffn.0"
    merged = np.asarray(_merged(tensors, adapter, 0.5)[f"{name}.weight"])
    down, up = (adapter[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    assert merged.dtype == np.float32
    # Sums of three products of numbers around one, with the float32 rounding of each.
    np.testing.assert_allclose(
      merged, tensors[f"{name}.weight"].astype(np.float64) + 0.5 * up @ down, rtol=0, atol=1e-5
    )

  def test_other_linear_layers_may_be_adapted_too(self):
    config = small.MODEL.backbone
    a, b = np.ones((3, config.dim), np.float32), np.ones((config.latent_channels * config.patch_size**2, 3), np.float32)
    layers, rank = _fit({"head.head.lora_A.weight": a, "head.head.lora_B.weight": b})
    assert rank == 3
    assert layers["head.head.weight"] == (a, b)
    assert len(layers) == 1

  def test_a_flavour_of_another_layout(self):
    """An adapter cannot be merged into weights that keep their channels in another order."""
    rules = tuple(
      dataclasses.replace(rule, transform=LINEAR) if rule.path.endswith("self_attention.query.kernel") else rule
      for rule in WAN.rules
    )
    with pytest.raises(
      ConfigError, match=r"an adapter: Wan keeps blocks\.\{layer\}\.self_attn\.q\.weight in another layout"
    ):
      _fit(_adapter(), backbone=dataclasses.replace(WAN, names="other", rules=rules))

  def test_wrong_shapes(self):
    adapter = _adapter()
    for name, matrix in adapter.items():
      if name.endswith("blocks.0.ffn.2.lora_A.weight"):
        adapter[name] = matrix[:, 1:]
    with pytest.raises(ConfigError, match=r"1 misshapen\n.*blocks\.0\.ffn\.2\.lora_A"):
      _fit(adapter)

  def test_unknown_layer(self):
    with pytest.raises(ConfigError, match=r"unknown: blocks\.0\.gate\.lora_A"):
      _fit(_adapter() | {"blocks.0.gate.lora_A.weight": np.zeros((3, 4), np.float32)})

  def test_mixed_ranks(self):
    mixed = _adapter(3) | {
      name: x for name, x in _adapter(2).items() if name.startswith("base_model.model.blocks.0.ffn")
    }
    with pytest.raises(ConfigError, match=r"one rank, found \[2, 3\]"):
      _fit(mixed)

  def test_not_an_adapter(self):
    with pytest.raises(ConfigError, match="no lora_A"):
      _fit(_wan_tensors())

  def test_missing_tensor(self):
    adapter = _adapter()
    del adapter["base_model.model.blocks.1.cross_attn.o.lora_B.weight"]
    with pytest.raises(ConfigError, match=r"blocks\.1\.cross_attn\.o\.lora_B"):
      _fit(adapter)
