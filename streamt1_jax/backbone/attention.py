"""Attention over a chunk and the memory slots it can see.

Softmax does not care about the order of the keys, so the slots need no order either, and partial softmaxes merge
exactly through their log-sum-exp:

  o = sum_i exp(m_i - m) * acc_i / sum_i exp(m_i - m) * l_i,   m = max_i m_i

How many slots are visible is data, not shape: empty slots cost nothing, and a growing memory compiles once.

`attend_with_memory` is written for one candidate. Its batching rules see what a plain `vmap` would lose: candidates
of one beam share the memory, so they become rows of the same products, and all beams are handled by one call. Two
implementations:

  fold   one slot after the other, all heads at once; the running softmax is merged after every slot
  dense  one head after the other, all visible slots at once; one branch is compiled per number of visible slots

On a CPU `dense` needs 1.3 to 1.5 times the time of its matrix products alone and `fold` 3.5 times (6 heads of 64
channels, 4 x 288 keys): a head's scores stay in cache. Elsewhere `fold` is the default, whose largest temporary is
the scores of one slot.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from streamt1_jax.typing import Keys, Queries, Values

Implementation = Literal["fold", "dense"]


class MemoryView(NamedTuple):
  """What one beam's attention reads; never written while denoising.

  Attributes:
    k: [L, R, A, T, D] rotated keys.
    v: [L, R, A, T, D] values.
    count: int32 scalar; slots 0..count-1 are valid.
    trip_count: int32 scalar >= count; how many slots are visited. The largest count of all beams, kept apart from
      `count` so that a `vmap` over beams leaves it unbatched.
  """

  k: jax.Array
  v: jax.Array
  count: jax.Array
  trip_count: jax.Array


class _Partial(NamedTuple):
  """An unfinished softmax. acc [..., T, D], peak [..., T, 1] and total [..., T, 1], all float32."""

  acc: jax.Array
  peak: jax.Array
  total: jax.Array


def attend(q: Queries, k: Keys, v: Values) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v, [T, A, D] in q's dtype, of queries [T, A, D] and keys and values [A, X, D]."""
  partial = _begin(_logits("qad,akd->aqk", q * q.shape[-1] ** -0.5, k), functools.partial(_weigh, "aqk,akd->aqd", v=v))
  return (partial.acc / partial.total).swapaxes(0, 1).astype(q.dtype)


def attend_with_memory(
  q: Queries,
  k: Keys,
  v: Values,
  memory: MemoryView,
  layer: jax.Array,
  implementation: Implementation | None = None,
) -> jax.Array:
  """Attention of a chunk to itself (no mask inside it) and to every valid slot of `memory` at block `layer`.

  Args:
    q: [T, A, D] rotated queries.
    k: [T, A, D] rotated keys of the chunk itself.
    v: [T, A, D] values of the chunk itself.
    memory: slots of the beam.
    layer: int32 scalar.
    implementation: "fold" or "dense"; None chooses by platform.

  Returns:
    [T, A, D] in q's dtype.
  """
  call = _one_candidate(implementation)
  return call(q * q.shape[-1] ** -0.5, k, v, memory.k, memory.v, memory.count, memory.trip_count, layer).astype(q.dtype)


@functools.cache
def _one_candidate(implementation: Implementation | None) -> Callable:
  """Attention of [T, A, D]; batched over candidates (memory unbatched) or over beams (memory batched)."""
  candidates = _one_beam(implementation)

  @jax.custom_batching.custom_vmap
  def call(q, k, v, *memory):
    return candidates(q[None], k[None], v[None], *memory)[0]

  @call.def_vmap
  def rule(size, batched, q, k, v, *memory):
    q, k, v = _batch(size, batched[:3], (q, k, v))
    if not any(batched[3:]):
      return candidates(q, k, v, *memory), True
    memory = _batch(size, batched[3:6], memory[:3]) + memory[3:]
    return _all_beams(implementation, q[:, None], k[:, None], v[:, None], *memory)[:, 0], True

  return call


@functools.cache
def _one_beam(implementation: Implementation | None) -> Callable:
  """Attention of a beam's candidates [B, T, A, D] with one memory; batched over beams."""

  @jax.custom_batching.custom_vmap
  def call(q, k, v, mk, mv, count, trip_count, layer):
    beam = (x[None] for x in (q, k, v, mk, mv, count))
    return _all_beams(implementation, *beam, trip_count, layer)[0]

  @call.def_vmap
  def rule(size, batched, q, k, v, mk, mv, count, trip_count, layer):
    beams = _batch(size, batched[:6], (q, k, v, mk, mv, count))
    return _all_beams(implementation, *beams, trip_count, layer), True

  return call


def _batch(size: int, batched, arrays: tuple) -> tuple:
  """Gives every array a leading batch axis."""
  return tuple(
    x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
    for x, is_batched in zip(arrays, batched, strict=True)
  )


