"""UMT5 encoder: a T5 encoder in which every layer has its own relative-position bias (docs/reference/umt5.md).

It has RMS norms before each sub-layer and a gated GELU feed-forward. It has no biases, no embedding scale, and no
1 / sqrt(d) in the attention scores. It computes in the dtype of the weights, but softmax and norms in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from streamt1_jax.config import TextConfig
from streamt1_jax.typing import HostArray


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int32[np.ndarray, "X X"]:
  """Relative-position bucket of every (query, key) pair, in 0..num_buckets - 1.

  With r = key - query, half = num_buckets / 2 and exact = half / 2:

    bucket(r) = half * [r > 0] + b(|r|)
    b(a) = a                                                                         for a < exact, else
    b(a) = min(half - 1, exact + floor((half - exact) * log(a / exact) / log(max_distance / exact)))
  """
  half = num_buckets // 2
  exact = half // 2
  position = np.arange(length)
  relative = position[None, :] - position[:, None]
  distance = np.abs(relative)
  octaves = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
  coarse = np.minimum(half - 1, exact + np.floor(octaves * (half - exact)))
  return (half * (relative > 0) + np.where(distance < exact, distance, coarse)).astype(np.int32)


class SelfAttention(nnx.Module):
  """Bidirectional self-attention with a learnt bias per head and relative-position bucket."""

  def __init__(self, config: TextConfig, rngs: nnx.Rngs):
    self.num_heads = config.num_heads
    self.num_buckets = config.num_buckets
    self.max_distance = config.max_distance
    # The query starts smaller by 1 / sqrt(d), because the scores are not scaled.
    query_std = (config.dim * config.attn_dim / config.num_heads) ** -0.5
    self.query = _linear(config.dim, config.attn_dim, query_std, rngs)
    self.key = _linear(config.dim, config.attn_dim, config.dim**-0.5, rngs)
    self.value = _linear(config.dim, config.attn_dim, config.dim**-0.5, rngs)
    self.out = _linear(config.attn_dim, config.dim, config.attn_dim**-0.5, rngs)
    bias_shape = (config.num_buckets, config.num_heads)
    self.position_bias = nnx.Param(config.dim**-0.5 * rngs.params.normal(bias_shape))

  def __call__(self, x: Float[Array, "X E"], mask: Bool[HostArray, " X"]) -> Float[Array, "X E"]:
    """`mask` is True where a key may be attended to."""
    length = x.shape[0]
    query, key, value = (
      project(x).reshape(length, self.num_heads, -1) for project in (self.query, self.key, self.value)
    )
    scores = jnp.einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
    buckets = relative_buckets(length, self.num_buckets, self.max_distance)
    scores += self.position_bias[...][buckets].transpose(2, 0, 1).astype(jnp.float32)
    scores = jnp.where(mask[None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return self.out(jnp.einsum("hqk,khd->qhd", weights, value).reshape(length, -1))


class GatedFeedForward(nnx.Module):
  """down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

  def __init__(self, config: TextConfig, rngs: nnx.Rngs):
    self.gate = _linear(config.dim, config.ffn_dim, config.dim**-0.5, rngs)
    self.up = _linear(config.dim, config.ffn_dim, config.dim**-0.5, rngs)
    self.down = _linear(config.ffn_dim, config.dim, config.ffn_dim**-0.5, rngs)

  def __call__(self, x: Float[Array, "X E"]) -> Float[Array, "X E"]:
    return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
  """One encoder block: attention and feed-forward, each behind an RMSNorm and a residual connection."""

  def __init__(self, config: TextConfig, rngs: nnx.Rngs):
    self.attn_norm = nnx.RMSNorm(config.dim, epsilon=config.eps, rngs=rngs)
    self.self_attn = SelfAttention(config, rngs)
    self.ffn_norm = nnx.RMSNorm(config.dim, epsilon=config.eps, rngs=rngs)
    self.ffn = GatedFeedForward(config, rngs)

  def __call__(self, x: Float[Array, "X E"], mask: Bool[HostArray, " X"]) -> Float[Array, "X E"]:
    x = x + self.self_attn(self.attn_norm(x), mask)
    return x + self.ffn(self.ffn_norm(x))


class UMT5Encoder(nnx.Module):
  """The encoder. The parameters of `blocks` are stacked, `[num_layers, ...]`, and scanned."""

  def __init__(self, config: TextConfig, rngs: nnx.Rngs):
    self.token_embedding = nnx.Param(rngs.params.normal((config.vocab_size, config.dim)))
    self.blocks = nnx.vmap(Block, in_axes=(None, 0))(config, rngs.split(config.num_layers))
    self.final_norm = nnx.RMSNorm(config.dim, epsilon=config.eps, rngs=rngs)

  def __call__(self, token_ids: Int[HostArray, " X"], mask: Bool[HostArray, " X"]) -> Float[Array, "X E"]:
    """Encodes one prompt; `jax.vmap` over both arguments for a batch.

    Args:
      token_ids: in 0..vocab_size - 1.
      mask: True for the prompt's tokens, False for padding; at least one is True.

    Returns:
      Hidden states in the dtype of the weights. The rows of padding have no meaning.
    """
    block, layers = nnx.split(self.blocks, nnx.Param)
    x = self.token_embedding[...][token_ids]
    x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(block, layer)(x, mask), None), x, layers)
    return self.final_norm(x)


def _linear(inputs: int, outputs: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
  return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=nnx.initializers.normal(std), rngs=rngs)
