"""float32 means float32: what is lowered for accelerators, and the dtypes that programs choose."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.chunk_step import chunk_step
from streamt1_jax.cli import command, compare, device_flags, generate, score
from streamt1_jax.config import SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.measuring import compiled_step, device_sizes
from streamt1_jax.nn import precision
from streamt1_jax.rewards import coherence
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.qwen2_vl import preprocess
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.table import REWARDS
from tests import small_rewards

_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))
_FRAMES = jax.ShapeDtypeStruct((6, 32, 32, 3), jnp.uint8)
_TOKENS = PromptTokens(np.arange(3, dtype=np.int32), np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32))
_HEADS = {"hpsv3": ["16x12", "12x6", "6x2"], "videoalign": ["16x1"]}
"""Shapes of the kernels of the small heads."""


def _products(judge, platform: str, *arguments) -> list[tuple[str, str]]:
  """Shape of the second factor, and precision, of every product in the program for a platform."""
  # As in a program that asks for nothing: the tests ask for exact products.
  with jax.default_matmul_precision("default"):
    text = jax.export.export(jax.jit(judge), platforms=[platform])(*arguments).mlir_module()
  lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  shape = lambda line: re.findall(r"tensor<([\dx]*)x[bf]+\d+>", line)[1]
  precision = lambda line: (re.findall(r"precision = \[(\w+), \1\]", line) or ["DEFAULT"])[0]
  return [(shape(line), precision(line)) for line in lines]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", _HEADS)
def test_heads(platform, name):
  """The products of the heads are exact, in a backbone of bfloat16 whose products are not."""
  config, spec = small_rewards.CONFIGS[name], REWARDS[name]
  reward, params = spec.make(config, 16.0), spec.weight_shapes(config, jnp.bfloat16)
  tokens = _TOKENS._replace(reward_index=_TOKENS.reward_index[: len(spec.required_text.reward_tokens)])

  def judge(params, frames):
    seen = frames if spec.on_frames else FrameWindow(frames[:0], 0, frames)
    return reward(params, reward.init(params, tokens), seen, _INFO)

  products = _products(judge, platform, params, _FRAMES)
  for kernel in _HEADS[name]:
    assert {precision for shape, precision in products if shape == kernel} == {"HIGHEST"}, products
  assert sum(precision == "DEFAULT" for _, precision in products) > 10


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_resizing_of_videoalign(platform):
  """Bytes that are rounded from sums: both directions of the resize are products."""
  precisions = [precision for _, precision in _products(lambda x: preprocess.resize(x, (28, 28)), platform, _FRAMES)]
  assert set(precisions) == {"HIGHEST"}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_coherence(platform):
  """The built-in video reward is float32 everywhere."""
  reward = coherence.SPEC.make(None, 16.0)
  judge = lambda frames: reward({}, (), FrameWindow(frames[:3], 3, frames[3:]), _INFO)
  precisions = {precision for _, precision in _products(judge, platform, _FRAMES)}
  assert precisions == {"HIGHEST"}


def test_a_model_of_float32():
  """Also for those who load it in Python and set nothing: attention, batched late, and convolutions included."""
  search = SearchConfig.released(max_sink_frames=3)
  model = device_sizes.SIZES["small"]().video
  program = compiled_step.build(model, search, Execution(attention="fold"), jnp.float32, None)
  step = functools.partial(chunk_step, models=program.models, search=search, first=False)
  with jax.default_matmul_precision(None):
    text = jax.export.export(jax.jit(step), platforms=["tpu", "cuda"])(*program.arguments).mlir_module()
  lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
  assert len(lines) > 40
  assert [line for line in lines if line.count("HIGHEST") < 2] == []


def test_a_precision_that_was_chosen_stays():
  weights = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
  chosen = lambda: jax.config.jax_default_matmul_precision
  with jax.default_matmul_precision(None), precision.of_weights(weights):
    assert chosen() == "highest"
  with jax.default_matmul_precision("tensorfloat32"), precision.of_weights(weights):
    assert chosen() == "tensorfloat32"
  narrow = weights | {"bias": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
  with jax.default_matmul_precision(None), precision.of_weights(narrow):
    assert chosen() is None


class TestDefaults:
  @pytest.mark.parametrize(
    ("module", "flags"), [(generate, ["--prompt=a"]), (score, ["--videos=a"]), (compare, ["--output=a"])]
  )
  def test_by_platform(self, module, flags):
    """Nothing is chosen before the devices are known; on these it is float32, and the help says so."""
    values = command.parse(module.define_flags, flags)
    assert values.dtype is None
    assert device_flags.use_dtype(values.dtype) == "float32"
    assert "float32 on CPUs, and bfloat16 on TPUs and GPUs" in " ".join(values["dtype"].help.split())
    assert device_flags.use_dtype(command.parse(module.define_flags, [*flags, "--dtype=bfloat16"]).dtype) == "bfloat16"

  def test_on_accelerators(self, monkeypatch):
    """The platform's name is all that an accelerator is to this function."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    before = jax.config.values["jax_default_matmul_precision"]
    jax.config.update("jax_default_matmul_precision", None)
    try:
      assert device_flags.use_dtype(None) == "bfloat16"
      assert device_flags.use_dtype("bfloat16") == "bfloat16"
      assert jax.config.values["jax_default_matmul_precision"] is None
      assert device_flags.use_dtype("float32") == "float32"
      assert jax.config.values["jax_default_matmul_precision"] == "highest"
    finally:
      jax.config.update("jax_default_matmul_precision", before)
