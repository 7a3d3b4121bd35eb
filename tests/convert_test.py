"""The converter: transforms, both UMT5 tables, and every error it can report."""

import math
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from streamt1_jax.config import ConfigError, TextConfig, preset
from streamt1_jax.convert import engine
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.tables import umt5
from streamt1_jax.convert.transforms import (
  CONV2D,
  CONV3D,
  IDENTITY,
  LINEAR,
  Chain,
  Merge,
  Reorder,
  Squeeze,
  gamma,
  patch_embedding,
  pointwise,
)
from streamt1_jax.text.umt5 import UMT5Encoder

SMALL = TextConfig(
  vocab_size=11, dim=6, attn_dim=8, ffn_dim=10, num_heads=2, num_layers=3, num_buckets=8, max_distance=16
)
WAN = Flavour("text", "Wan", umt5.WAN_RULES, umt5.abstract_params(SMALL))
HUGGING_FACE = Flavour("text", "Hugging Face", umt5.HF_RULES, umt5.abstract_params(SMALL), umt5.HF_ALIASES)

RULES = (
  Rule("embedding.weight", "embedding"),
  Rule("layers.{layer}.weight", "layers.kernel", LINEAR),
  Rule("layers.{layer}.bias", "layers.bias"),
)
PARAMS = {
  "embedding": jax.ShapeDtypeStruct((5, 4), jnp.float32),
  "layers": {
    "kernel": jax.ShapeDtypeStruct((2, 4, 3), jnp.float32),
    "bias": jax.ShapeDtypeStruct((2, 3), jnp.float32),
  },
}


def random_tensors(specs, seed: int = 0) -> dict[str, np.ndarray]:
  generator = np.random.default_rng(seed)
  return {name: generator.normal(size=spec.shape).astype(spec.dtype) for name, spec in specs.items()}


def checkpoint() -> dict[str, np.ndarray]:
  return random_tensors(engine.source_specs(RULES, PARAMS))


def errors_of(tensors, rules=RULES, ignore=()) -> list[str]:
  """Lines of the one ConfigError, the summary first."""
  with pytest.raises(ConfigError) as caught:
    engine.convert(tensors, rules, PARAMS, ignore=ignore)
  return str(caught.value).splitlines()


class TestTransforms:
  @pytest.mark.parametrize(
    ("transform", "shape", "converted"),
    [
      (IDENTITY, (2, 3), (2, 3)),
      (LINEAR, (2, 3), (3, 2)),
      (CONV2D, (7, 5, 2, 3), (2, 3, 5, 7)),
      (CONV3D, (7, 5, 4, 2, 3), (4, 2, 3, 5, 7)),
      (gamma(3), (4, 1, 1, 1), (4,)),
      (pointwise(3), (7, 5, 1, 1, 1), (5, 7)),
      (patch_embedding(2), (7, 5, 1, 2, 2), (20, 7)),
      (Squeeze((0,)), (1, 6, 4), (6, 4)),
      (Merge((2, -1)), (2, 3, 4), (6, 4)),
      (Reorder((2, 0, 1)), (4, 3), (4, 3)),
      (Chain((LINEAR, Reorder((1, 2, 0)))), (3, 5), (5, 3)),
    ],
  )
  def test_inverse_is_exact(self, transform, shape, converted):
    tensor = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    array = transform.forward(tensor)
    assert array.shape == converted
    np.testing.assert_array_equal(transform.inverse(array), tensor)
    assert jax.eval_shape(transform.inverse, array).shape == shape

  def test_linear_computes_the_same(self):
    weight, x = np.random.default_rng(0).normal(size=(3, 5)), np.arange(5.0)
    np.testing.assert_allclose(x @ LINEAR.forward(weight), weight @ x)

  def test_convolution_kernels_compute_the_same(self):
    kernel = np.random.default_rng(0).normal(size=(4, 3, 2, 2, 2))
    volume = np.random.default_rng(1).normal(size=(3, 2, 2, 2))
    by_hand = np.einsum("oithw,ithw->o", kernel, volume)
    np.testing.assert_allclose(np.einsum("thwio,ithw->o", CONV3D.forward(kernel), volume), by_hand)
    plane = np.einsum("oihw,ihw->o", kernel[:, :, 0], volume[:, 0])
    np.testing.assert_allclose(np.einsum("hwio,ihw->o", CONV2D.forward(kernel[:, :, 0]), volume[:, 0]), plane)

  def test_patch_embedding_computes_the_strided_convolution(self):
    generator = np.random.default_rng(0)
    kernel, patch = generator.normal(size=(6, 3, 1, 2, 2)), generator.normal(size=(3, 2, 2))
    flat = patch.transpose(1, 2, 0).reshape(-1)  # row, column, channel
    expected = np.einsum("ocxhw,chw->o", kernel, patch)
    np.testing.assert_allclose(flat @ patch_embedding(2).forward(kernel), expected)

  def test_reorder_names_the_checkpoints_channels(self):
    np.testing.assert_array_equal(Reorder((2, 0, 1)).forward(np.array([10, 11, 12])), [12, 10, 11])


