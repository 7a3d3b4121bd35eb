"""Weights in int8, one scale per output channel: half the bytes of bfloat16, for models that only judge.

  scale[o] = max_i |w[i, o]| / 127        q[i, o] = round(w[i, o] / scale[o])        y = (x q) scale + bias

The integers -127..127 are exact in bfloat16 and the scale is applied after the product, so activations meet the
quantised weights themselves, not a rounding of them. A kernel is widened where it is multiplied, one layer of a scan at
a time: no more than that is ever in memory in another dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

_LARGEST = 127


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class QuantisedKernel:
  """A kernel, or a stack of kernels, in int8; arrays, or what describes them.

  Attributes:
    values: int8 [..., in, out] in -127..127.
    scale: float32 [..., out], positive; the kernel is `values * scale`.
  """

  values: Any
  scale: Any

  # By hand, because JAX would name the fields of a dataclass as attributes, and paths to weights are made of keys.
  def tree_flatten_with_keys(self):
    key = jax.tree_util.DictKey
    return ((key("values"), self.values), (key("scale"), self.scale)), None

  @classmethod
  def tree_unflatten(cls, _, children):
    return cls(*children)


def is_quantised(leaf: Any) -> TypeGuard[QuantisedKernel]:
  """Whether `leaf` is a `QuantisedKernel`: as `is_leaf`, keeps its two arrays together."""
  return isinstance(leaf, QuantisedKernel)


def abstract_kernel(kernel: jax.ShapeDtypeStruct) -> QuantisedKernel:
  """Shapes of a kernel [..., in, out] once it is quantised."""
  *stack, _, outputs = kernel.shape
  scale = jax.ShapeDtypeStruct((*stack, outputs), jnp.float32)
  return QuantisedKernel(jax.ShapeDtypeStruct(kernel.shape, jnp.int8), scale)


def quantise(kernel: Float[np.ndarray, "inputs outputs"]) -> QuantisedKernel:
  """A kernel [in, out] in int8; NaN or Inf in it shows in its scale. On the host, hence equal on every platform."""
  kernel = np.asarray(kernel, np.float32)
  scale = np.maximum(kernel.max(axis=0), -kernel.min(axis=0)) / np.float32(_LARGEST)
  # Channels that are zero, or so small that a scale would have few digits, become zero.
  scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
  with np.errstate(invalid="ignore"):
    steps = np.divide(kernel, scale)
    return QuantisedKernel(np.rint(steps, out=steps).astype(np.int8), scale)


class Linear(nnx.Linear):
  """`nnx.Linear` whose kernel may be a `QuantisedKernel`; inputs and results [..., features] then share one dtype."""

  def __call__(self, x: Float[Array, "*axes inputs"]) -> Float[Array, "*axes outputs"]:
    kernel: Any = self.kernel.get_value()
    if not is_quantised(kernel):
      return super().__call__(x)
    lead = (1,) * (x.ndim - 1)
    product = jnp.matmul(x, kernel.values.astype(x.dtype), preferred_element_type=jnp.float32)
    product *= kernel.scale.reshape(*lead, -1)
    if self.bias is not None:
      product += self.bias.get_value().astype(jnp.float32).reshape(*lead, -1)
    return product.astype(x.dtype)
