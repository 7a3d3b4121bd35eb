"""Attention over memory slots as one Pallas kernel for NVIDIA GPUs, compiled by Triton.

  for every head of every candidate, for every block of its queries:
    the chunk's own keys, then slot after slot, block after block: scores, running softmax, weighted sum of values

Scores never leave the multiprocessor, and the loop over slots ends at the beam's own count. Same mathematics as
`attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from streamt1_jax.nn.rotary import swap_halves
from streamt1_jax.typing import IntScalar

_LEAST_WIDTH = 16  # channels of the smallest product of a tensor core
_QUERIES = 128
_KEYS = 64


def supports(width: int) -> bool:
  """Whether the kernel can run for heads of `width` channels: Triton's blocks are powers of two."""
  return width >= _LEAST_WIDTH and width & (width - 1) == 0


def attend_slots(
  q: Float[Array, "K B T A D"],
  k: Float[Array, "K B T A D"],
  v: Float[Array, "K B T A D"],
  mk: Float[Array, "K L R A T D"],
  mv: Float[Array, "K L R A T D"],
  count: Int32[Array, " K"],
  cos: Float32[Array, "K R D"],
  sin: Float32[Array, "K R D"],
  layer: IntScalar,
  *,
  interpret: bool = False,
) -> Float32[Array, "K B T A D"]:
  """As `flash_attention.attend_slots`, with `interpret` on any platform."""
  beams, candidates, tokens, heads, width = q.shape
  # Triton counts elements in 32 bits, which the slots of all layers exceed.
  mk, mv = (jax.lax.dynamic_index_in_dim(cache, layer, 1, keepdims=False) for cache in (mk, mv))
  call = pl.pallas_call(
    functools.partial(_kernel, candidates=candidates),
    out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
    grid=(pl.cdiv(tokens, _QUERIES), heads, beams * candidates),
    compiler_params=plgpu.CompilerParams(num_warps=8 if width > 64 else 4, num_stages=2),
    interpret=interpret,
  )
  return call(q, swap_halves(q), k, v, mk, mv, count, cos, sin)


def _kernel(q, swapped_q, k, v, mk, mv, count, cos, sin, out, *, candidates: int):
  """One block of queries of one head of one candidate."""
  block, head = pl.program_id(0), pl.program_id(1)
  beam, candidate = _divide(pl.program_id(2), candidates)
  tokens, width = q.shape[2], q.shape[4]
  rows = pl.ds(block * _QUERIES, _QUERIES)
  in_chunk = (block * _QUERIES + jnp.arange(_QUERIES) < tokens)[:, None]
  load_queries = lambda x: plgpu.load(x.at[beam, candidate, rows, head], mask=in_chunk, other=0.0)
  queries, swapped = load_queries(q), load_queries(swapped_q)
  blocks = pl.cdiv(tokens, _KEYS)

  def attend(queries, keys_of, values_of, start, partial):
    """Softmax over one more block of keys, which begins at token `start`; the last one may be short."""
    acc, peak, total = partial
    valid = start + jnp.arange(_KEYS) < tokens
    keys = plgpu.load(keys_of(pl.ds(start, _KEYS)), mask=valid[:, None], other=0.0)
    values = plgpu.load(values_of(pl.ds(start, _KEYS)), mask=valid[:, None], other=0.0)
    scores = jnp.where(valid[None], _dot(queries, keys.T), -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max(axis=1))
    weights = jnp.exp(scores - new_peak[:, None])
    keep = jnp.exp(peak - new_peak)
    acc = acc * keep[:, None] + _dot(weights.astype(values.dtype), values)
    return acc, new_peak, total * keep + weights.sum(axis=1)

  def own(i, partial):
    at = lambda x: lambda keys: x.at[beam, candidate, keys, head]
    return attend(queries, at(k), at(v), i * _KEYS, partial)

  def remembered(slot, partial):
    at = lambda x: lambda keys: x.at[beam, slot, head, keys]
    turned = (queries * cos[beam, slot][None] + swapped * sin[beam, slot][None]).astype(queries.dtype)
    return jax.lax.fori_loop(0, blocks, lambda i, partial: attend(turned, at(mk), at(mv), i * _KEYS, partial), partial)

  start = jnp.zeros((_QUERIES, width)), jnp.full((_QUERIES,), -jnp.inf), jnp.zeros((_QUERIES,))
  partial = jax.lax.fori_loop(0, blocks, own, start)
  acc, _, total = jax.lax.fori_loop(0, count[beam], remembered, partial)
  plgpu.store(out.at[beam, candidate, rows, head], acc / total[:, None], mask=in_chunk)


def _divide(number: int | jax.Array, by: int | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Quotient and remainder of numbers that are not negative; Python's own, which round down, do not lower."""
  by = jnp.int32(by)
  return jax.lax.div(number, by), jax.lax.rem(number, by)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
