"""Reward models with kernels in int8: what is stored, what products see of it, and how far scores move."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint
from streamt1_jax.nn import quantised
from streamt1_jax.nn.quantised import QuantisedKernel, is_quantised
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.hpsv3 import HPSv3
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from tests import small_rewards

_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))
each_reward = pytest.mark.parametrize("name", ["hpsv3", "videoalign"])


def _by_hand(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Integers and scales of kernels [..., in, out], one output channel after the other."""
  integers, scales = np.empty(kernel.shape, np.int8), np.empty(kernel.shape[:-2] + kernel.shape[-1:], np.float32)
  for index in np.ndindex(scales.shape):
    column = (*index[:-1], slice(None), index[-1])
    scales[index] = np.abs(kernel[column]).max() / np.float32(127)
    integers[column] = np.round(kernel[column] / scales[index])
  return integers, scales


def _by_path(params, is_leaf=None):
  leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  parent = tmp_path_factory.mktemp("rewards")
  return {name: small_rewards.save_reward(parent / name, name) for name in small_rewards.CONFIGS}


@each_reward
def test_what_is_loaded(folders, name):
  """Integers and scales are those of the stored kernels, to the last bit. All else is what bfloat16 loads."""
  stored = _by_path(small_rewards.random_params(small_rewards.CONFIGS[name]))
  in_bfloat16 = _by_path(folder.load_reward(folders[name], fps=8.0, dtype=jnp.bfloat16).params)
  params = _by_path(folder.load_reward(folders[name], fps=8.0, dtype=jnp.int8).params, is_quantised)
  assert params.keys() == stored.keys()
  for path, leaf in params.items():
    in_int8 = path.startswith("backbone") and path.endswith("kernel") and "patch_embedding" not in path
    assert is_quantised(leaf) == in_int8, path
    if in_int8:
      integers, scales = _by_hand(stored[path])
      np.testing.assert_array_equal(leaf.values, integers)
      np.testing.assert_array_equal(leaf.scale, scales)
    else:
      assert leaf.dtype == in_bfloat16[path].dtype
      np.testing.assert_array_equal(leaf, in_bfloat16[path])


def _linear(kernel: jax.Array | QuantisedKernel, bias: jax.Array, x: jax.Array) -> jax.Array:
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: quantised.Linear(*x.shape[-1:], *bias.shape, rngs=nnx.Rngs(0))))
  return nnx.merge(graphdef, {"kernel": kernel, "bias": bias})(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_see_the_quantised_kernel(dtype):
  """Unit vectors read kernels row by row: integer times scale, rounded once, to the dtype of the activations."""
  kernels = np.random.default_rng(0).normal(size=(3, 24, 40)).astype(np.float32)
  integers, scales = _by_hand(kernels)
  expected = integers * scales[:, None]
  assert (np.abs(expected - kernels) <= 0.5001 * scales[:, None]).all()
  stack = QuantisedKernel(jnp.asarray(integers), jnp.asarray(scales))
  read = lambda _, kernel: (None, _linear(kernel, jnp.zeros(40, dtype), jnp.eye(24, dtype=dtype)))
  _, found = jax.jit(lambda stack: jax.lax.scan(read, None, stack))(stack)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, jnp.asarray(expected, dtype))


def _scores(loaded: folder.LoadedReward, params) -> np.ndarray:
  """Scores of two videos."""
  videos = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 4, 20, 30, 3)), jnp.uint8)
  tokens = loaded.prompt("a red circle moves left")

  @jax.jit
  def judge(params):
    condition = loaded.reward.init(params, tokens)
    show = (lambda chunk: chunk) if isinstance(loaded.reward, HPSv3) else lambda chunk: FrameWindow(chunk[:0], 0, chunk)
    return jax.vmap(lambda chunk: loaded.reward(params, condition, show(chunk), _INFO))(videos)

  return np.asarray(judge(params))


