"""Attention over a chunk and the memory slots it can see.

Softmax does not care about the order of the keys, and partial softmaxes merge exactly through their log-sum-exp:

  o = sum_i exp(m_i - m) * acc_i / sum_i exp(m_i - m) * l_i,   m = max_i m_i

so a chunk attends to itself, then folds over the valid slots, one dense product each. The number of slots is data,
not shape:
empty slots cost nothing and a growing memory compiles once. Under `vmap` over candidates the slots stay unbatched and
the candidates become rows of the same product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from streamt1_jax.typing import Keys, Queries, Values


class Partial(NamedTuple):
  """An unfinished softmax. acc [A, T, D], peak [A, T, 1] and total [A, T, 1], all float32."""

  acc: jax.Array
  peak: jax.Array
  total: jax.Array


class MemoryView(NamedTuple):
  """What one beam's attention reads; never written while denoising.

  Attributes:
    k: [L, R, A, T, D] rotated keys.
    v: [L, R, A, T, D] values.
    count: int32 scalar; slots 0..count-1 are valid.
    trip_count: int32 scalar >= count; how many slots the fold visits. The largest count of all beams, kept apart from
      `count` so that a `vmap` over beams leaves the loop bound unbatched.
  """

  k: jax.Array
  v: jax.Array
  count: jax.Array
  trip_count: jax.Array


def _logits(q: Queries, k: Keys) -> jax.Array:
  return jnp.einsum("aqd,akd->aqk", q, k, preferred_element_type=jnp.float32)


def _weigh(weights: jax.Array, v: Values) -> jax.Array:
  return jnp.einsum("aqk,akd->aqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def begin(q: Queries, k: Keys, v: Values) -> Partial:
  """Softmax over the first set of keys; `q` is already scaled."""
  logits = _logits(q, k)
  peak = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp(logits - peak)
  return Partial(_weigh(weights, v), peak, weights.sum(axis=-1, keepdims=True))


def fold(partial: Partial, q: Queries, k: Keys, v: Values, valid: jax.Array) -> Partial:
  """Adds one slot's keys; a slot that is not `valid` (bool scalar) leaves the result as it was."""
  logits = _logits(q, k)
  peak = jnp.maximum(partial.peak, jnp.where(valid, logits.max(axis=-1, keepdims=True), -jnp.inf))
  weights = jnp.where(valid, jnp.exp(logits - peak), 0.0)
  keep = jnp.exp(partial.peak - peak)
  return Partial(
    partial.acc * keep + _weigh(weights, v), peak, partial.total * keep + weights.sum(axis=-1, keepdims=True)
  )


def finish(partial: Partial) -> jax.Array:
  return partial.acc / partial.total


def attend(q: Queries, k: Keys, v: Values) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v, `[A, T, D]` in q's dtype, accumulated in float32."""
  return finish(begin(q * q.shape[-1] ** -0.5, k, v)).astype(q.dtype)


def attend_with_memory(q: Queries, k: Keys, v: Values, memory: MemoryView, layer: jax.Array) -> jax.Array:
  """Attention of a chunk to itself (no mask inside it) and to every valid slot of `memory` at block `layer`."""
  scaled = q * q.shape[-1] ** -0.5

  def visit(slot, partial):
    at = lambda cache: jax.lax.dynamic_index_in_dim(
      jax.lax.dynamic_index_in_dim(cache, layer, 0, keepdims=False), slot, 0, keepdims=False
    )
    return fold(partial, scaled, at(memory.k), at(memory.v), slot < memory.count)

  partial = jax.lax.fori_loop(0, memory.trip_count, visit, begin(scaled, k, v))
  return finish(partial).astype(q.dtype)
