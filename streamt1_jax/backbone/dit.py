"""The causal Wan DiT: velocity of one chunk, given the memory.

  latents [F, C, H, W] ── patches ── tokens [F, T/F, M] ── L blocks ── head ── velocity [F, C, H, W]
                                        │
     timestep features [F, freq_dim] ── modulation rows, one set per latent frame
     text keys and values [L, A, X, D] ── cross-attention (computed once per prompt)
     memory [L, R, A, T, D] ── self-attention (read only)

Everything is unbatched: one candidate, one chunk; `vmap` over candidates shares the memory. Blocks are stacked
`[L, ...]` and scanned. Source: docs/reference/wan_dit.md.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from streamt1_jax.backbone import attention
from streamt1_jax.config import BackboneConfig, ModelConfig
from streamt1_jax.nn import rotary
from streamt1_jax.nn.norms import RMSNorm, layer_norm
from streamt1_jax.typing import IntScalar, Latents, Queries, TimeFeatures, Tokens


class TextMemory(NamedTuple):
  """Cross-attention keys and values of one prompt."""

  k: Float[Array, "L A X D"]
  v: Float[Array, "L A X D"]


class ChunkMemory(NamedTuple):
  """Self-attention keys (rotated at the chunk's own frames) and values of one chunk."""

  k: Float[Array, "L A T D"]
  v: Float[Array, "L A T D"]


@runtime_checkable
class Attend(Protocol):
  """Self-attention of one block, with whatever it can see."""

  def __call__(self, q: Queries, k: Queries, v: Queries, layer: IntScalar) -> Queries: ...


Heads: TypeAlias = Float[Array, "F frame_tokens A D"]
"""Queries, keys, values or what attention makes of them: the heads of every token of a chunk."""

_as_it_is = lambda x: x


class Placement(NamedTuple):
  """Where the tokens of a chunk lie on several devices: constraints on traced arrays, which change no values.

  Attributes:
    tokens: places tokens [F, T/F, M], everywhere but in self-attention.
    to_heads: places queries, keys and values [F, T/F, A, D] on their way into self-attention.
    to_tokens: places its result [F, T/F, A, D].
  """

  tokens: Callable[[Tokens], Tokens] = _as_it_is
  to_heads: Callable[[Heads], Heads] = _as_it_is
  to_tokens: Callable[[Heads], Heads] = _as_it_is


ANYWHERE = Placement()
"""On one device, or as the compiler likes."""


class Projections(nnx.Module):
  """The four linear layers and two norms of an attention; holds no attention itself."""

  def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
    self.query = nnx.Linear(config.dim, config.dim, rngs=rngs)
    self.key = nnx.Linear(config.dim, config.dim, rngs=rngs)
    self.value = nnx.Linear(config.dim, config.dim, rngs=rngs)
    self.out = nnx.Linear(config.dim, config.dim, rngs=rngs)
    self.query_norm = RMSNorm(config.dim, config.eps)
    self.key_norm = RMSNorm(config.dim, config.eps)
    self.num_heads = config.num_heads

  def queries(self, x: Float[Array, "*axes M"]) -> Float[Array, "*axes A D"]:
    """Normalised, not rotated."""
    return self._split_heads(self.query_norm(self.query(x)))

  def keys_values(self, x: Float[Array, "*axes M"]) -> tuple[Float[Array, "*axes A D"], Float[Array, "*axes A D"]]:
    """Keys are normalised, not rotated."""
    return self._split_heads(self.key_norm(self.key(x))), self._split_heads(self.value(x))

  def _split_heads(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], self.num_heads, -1)


