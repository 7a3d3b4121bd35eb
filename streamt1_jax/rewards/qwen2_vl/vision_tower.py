"""Vision tower of Qwen2-VL: patches of pictures to tokens of the decoder (docs/reference/rewards.md).

  patches [S, N, V] ── embedding ── L blocks ── merger (2 x 2 patches) ── tokens [S, N / 4, M]

A temporal slice (one picture, or two frames of a video) never sees another one. All slices of a call have the same
size, so attention is dense, [S, N, ...], and needs no mask.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from streamt1_jax.nn import rotary
from streamt1_jax.nn.quantised import Linear
from streamt1_jax.rewards.qwen2_vl import mrope
from streamt1_jax.rewards.qwen2_vl.config import RopeDtype, VisionConfig


def quick_gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
  """x * sigmoid(1.702 x)."""
  return x * jax.nn.sigmoid(1.702 * x)


def _layer_norm(dim: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, rngs=rngs)


class VisionBlock(nnx.Module):
  """One pre-norm block, for the patches [S, N, dim] of S slices."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    self.attn_norm = _layer_norm(config.dim, config.eps, rngs)
    self.qkv = Linear(config.dim, 3 * config.dim, rngs=rngs)
    self.out = Linear(config.dim, config.dim, rngs=rngs)
    self.ffn_norm = _layer_norm(config.dim, config.eps, rngs)
    self.ffn_in = Linear(config.dim, config.ffn_dim, rngs=rngs)
    self.ffn_out = Linear(config.ffn_dim, config.dim, rngs=rngs)
    self.num_heads = config.num_heads

  def attention(
    self, x: Float[Array, "S N M"], cos: Float32[Array, "N pairs"], sin: Float32[Array, "N pairs"]
  ) -> Float[Array, "S N M"]:
    """Attention branch, before the residual."""
    slices, patches, _ = x.shape
    q, k, v = jnp.split(self.qkv(self.attn_norm(x)).reshape(slices, patches, 3 * self.num_heads, -1), 3, axis=2)
    turn = jax.vmap(rotary.rotate, in_axes=(0, None, None))
    attended = jax.nn.dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v)
    return self.out(attended.reshape(x.shape))

  def feed_forward(self, x: Float[Array, "S N M"]) -> Float[Array, "S N M"]:
    """Feed-forward branch, before the residual."""
    return self.ffn_out(quick_gelu(self.ffn_in(self.ffn_norm(x))))

  def __call__(
    self, x: Float[Array, "S N M"], cos: Float32[Array, "N pairs"], sin: Float32[Array, "N pairs"]
  ) -> Float[Array, "S N M"]:
    x = x + self.attention(x, cos, sin)
    return x + self.feed_forward(x)


class Merger(nnx.Module):
  """The patches of one token, side by side, through two layers to the width of the decoder."""

  def __init__(self, config: VisionConfig, out_dim: int, rngs: nnx.Rngs):
    merged = config.dim * config.merge_size**2
    self.norm = _layer_norm(config.dim, config.eps, rngs)
    self.hidden = Linear(merged, merged, rngs=rngs)
    self.out = Linear(merged, out_dim, rngs=rngs)
    self.group = config.merge_size**2

  def __call__(self, x: Float[Array, "S N M"]) -> Float[Array, "S tokens out"]:
    slices, patches, _ = x.shape
    x = self.norm(x).reshape(slices, patches // self.group, -1)
    return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


class VisionTower(nnx.Module):
  """The tower. Blocks are stacked, [num_layers, ...], and scanned."""

  def __init__(self, config: VisionConfig, out_dim: int, rope_dtype: RopeDtype, rngs: nnx.Rngs):
    self.patch_embedding = nnx.Linear(config.patch_values, config.dim, use_bias=False, rngs=rngs)
    self.blocks = nnx.vmap(VisionBlock, in_axes=(None, 0))(config, rngs.split(config.num_layers))
    self.merger = Merger(config, out_dim, rngs)
    self.config = config
    self.rope_dtype: RopeDtype = rope_dtype

  def __call__(self, patches: Float[Array, "S N V"], grid: tuple[int, int]) -> Float[Array, "S tokens out"]:
    """Tokens of S slices.

    Args:
      patches: normalised pixels, as `preprocess.to_patches` gives them.
      grid: rows and columns of patches of every slice, N in all; multiples of `merge_size`.

    Returns:
      N / merge_size^2 tokens of every slice, in the dtype of the weights.
    """
    cos, sin = self.rotation(grid)
    graphdef, blocks = nnx.split(self.blocks)
    step = lambda x, block: (nnx.merge(graphdef, block)(x, cos, sin), None)
    x, _ = jax.lax.scan(step, self.embed_patches(patches), blocks)
    return self.merger(x)

  def embed_patches(self, patches: Float[Array, "S N V"]) -> Float[Array, "S N M"]:
    """The result has the dtype of the weights."""
    return self.patch_embedding(patches.astype(self.patch_embedding.kernel.dtype))

  def rotation(self, grid: tuple[int, int]) -> tuple[Float32[Array, "N pairs"], Float32[Array, "N pairs"]]:
    """Cosine and sine of every patch of a slice."""
    cos, sin = mrope.vision_tables(*grid, self.config, self.rope_dtype)
    return jnp.asarray(cos), jnp.asarray(sin)