def _all_beams(implementation: Implementation | None, q, k, v, mk, mv, count, trip_count, layer) -> jax.Array:
  """Attention [K, B, T, A, D] float32 of all candidates; `mk, mv` [K, L, R, A, T, D], `count` [K]."""
  arguments = (q, k, v, mk, mv, count, trip_count, layer)
  if implementation is None:
    return jax.lax.platform_dependent(*arguments, cpu=_dense, default=_fold)
  return {"fold": _fold, "dense": _dense}[implementation](*arguments)


def _logits(equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)


def _weigh(equation: str, weights: jax.Array, v: jax.Array) -> jax.Array:
  return jnp.einsum(equation, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _begin(logits: jax.Array, weigh: Callable) -> _Partial:
  """Softmax over the first keys."""
  peak = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp(logits - peak)
  return _Partial(weigh(weights), peak, weights.sum(axis=-1, keepdims=True))


def _merge(a: _Partial, b: _Partial) -> _Partial:
  """The softmax over the keys of both; a part without any valid key (peak -inf) changes nothing."""
  peak = jnp.maximum(a.peak, b.peak)
  keep_a, keep_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
  return _Partial(a.acc * keep_a + b.acc * keep_b, peak, a.total * keep_a + b.total * keep_b)


def _fold(q, k, v, mk, mv, count, trip_count, layer) -> jax.Array:
  """One slot after the other, all heads at once."""
  q, k, v = (x.swapaxes(2, 3) for x in (q, k, v))
  partial = _begin(_logits("nbaqd,nbakd->nbaqk", q, k), lambda w: _weigh("nbaqk,nbakd->nbaqd", w, v))

  def visit(slot, partial):
    at = lambda cache: jax.lax.dynamic_index_in_dim(
      jax.lax.dynamic_index_in_dim(cache, layer, 1, keepdims=False), slot, 1, keepdims=False
    )
    valid = (slot < count).reshape(-1, 1, 1, 1, 1)
    logits = _logits("nbaqd,nakd->nbaqk", q, at(mk))
    peak = jnp.maximum(partial.peak, jnp.where(valid, logits.max(axis=-1, keepdims=True), -jnp.inf))
    weights = jnp.where(valid, jnp.exp(logits - peak), 0.0)
    new = _Partial(_weigh("nbaqk,nakd->nbaqd", weights, at(mv)), peak, weights.sum(axis=-1, keepdims=True))
    return _merge(partial, new)

  partial = jax.lax.fori_loop(0, trip_count, visit, partial)
  return (partial.acc / partial.total).swapaxes(2, 3)


def _dense(q, k, v, mk, mv, count, trip_count, layer) -> jax.Array:
  """One head after the other, all visible slots at once."""
  slots = mk.shape[2]
  branches = [functools.partial(_dense_prefix, num_slots=n) for n in range(slots + 1)]
  return jax.lax.switch(jnp.clip(trip_count, 0, slots), branches, q, k, v, mk, mv, count, layer)


def _dense_prefix(q, k, v, mk, mv, count, layer, *, num_slots: int) -> jax.Array:
  """`_dense` when `num_slots` slots are visited, some of them perhaps not valid for every beam."""
  beams, candidates, tokens, heads, width = q.shape
  valid = jnp.repeat(jnp.arange(num_slots)[None] < count[:, None], tokens, axis=1)[:, None]

  def one_head(head):
    at_head = lambda x: jax.lax.dynamic_index_in_dim(x, head, 3, keepdims=False)
    qh, kh, vh = at_head(q), at_head(k), at_head(v)
    own = _begin(_logits("nbqd,nbkd->nbqk", qh, kh), lambda w: _weigh("nbqk,nbkd->nbqd", w, vh))
    if num_slots == 0:
      return own.acc / own.total
    start, size = (0, layer, 0, head, 0, 0), (beams, 1, num_slots, 1, tokens, width)
    visible = lambda cache: jax.lax.dynamic_slice(cache, start, size).reshape(beams, -1, width)
    rows = qh.reshape(beams, candidates * tokens, width)
    logits = jnp.where(valid, _logits("nqd,nkd->nqk", rows, visible(mk)), -jnp.inf)
    peak = jnp.maximum(logits.max(axis=-1, keepdims=True), own.peak.reshape(beams, -1, 1))
    weights = jnp.exp(logits - peak)
    past = _Partial(_weigh("nqk,nkd->nqd", weights, visible(mv)), peak, weights.sum(axis=-1, keepdims=True))
    past = jax.tree.map(lambda x: x.reshape(beams, candidates, tokens, -1), past)
    merged = _merge(own, past)
    return merged.acc / merged.total

  return jax.lax.map(one_head, jnp.arange(heads)).transpose(1, 2, 3, 0, 4)