class Block(nnx.Module):
  """One transformer block, written for the tokens of one chunk."""

  def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
    dim = config.dim
    # Rows: shift, scale, gate of self-attention, then of the feed-forward layer.
    self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, dim)) * dim**-0.5)
    self.self_attention = Projections(config, rngs)
    self.cross_norm = nnx.LayerNorm(dim, epsilon=config.eps, use_fast_variance=False, rngs=rngs)
    self.cross_attention = Projections(config, rngs)
    self.ffn_in = nnx.Linear(dim, config.ffn_dim, rngs=rngs)
    self.ffn_out = nnx.Linear(config.ffn_dim, dim, rngs=rngs)
    self.eps = config.eps

  def modulation_rows(self, time: Float[Array, "F 6 M"]) -> list[Float[Array, "F 1 M"]]:
    """Six arrays from the projected time embedding."""
    return jnp.split(self.modulation[...][None] + time, 6, axis=1)

  def qkv(
    self,
    x: Tokens,
    rows: list[Float[Array, "F 1 M"]],
    cos: Float[Array, "F frame_tokens pairs"],
    sin: Float[Array, "F frame_tokens pairs"],
  ) -> tuple[Heads, Heads, Heads]:
    """Rotated queries and keys, and values."""
    y = layer_norm(x, self.eps) * (1 + rows[1]) + rows[0]
    k, v = self.self_attention.keys_values(y)
    return rotary.rotate(self.self_attention.queries(y), cos, sin), rotary.rotate(k, cos, sin), v

  def after_attention(
    self,
    x: Tokens,
    attended: Heads,
    rows: list[Float[Array, "F 1 M"]],
    text: TextMemory,
  ) -> Tokens:
    """Residual of self-attention, cross-attention to one block's text memory `[A, X, D]`, feed-forward."""
    cross_attend = jax.vmap(attention.attend, in_axes=(0, None, None))
    return self.with_cross_attention(x, attended, rows, lambda q: cross_attend(q, text.k, text.v))

  def with_cross_attention(
    self,
    x: Tokens,
    attended: Heads,
    rows: list[Float[Array, "F 1 M"]],
    cross_attend: Callable[[Heads], Heads],
  ) -> Tokens:
    """`after_attention` with `cross_attend`, queries to results [F, T/F, A, D]: tokens may be of several prompts."""
    x = x + self.self_attention.out(attended.reshape(x.shape)) * rows[2]
    attended = cross_attend(self.cross_attention.queries(self.cross_norm(x)))
    x = x + self.cross_attention.out(attended.reshape(x.shape))
    y = layer_norm(x, self.eps) * (1 + rows[4]) + rows[3]
    return x + self.ffn_out(jax.nn.gelu(self.ffn_in(y), approximate=True)) * rows[5]


