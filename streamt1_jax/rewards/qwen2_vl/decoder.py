"""Language model of Qwen2-VL, read at a few tokens; there is no language-model head (docs/reference/rewards.md).

Attention is causal, so what follows the last token that is read may be dropped, or be padding of any content.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from streamt1_jax.nn import rotary
from streamt1_jax.nn.norms import RMSNorm
from streamt1_jax.nn.quantised import Linear
from streamt1_jax.rewards.qwen2_vl import mrope
from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, RopeDtype
from streamt1_jax.typing import HostArray

_QUERIES_AT_ONCE = 1024


def causal_attention(
  q: Float[Array, "T A D"], k: Float[Array, "T A_kv D"], v: Float[Array, "T A_kv D"]
) -> Float[Array, "T A D"]:
  """Causal attention of one sequence; groups of query heads share keys and values.

  Long sequences take their queries in blocks, so that scores grow with T alone: 60 frames of a video are 8500 tokens,
  whose scores would take 3.5 GB.
  """
  length = q.shape[0]
  blocks = -(-length // _QUERIES_AT_ONCE)
  if blocks == 1:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
  size = -(-length // blocks)
  queries = jnp.pad(q, ((0, blocks * size - length), (0, 0), (0, 0))).reshape(blocks, size, *q.shape[1:])

  def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
    start, queries = block
    visible = jnp.arange(length)[None] <= (start + jnp.arange(size))[:, None]
    return jax.nn.dot_product_attention(queries, k, v, mask=visible[None])

  attended = jax.lax.map(attend, (size * jnp.arange(blocks), queries))
  return attended.reshape(-1, *q.shape[1:])[:length]


class DecoderBlock(nnx.Module):
  """One pre-norm block, for one sequence [T, dim]."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    kv_dim = config.num_kv_heads * config.head_dim
    self.attn_norm = RMSNorm(config.dim, config.eps)
    self.query = Linear(config.dim, config.dim, rngs=rngs)
    self.key = Linear(config.dim, kv_dim, rngs=rngs)
    self.value = Linear(config.dim, kv_dim, rngs=rngs)
    self.out = Linear(config.dim, config.dim, use_bias=False, rngs=rngs)
    self.ffn_norm = RMSNorm(config.dim, config.eps)
    self.gate = Linear(config.dim, config.ffn_dim, use_bias=False, rngs=rngs)
    self.up = Linear(config.dim, config.ffn_dim, use_bias=False, rngs=rngs)
    self.down = Linear(config.ffn_dim, config.dim, use_bias=False, rngs=rngs)
    self.head_dim = config.head_dim

  def attention(
    self, x: Float[Array, "T M"], cos: Float32[Array, "T pairs"], sin: Float32[Array, "T pairs"]
  ) -> Float[Array, "T M"]:
    """Causal attention branch, before the residual. Query heads share keys in groups."""
    y = self.attn_norm(x)
    q, k, v = (project(y).reshape(x.shape[0], -1, self.head_dim) for project in (self.query, self.key, self.value))
    attended = causal_attention(rotary.rotate(q, cos, sin), rotary.rotate(k, cos, sin), v)
    return self.out(attended.reshape(x.shape))

  def feed_forward(self, x: Float[Array, "T M"]) -> Float[Array, "T M"]:
    """Gated feed-forward branch, before the residual."""
    y = self.ffn_norm(x)
    return self.down(jax.nn.silu(self.gate(y)) * self.up(y))

  def __call__(
    self, x: Float[Array, "T M"], cos: Float32[Array, "T pairs"], sin: Float32[Array, "T pairs"]
  ) -> Float[Array, "T M"]:
    x = x + self.attention(x, cos, sin)
    return x + self.feed_forward(x)


class Decoder(nnx.Module):
  """The decoder. Blocks are stacked, [num_layers, ...], and scanned."""

  def __init__(self, config: DecoderConfig, rope_dtype: RopeDtype, rngs: nnx.Rngs):
    self.token_embedding = nnx.Param(0.02 * rngs.params.normal((config.vocab_size, config.dim)))
    self.blocks = nnx.vmap(DecoderBlock, in_axes=(None, 0))(config, rngs.split(config.num_layers))
    self.final_norm = RMSNorm(config.dim, config.eps)
    self.config = config
    self.rope_dtype: RopeDtype = rope_dtype

  def embed(self, token_ids: Int[HostArray, " T"]) -> Float[Array, "T M"]:
    """Ids in 0..vocab_size - 1 to the dtype of the weights."""
    return self.token_embedding[...][token_ids]

  def __call__(self, embeddings: Float[Array, "T M"], read_at: Int[HostArray, " R"]) -> Float[Array, "R M"]:
    """Hidden states, after the final norm, of some tokens of one sequence; `vmap` for several.

    Args:
      embeddings: of tokens at positions 0..T - 1.
      read_at: positions to read.

    Returns:
      Hidden states in the dtype of `embeddings`.
    """
    return self.final_norm(self._run(embeddings, keep=False)[0][read_at])

  def block_outputs(self, embeddings: Float[Array, "T M"]) -> Float[Array, "num_layers T M"]:
    """What every block makes of one sequence, before the final norm; for training."""
    outputs = self._run(embeddings, keep=True)[1]
    assert outputs is not None
    return outputs

  def _run(self, embeddings: jax.Array, keep: bool) -> tuple[jax.Array, jax.Array | None]:
    """What the last block makes of one sequence and, with `keep`, what every block makes of it."""
    cos, sin = self.rotation(embeddings.shape[0], embeddings.dtype)
    graphdef, blocks = nnx.split(self.blocks)

    def step(x: jax.Array, block: Any) -> tuple[jax.Array, jax.Array | None]:
      x = nnx.merge(graphdef, block)(x, cos, sin)
      return x, x if keep else None

    return jax.lax.scan(step, embeddings, blocks)

  def rotation(
    self, length: int, dtype: DTypeLike
  ) -> tuple[Float32[Array, "{length} pairs"], Float32[Array, "{length} pairs"]]:
    """Cosine and sine, rounded to `dtype` first where the reference does."""
    tables = mrope.decoder_tables(np.arange(length), self.config, self.rope_dtype)
    rounded_to = dtype if self.rope_dtype == "bf16_reference" else jnp.float32
    cos, sin = (jnp.asarray(table).astype(rounded_to).astype(jnp.float32) for table in tables)
    return cos, sin