@each_reward
def test_models_compute_with_the_quantised_kernels(folders, name):
  """The whole model in float32 scores as one whose kernels numpy quantised and widened: no kernel is left out."""
  loaded = folder.load_reward(folders[name], fps=8.0, dtype=jnp.float32)
  wanted = small_rewards.abstract_params(small_rewards.CONFIGS[name], jnp.int8)

  def convert(make):
    each = lambda leaf, weights: make(*_by_hand(np.asarray(weights))) if is_quantised(leaf) else weights
    return jax.tree.map(each, wanted, loaded.params, is_leaf=is_quantised)

  in_int8 = _scores(
    loaded, convert(lambda integers, scales: QuantisedKernel(jnp.asarray(integers), jnp.asarray(scales)))
  )
  widened = _scores(loaded, convert(lambda integers, scales: jnp.asarray(integers * scales[..., None, :])))
  exact = _scores(loaded, loaded.params)
  np.testing.assert_allclose(in_int8, widened, rtol=0, atol=1e-5)
  # Kernels of 16 channels: a rounding error of 1/254 of the largest weight, over a dozen layers.
  assert 1e-4 < np.abs(in_int8 - exact).max() < 0.1 * np.abs(exact).max()


def test_on_a_mesh(folders):
  """Values are divided as a kernel of floats would be, scales with their channels; prompts are embedded on the host."""
  mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 1, 2, 1), device_mesh.MESH_AXES)
  alone = folder.load_reward(folders["hpsv3"], fps=8.0, dtype=jnp.int8)
  divided = folder.load_reward(folders["hpsv3"], fps=8.0, dtype=jnp.int8, mesh=mesh, embed_on_host=True)
  decoder = divided.params["backbone"]["decoder"]
  assert decoder["token_embedding"].shape == (0, 16)
  expected = loading.with_table(alone.params, decoder["token_embedding"])
  jax.tree.map(np.testing.assert_array_equal, expected, divided.params)
  blocks = decoder["blocks"]
  assert blocks["gate"]["kernel"].values.sharding.spec == PartitionSpec(None, None, "model")
  assert blocks["gate"]["kernel"].scale.sharding.spec == PartitionSpec(None, "model")
  assert blocks["down"]["kernel"].values.sharding.spec == PartitionSpec(None, "model", None)
  assert blocks["down"]["kernel"].scale.sharding.spec == PartitionSpec(None, None)
  # Sums of bfloat16 products in another order.
  np.testing.assert_allclose(_scores(divided, divided.params), _scores(alone, alone.params), rtol=0.02, atol=0.02)


def test_one_layer_at_a_time_is_widened():
  """What a call needs in between does not grow with the layers, whose kernels the compiler could all widen at once."""
  reward, layers = small_rewards.CONFIGS["hpsv3"], (2, 12)
  frames = jax.ShapeDtypeStruct((3, 20, 30, 3), jnp.uint8)
  tokens = PromptTokens(*(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (3, 4, 1)))

  def temporary_bytes(num_layers: int) -> int:
    wide = lambda part: dataclasses.replace(part, dim=128, ffn_dim=512, num_layers=num_layers)
    backbone = dataclasses.replace(
      reward.backbone, vision=wide(reward.backbone.vision), decoder=wide(reward.backbone.decoder)
    )
    deep = HPSv3(dataclasses.replace(reward, backbone=backbone))
    judge = lambda params, tokens, frames: deep(params, deep.init(params, tokens), frames, _INFO)
    compiled = jax.jit(judge).lower(small_rewards.abstract_params(deep.config, jnp.int8), tokens, frames).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = map(temporary_bytes, layers)
  assert many - few < 0.1 * (layers[1] - layers[0]) * 2 * 3 * 128 * 512


def test_channels_of_zeros_and_of_denormals():
  kernel = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  kernel[:, 1], kernel[:, 2] = 0, np.finfo(np.float32).smallest_subnormal
  found = quantised.quantise(kernel)
  np.testing.assert_array_equal(found.values[:, 1:3], 0)
  assert np.isfinite(1 / found.scale).all()
  np.testing.assert_array_equal(found.values[:, [0, 3]], _by_hand(kernel[:, [0, 3]])[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path, monkeypatch, value):
  monkeypatch.setattr(checkpoint, "check_finite", lambda *_: None)
  kernel = np.ones((2, 8, 4), np.float32)
  kernel[1, 3, 2] = value
  checkpoint.save_params(tmp_path / "part", {"layer": {"kernel": kernel}})
  monkeypatch.undo()
  abstract = {"layer": {"kernel": quantised.abstract_kernel(jax.ShapeDtypeStruct(kernel.shape, jnp.float32))}}
  with pytest.raises(ConfigError, match=re.escape("NaN or Inf in") + ".*layer/kernel$"):
    checkpoint.load_params(tmp_path / "part", abstract)