class CausalWanDiT(nnx.Module):
  """Causal Wan DiT. Split it once (`nnx.split`), then merge inside the transformation that calls it."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config.backbone
    patch_channels = c.latent_channels * c.patch_size**2
    self.patch_embedding = nnx.Linear(patch_channels, c.dim, rngs=rngs)
    self.text_in = nnx.Linear(c.text_dim, c.dim, rngs=rngs)
    self.text_out = nnx.Linear(c.dim, c.dim, rngs=rngs)
    self.time_in = nnx.Linear(c.freq_dim, c.dim, rngs=rngs)
    self.time_out = nnx.Linear(c.dim, c.dim, rngs=rngs)
    self.time_projection = nnx.Linear(c.dim, 6 * c.dim, rngs=rngs)
    self.blocks = nnx.vmap(Block, in_axes=(None, 0))(c, rngs.split(c.num_layers))
    self.head_modulation = nnx.Param(jax.random.normal(rngs.params(), (2, c.dim)) * c.dim**-0.5)
    self.head = nnx.Linear(c.dim, patch_channels, rngs=rngs)
    self.config = c
    self.grid = (config.latent_height // c.patch_size, config.latent_width // c.patch_size)
    self.chunk_frames = config.chunk_frames

  def embed_text(self, embeddings: Float[Array, "X E"]) -> Float[Array, "X M"]:
    """From text encoder output; zero rows after the prompt become what the biases make of zero."""
    return self.text_out(jax.nn.gelu(self.text_in(embeddings), approximate=True))

  def text_memory(self, embeddings: Float[Array, "X E"]) -> TextMemory:
    """Cross-attention keys and values of all blocks for text encoder output; once per prompt."""
    text = self.embed_text(embeddings)
    graphdef, blocks = nnx.split(self.blocks)
    project = lambda block: nnx.merge(graphdef, block).cross_attention.keys_values(text)
    return TextMemory(*(x.swapaxes(1, 2) for x in jax.lax.map(project, blocks)))

  def embed_time(self, features: TimeFeatures) -> tuple[Float[Array, "F M"], Float[Array, "F 6 M"]]:
    """Time embedding and its projection."""
    features = features.astype(self.time_in.kernel.dtype)
    embedding = self.time_out(jax.nn.silu(self.time_in(features)))
    return embedding, self.time_projection(jax.nn.silu(embedding)).reshape(features.shape[0], 6, -1)

  def patchify(self, latents: Float[Array, "F C H W"]) -> Tokens:
    """A patch is flattened (row, column, channel), channel fastest."""
    frames, channels = latents.shape[:2]
    (rows, columns), p = self.grid, self.config.patch_size
    patches = latents.reshape(frames, channels, rows, p, columns, p).transpose(0, 2, 4, 3, 5, 1)
    return self.patch_embedding(patches.reshape(frames, rows * columns, -1))

  def unpatchify(self, x: Tokens, time: Float[Array, "F M"]) -> Float[Array, "F C H W"]:
    """Head: from tokens and time embedding."""
    shift, scale = jnp.split(self.head_modulation[...][None] + time[:, None], 2, axis=1)
    x = self.head(layer_norm(x, self.config.eps) * (1 + scale) + shift)
    (rows, columns), p = self.grid, self.config.patch_size
    x = x.reshape(x.shape[0], rows, columns, p, p, -1).transpose(0, 5, 1, 3, 2, 4)
    return x.reshape(x.shape[0], x.shape[1], rows * p, columns * p)

  def rotation(
    self, num_frames: int
  ) -> tuple[Float32[Array, "{num_frames} frame_tokens pairs"], Float32[Array, "{num_frames} frame_tokens pairs"]]:
    """Cosines and sines [num_frames, T/F, D/2] of the tokens of one chunk or several: each begins at frame 0."""
    angles = rotary.chunk_rotation(self.config.head_dim, self.chunk_frames, *self.grid)
    cos, sin = (jnp.asarray(np.tile(x, (num_frames // self.chunk_frames, 1, 1))) for x in angles)
    return cos, sin

  def __call__(
    self,
    latents: Latents,
    features: TimeFeatures,
    text: TextMemory,
    attend: Attend,
    placement: Placement = ANYWHERE,
  ) -> tuple[Latents, ChunkMemory]:
    """Velocity of one chunk, and the keys and values it would leave in memory.

    Args:
      latents: noisy chunk.
      features: sinusoids of the timestep of each latent frame.
      text: the prompt's cross-attention memory.
      attend: self-attention, such as `attention.attend_with_memory` bound to a memory.
      placement: where tokens lie on several devices.

    Returns:
      The velocity, and the chunk's rotated keys and its values.
    """
    x = placement.tokens(self.patchify(latents.astype(self.patch_embedding.kernel.dtype)))
    embedding, projected = self.embed_time(features)
    cos, sin = self.rotation(latents.shape[0])
    row = lambda x: x.reshape(-1, *x.shape[2:])
    graphdef, blocks = nnx.split(self.blocks)

    def step(x, inputs):
      params, layer, text = inputs
      block = nnx.merge(graphdef, params)
      rows = block.modulation_rows(projected)
      by_frame = [placement.to_heads(y) for y in block.qkv(x, rows, cos, sin)]
      q, k, v = map(row, by_frame)
      attended = placement.to_tokens(attend(q, k, v, layer).reshape(by_frame[0].shape))
      x = placement.tokens(block.after_attention(x, attended, rows, text))
      return x, ChunkMemory(k.swapaxes(0, 1), v.swapaxes(0, 1))

    x, chunk = jax.lax.scan(step, x, (blocks, jnp.arange(self.config.num_layers), text))
    return self.unpatchify(x, embedding).astype(jnp.float32), chunk
