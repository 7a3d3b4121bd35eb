"""Normalisation that is computed in float32 and keeps the dtype of its input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def layer_norm(x: Float[Array, "*axes M"], eps: float) -> Float[Array, "*axes M"]:
  """LayerNorm without affine parameters over the last axis, in float32; the result has x's dtype."""
  y = x.astype(jnp.float32)
  y = y - y.mean(axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)
  return y.astype(x.dtype)


class RMSNorm(nnx.Module):
  """x * rsqrt(mean(x^2) + eps) * scale over the last axis."""

  def __init__(self, dim: int, eps: float):
    self.scale = nnx.Param(jnp.ones(dim))
    self.eps = eps

  def __call__(self, x: Float[Array, "*axes M"]) -> Float[Array, "*axes M"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
