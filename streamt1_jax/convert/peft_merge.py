"""A peft checkpoint with unmerged adapters, read as if the adapters had been merged.

  base_model.model.<module>.base_layer.weight    [out, in]  ─┐
  base_model.model.<module>.lora_A.default.weight [r, in]    ├─ <module>.weight = base + scale * B A
  base_model.model.<module>.lora_B.default.weight [out, r]  ─┘
  base_model.model.<name>                                    ── <name>

A merged tensor is computed in float32 when it is read, one at a time, so that a large file is never in memory as a
whole. Mapping tables and the engine see an ordinary checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats.lazy import LazyTensor

PREFIX = "base_model.model."
_BASE = ".base_layer"
_WEIGHT = f"{_BASE}.weight"
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclasses.dataclass(frozen=True)
class MergedWeight:
  """base + scale * up @ down, float32, computed when it is turned into an array.

  Attributes:
    base: [out, in].
    down: [r, in].
    up: [out, r].
    scale: alpha / r.
  """

  base: Any
  down: Any
  up: Any
  scale: float

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.base.shape)

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float32)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Float[np.ndarray, "outputs inputs"]:
    base, down, up = (np.asarray(x).astype(np.float32) for x in (self.base, self.down, self.up))
    merged = base + np.float32(self.scale) * (up @ down)
    return merged if dtype is None else merged.astype(dtype)


Tensor: TypeAlias = LazyTensor | MergedWeight | np.ndarray
"""What is converted: in a file, computed from files, or in memory."""


def is_peft(names: Mapping[str, Any]) -> bool:
  """Whether a checkpoint has peft's names."""
  return any(name.startswith(PREFIX) for name in names)


def merged(tensors: Mapping[str, Any], rank: int, alpha: float) -> dict[str, Any]:
  """The checkpoint under the base model's names. Adapted weights become `MergedWeight`s; the others stay as they are.

  Args:
    tensors: the peft checkpoint.
    rank: the rank r that every adapter must have.
    alpha: numerator of the scale, alpha / r.

  Raises:
    ConfigError: a name lacks peft's prefix, a tensor is there twice, a base layer has no adapter or an adapter no base
      layer, or an adapter is incomplete, of another rank or of another shape than its base.
  """
  foreign = [name for name in tensors if not name.startswith(PREFIX)]
  if foreign:
    raise ConfigError(f"a peft checkpoint names every tensor {PREFIX}..., found {foreign[0]}")
  plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
  ends = (_WEIGHT, _DOWN, _UP)
  for module in sorted({name.removesuffix(end) for name in plain for end in ends if name.endswith(end)}):
    for end in ends:
      if module + end not in plain:
        raise ConfigError(f"the adapter of {module} is incomplete: {module}{end} is missing")
  result = {}
  for name, tensor in plain.items():
    if name.endswith((_DOWN, _UP)):
      continue
    module, _, kind = name.rpartition(".")
    base_name = f"{module.removesuffix(_BASE)}.{kind}"
    if base_name != name and base_name in plain:
      raise ConfigError(f"the checkpoint has {base_name} twice: {PREFIX}{base_name} and {PREFIX}{name}")
    merge = name.endswith(_WEIGHT)
    result[base_name] = _merged_weight(name.removesuffix(_WEIGHT), plain, rank, alpha / rank) if merge else tensor
  return result


def _merged_weight(module: str, plain: Mapping[str, Any], rank: int, scale: float) -> MergedWeight:
  base, down, up = plain[module + _WEIGHT], plain[module + _DOWN], plain[module + _UP]
  if len(base.shape) != 2:
    raise ConfigError(f"the adapter of {module} belongs to a weight of {list(base.shape)}; expected a matrix")
  out_dim, in_dim = base.shape
  if tuple(down.shape) != (rank, in_dim) or tuple(up.shape) != (out_dim, rank):
    raise ConfigError(
      f"the adapter of {module} is {list(up.shape)} by {list(down.shape)}; rank {rank} and a weight of "
      f"{list(base.shape)} need {[out_dim, rank]} by {[rank, in_dim]}"
    )
  return MergedWeight(base, down, up, scale)