class TestConvert:
  def test_places_every_tensor(self):
    tensors = checkpoint()
    params = engine.convert(tensors, RULES, PARAMS)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(params["embedding"], tensors["embedding.weight"])
    for layer in range(2):
      np.testing.assert_array_equal(params["layers"]["kernel"][layer], tensors[f"layers.{layer}.weight"].T)
      np.testing.assert_array_equal(params["layers"]["bias"][layer], tensors[f"layers.{layer}.bias"])

  def test_round_trip_is_bitwise(self):
    tensors = checkpoint()
    back = engine.invert(engine.convert(tensors, RULES, PARAMS), RULES)
    assert back.keys() == tensors.keys()
    for name, array in back.items():
      assert array.flags.c_contiguous
      np.testing.assert_array_equal(array, tensors[name])

  @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
  def test_dtype(self, dtype):
    tensors = checkpoint()
    params = engine.convert(tensors, RULES, PARAMS, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(params["embedding"], tensors["embedding.weight"].astype(dtype))

  def test_bfloat16_checkpoint_fills_float32_parameters(self):
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in checkpoint().items()}
    params = engine.convert(tensors, RULES, PARAMS)
    assert params["embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["embedding"], tensors["embedding.weight"].astype(np.float32))

  def test_ignored_names_may_be_present_or_not(self):
    tensors = checkpoint() | {"critic.in": np.zeros(3), "critic.out": np.zeros(3)}
    engine.convert(tensors, RULES, PARAMS, ignore=("critic.*", "absent.*"))
    assert errors_of(tensors, ignore=("critic.i*",))[1:] == ["  unknown: critic.out"]

  def test_keys_of_module_lists_are_kept(self):
    params = {"layers": {0: {"bias": jax.ShapeDtypeStruct((2,), jnp.float32)}}}
    converted = engine.convert({"bias": np.ones(2)}, (Rule("bias", "layers.0.bias"),), params)
    np.testing.assert_array_equal(converted["layers"][0]["bias"], [1, 1])


class TestErrors:
  def test_unknown_names_the_nearest(self):
    tensors = checkpoint() | {"other": np.zeros(1)}
    tensors["layers.1.wieght"] = tensors.pop("layers.1.weight")
    assert errors_of(tensors) == [
      "the checkpoint does not fit the model: 2 unknown, 1 missing",
      "  unknown: other",
      "  unknown: layers.1.wieght (nearest: layers.1.weight)",
      "  missing: layers.1.weight (for layers.kernel[1])",
    ]

  def test_one_layer_too_few_or_too_many(self):
    few = {name: array for name, array in checkpoint().items() if not name.startswith("layers.1.")}
    assert errors_of(few)[0].endswith(": 2 missing")
    many = checkpoint() | {"layers.2.weight": np.zeros((3, 4)), "layers.2.bias": np.zeros(3)}
    assert errors_of(many)[0].endswith(": 2 unknown")

  def test_misshapen(self):
    tensors = checkpoint()
    tensors["layers.0.weight"] = tensors["layers.0.weight"].T
    assert errors_of(tensors)[1:] == ["  misshapen: layers.0.weight is [4, 3], expected [3, 4]"]

  def test_wrongly_typed(self):
    tensors = checkpoint()
    tensors["layers.0.bias"] = np.zeros(3, np.int64)
    assert errors_of(tensors)[1:] == ["  wrongly typed: layers.0.bias is int64, expected a type like float32"]

  def test_all_kinds_are_reported_at_once(self):
    tensors = checkpoint() | {"strange": np.zeros(1)}
    tensors["layers.0.bias"] = np.zeros(4, np.int32)
    del tensors["embedding.weight"]
    report = errors_of(tensors)
    assert report[0].endswith(": 1 unknown, 1 missing, 1 misshapen, 1 wrongly typed")
    assert len(report) == 5

  def test_faults_of_the_table(self):
    rules = (
      *RULES[1:],
      Rule("layers.0.weight", "embedding"),
      Rule("again", "layers.bias"),
      Rule("lost", "layers.bais"),
    )
    report = "\n".join(errors_of(checkpoint(), rules))
    assert "name with two rules: layers.0.weight: layers.kernel[0] and embedding" in report
    assert "parameter with two rules: layers.bias: layers.{layer}.bias and again" in report
    assert "rule without a parameter: lost -> layers.bais (nearest: layers.bias)" in report
    with pytest.raises(ConfigError, match="parameter without a rule: embedding"):
      engine.source_specs(RULES[1:], PARAMS)
    with pytest.raises(ConfigError, match="parameter without a rule: embedding"):
      engine.invert(engine.convert(checkpoint(), RULES, PARAMS), RULES[1:])

  def test_transform_that_cannot_fit(self):
    with pytest.raises(ConfigError, match="cannot produce layers.bias"):
      engine.source_specs((*RULES[:2], Rule("layers.{layer}.bias", "layers.bias", LINEAR)), PARAMS)

  def test_long_lists_are_counted(self):
    report = errors_of(checkpoint() | {f"extra.{index}": np.zeros(1) for index in range(50)})
    assert report[0].endswith(": 50 unknown")
    assert report[-1] == "  unknown: and 30 more"
    assert len(report) == 22


class TestUMT5:
  @pytest.mark.parametrize("rules", [umt5.WAN_RULES, umt5.HF_RULES])
  def test_full_size(self, rules):
    specs = engine.source_specs(rules, umt5.abstract_params(preset("wan_1_3b").text))
    assert len(specs) == 242
    assert sum(math.prod(spec.shape) for spec in specs.values()) == 5_680_910_336
    engine.check(specs, rules, umt5.abstract_params(preset("wan_1_3b").text))

  def test_published_names_and_shapes(self):
    wan = engine.source_specs(umt5.WAN_RULES, umt5.abstract_params(preset("wan_1_3b").text))
    hf = engine.source_specs(umt5.HF_RULES, umt5.abstract_params(preset("wan_1_3b").text))
    attention, feed_forward = "encoder.block.23.layer.0", "encoder.block.23.layer.1"
    for wan_name, hf_name, shape in (
      ("token_embedding.weight", "shared.weight", (256384, 4096)),
      ("blocks.23.norm1.weight", f"{attention}.layer_norm.weight", (4096,)),
      ("blocks.23.attn.q.weight", f"{attention}.SelfAttention.q.weight", (4096, 4096)),
      ("blocks.23.attn.o.weight", f"{attention}.SelfAttention.o.weight", (4096, 4096)),
      (
        "blocks.23.pos_embedding.embedding.weight",
        f"{attention}.SelfAttention.relative_attention_bias.weight",
        (32, 64),
      ),
      ("blocks.23.norm2.weight", f"{feed_forward}.layer_norm.weight", (4096,)),
      ("blocks.23.ffn.gate.0.weight", f"{feed_forward}.DenseReluDense.wi_0.weight", (10240, 4096)),
      ("blocks.23.ffn.fc1.weight", f"{feed_forward}.DenseReluDense.wi_1.weight", (10240, 4096)),
      ("blocks.23.ffn.fc2.weight", f"{feed_forward}.DenseReluDense.wo.weight", (4096, 10240)),
      ("norm.weight", "encoder.final_layer_norm.weight", (4096,)),
    ):
      assert wan[wan_name].shape == hf[hf_name].shape == shape

  @pytest.mark.parametrize("flavour", [WAN, HUGGING_FACE], ids=["Wan", "Hugging Face"])
  def test_round_trip(self, flavour):
    tensors = random_tensors(flavour.specs)
    back = flavour.invert(flavour.convert(tensors))
    assert back.keys() == tensors.keys()
    for name, array in back.items():
      np.testing.assert_array_equal(array, tensors[name])

  def test_both_sets_of_names_mean_the_same(self):
    """Tensor by tensor, by the published list of both names."""
    tensors = random_tensors(WAN.specs)
    rows = (pathlib.Path(__file__).parent / "published_keys" / "umt5.tsv").read_text().splitlines()
    translation = {wan: theirs for theirs, wan, _ in (row.split("\t") for row in rows)}
    renamed = {translation[name]: tensor for name, tensor in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, HUGGING_FACE.convert(renamed), WAN.convert(tensors))

  def test_either_name_of_the_tied_embedding(self):
    tensors = random_tensors(HUGGING_FACE.specs)
    both = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    alias = {name: array for name, array in both.items() if name != "shared.weight"}
    expected = HUGGING_FACE.convert(tensors)
    for variant in (both, alias):
      jax.tree.map(np.testing.assert_array_equal, HUGGING_FACE.convert(variant), expected)

  def test_state_of_a_module_is_accepted(self):
    _, state = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(SMALL, nnx.Rngs(0))), nnx.Param)
    tensors = random_tensors(engine.source_specs(umt5.WAN_RULES, state))
    jax.tree.map(np.testing.assert_array_equal, engine.convert(tensors, umt5.WAN_RULES, state), WAN.convert(tensors))
