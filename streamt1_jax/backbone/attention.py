"""Attention over a chunk and the memory slots it can see.

Softmax does not care about the order of the keys, so the slots need no order either, and partial softmaxes merge
exactly through their log-sum-exp:

  o = sum_i exp(m_i - m) * acc_i / sum_i exp(m_i - m) * l_i,   m = max_i m_i

How many slots are visible is data, not shape: empty slots cost nothing, and a growing memory compiles once. So is how
far away they are: keys stay as they were written, and queries are turned by the distance when a slot is entered.

`attend_with_memory` is written for one candidate. Its batching rules see what a plain `vmap` would lose: candidates
of one beam share the memory, so they become rows of the same products, and all beams, of all prompts, are handled by
one call. The softmax is merged slot by slot; the implementations differ in what a step of the fold takes:

  fold   all heads of a slot at once: the default
  flash  a block of queries of one head, whose scores never leave the core: a Pallas kernel for TPUs, the default there
         if heads are a multiple of 128 wide; elsewhere it is interpreted, for tests
  triton the same for NVIDIA GPUs, where the width of heads is a power of two; elsewhere it is interpreted. It is never
         a default: it lowers, and it is tested as interpreted, but no GPU has run it yet

Measured on CPUs: one head after the other keeps a slot's scores in cache and is still up to 1.3 times slower, because
its products are many and small. All slots in one product were no faster, and need a branch per number of visible slots.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamt1_jax.backbone import flash_attention, triton_attention
from streamt1_jax.nn.rotary import FrameTurns, turn
from streamt1_jax.typing import HostArray, Implementation, IntScalar, Queries

COMPILED_ON: Mapping[Implementation, tuple[str, ...]] = {
  "fold": ("cpu", "gpu", "tpu"),
  "flash": ("tpu",),
  "triton": ("gpu",),
}
"""Platforms for which an implementation is compiled. Elsewhere it is interpreted, for tests, and takes far longer."""

Divide = Callable[[Callable], Callable]
"""Makes of attention over all prompts (`_all_prompts`) the same on several devices, such as
`Execution.divide_attention`."""


class MemoryView(NamedTuple):
  """What one beam's attention reads; never written while denoising.

  Attributes:
    k: keys, rotated at the own frames of the chunk in their slot.
    v: values.
    count: slots 0..count-1 are valid.
    turns: what turns a query, rotated at its own chunk's frames, by the distance to each slot: [R, D].
  """

  k: Float[Array, "L R A T D"]
  v: Float[Array, "L R A T D"]
  count: IntScalar
  turns: FrameTurns


class _Partial(NamedTuple):
  """An unfinished softmax. acc [..., T, D], peak [..., T, 1] and total [..., T, 1], all float32."""

  acc: jax.Array
  peak: jax.Array
  total: jax.Array


def attend(q: Queries, k: Float[Array, "A X D"], v: Float[Array, "A X D"]) -> Queries:
  """softmax(q k^T / sqrt(D)) v, in q's dtype."""
  partial = _begin(_logits("qad,akd->aqk", q * q.shape[-1] ** -0.5, k), functools.partial(_weigh, "aqk,akd->aqd", v=v))
  return (partial.acc / partial.total).swapaxes(0, 1).astype(q.dtype)


def attend_with_memory(
  q: Queries,
  k: Queries,
  v: Queries,
  memory: MemoryView,
  layer: IntScalar,
  implementation: Implementation | None = None,
  divide: Divide | None = None,
) -> Queries:
  """Attention of a chunk to itself (no mask inside it) and to every valid slot of `memory` at block `layer`.

  Args:
    q: queries, rotated at the chunk's own frames.
    k: keys of the chunk itself, rotated likewise.
    v: values of the chunk itself.
    memory: slots of the beam.
    layer: block.
    implementation: one of the above; None chooses by platform.
    divide: divides heads, and the candidates, beams and prompts of a `vmap`, among devices; None is one device.
      Hashable; equal for equal devices.

  Returns:
    The mixed values, in q's dtype.
  """
  # A loop around the call is batched when it is closed, and by then the caller's precision would be forgotten.
  precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
  call = _one_candidate(implementation, divide, precision)
  slots = memory.k, memory.v, memory.count, *memory.turns
  return call(q * q.shape[-1] ** -0.5, k, v, *slots, layer).astype(q.dtype)


@functools.cache
def _one_candidate(implementation: Implementation | None, divide: Divide | None, precision: str | None) -> Callable:
  """Attention of [T, A, D]; batched over candidates (memory unbatched) or over beams (memory batched)."""
  candidates = _one_beam(implementation, divide, precision)

  @jax.custom_batching.custom_vmap
  def call(q, k, v, *memory):
    return candidates(q[None], k[None], v[None], *memory)[0]

  @call.def_vmap
  def rule(size, batched, q, k, v, *memory):
    q, k, v = _batch(size, batched[:3], (q, k, v))
    if not any(batched[3:]):
      return candidates(q, k, v, *memory), True
    memory = _batch(size, batched[3:-1], memory[:-1]) + memory[-1:]
    return _one_prompt(implementation, divide, precision)(q[:, None], k[:, None], v[:, None], *memory)[:, 0], True

  return call


@functools.cache
def _one_beam(implementation: Implementation | None, divide: Divide | None, precision: str | None) -> Callable:
  """Attention of a beam's candidates [B, T, A, D] with one memory; batched over beams."""
  beams = _one_prompt(implementation, divide, precision)

  @jax.custom_batching.custom_vmap
  def call(*beam_and_layer):
    *beam, layer = beam_and_layer
    return beams(*(x[None] for x in beam), layer)[0]

  @call.def_vmap
  def rule(size, batched, *beam_and_layer):
    *beam, layer = beam_and_layer
    return beams(*_batch(size, batched[:-1], beam), layer), True

  return call


@functools.cache
def _one_prompt(implementation: Implementation | None, divide: Divide | None, precision: str | None) -> Callable:
  """Attention of a prompt's beams [K, B, T, A, D], each with its memory; batched over prompts."""
  all_beams = functools.partial(_all_beams, implementation, precision)
  all_prompts = lambda *arguments: _all_prompts(all_beams, *arguments)
  if divide is not None:
    all_prompts = divide(all_prompts)

  @jax.custom_batching.custom_vmap
  def call(*beams_and_layer):
    if divide is None:
      return all_beams(*beams_and_layer)
    *beams, layer = beams_and_layer
    return all_prompts(*(x[None] for x in beams), layer)[0]

  @call.def_vmap
  def rule(size, batched, *beams_and_layer):
    *beams, layer = beams_and_layer
    return all_prompts(*_batch(size, batched[:-1], beams), layer), True

  return call


def _batch(size: int, batched, arrays) -> tuple:
  """Gives every array a leading batch axis."""
  return tuple(
    x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
    for x, is_batched in zip(arrays, batched, strict=True)
  )


def _all_prompts(all_beams: Callable, q: jax.Array, *memory_and_layer: HostArray) -> jax.Array:
  """Attention [G, K, B, T, A, D] of all beams of G prompts; they are beams like any others."""
  *memory, layer = memory_and_layer
  merge = lambda x: x.reshape(-1, *x.shape[2:])
  return all_beams(merge(q), *map(merge, memory), layer).reshape(q.shape)


def _all_beams(
  implementation: Implementation | None, precision: str | None, q, k, v, mk, mv, count, cos, sin, layer
) -> jax.Array:
  """Attention [K, B, T, A, D] of all candidates; `mk, mv` [K, L, R, A, T, D], `count` [K], `cos, sin` [K, R, D]."""
  arguments = (q, k, v, mk, mv, count, cos, sin, layer)
  interpreted = lambda kernel: {"default": functools.partial(kernel.attend_slots, interpret=True)}
  flash = {"tpu": flash_attention.attend_slots} if flash_attention.supports(q.shape[-1]) else {}
  triton = {"cuda": triton_attention.attend_slots} if triton_attention.supports(q.shape[-1]) else {}
  choices = {
    None: {"default": _fold} | flash,
    "fold": {"default": _fold},
    "flash": interpreted(flash_attention) | flash,
    "triton": interpreted(triton_attention) | triton,
  }
  with jax.default_matmul_precision(precision):
    return jax.lax.platform_dependent(*arguments, **choices[implementation])


def _logits(equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)


def _weigh(equation: str, weights: jax.Array, v: jax.Array) -> jax.Array:
  return jnp.einsum(equation, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _begin(logits: jax.Array, weigh: Callable) -> _Partial:
  """Softmax over the first keys."""
  peak = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp(logits - peak)
  return _Partial(weigh(weights), peak, weights.sum(axis=-1, keepdims=True))


def _fold(q, k, v, mk, mv, count, cos, sin, layer) -> jax.Array:
  """One slot after the other, all heads at once; candidates are rows of the same product with a slot."""
  q, k, v = (x.transpose(0, 3, 1, 2, 4) for x in (q, k, v))
  beams, heads, candidates, tokens, width = q.shape
  own = _begin(_logits("nabqd,nabkd->nabqk", q, k), lambda w: _weigh("nabqk,nabkd->nabqd", w, v))
  rows = lambda x: x.reshape(beams, heads, candidates * tokens, -1)

  def visit(slot, partial):
    start, size = (0, layer, slot, 0, 0, 0), (beams, 1, 1, heads, tokens, width)
    at_slot = lambda cache: jax.lax.dynamic_slice(cache, start, size).reshape(beams, heads, tokens, width)
    by = FrameTurns(*(jax.lax.dynamic_index_in_dim(x, slot, 1)[:, None] for x in (cos, sin)))
    valid = (slot < count).reshape(-1, 1, 1, 1)
    logits = _logits("naqd,nakd->naqk", turn(rows(q), by).astype(q.dtype), at_slot(mk))
    peak = jnp.maximum(partial.peak, jnp.where(valid, logits.max(axis=-1, keepdims=True), -jnp.inf))
    weights = jnp.where(valid, jnp.exp(logits - peak), 0.0)
    keep = jnp.exp(partial.peak - peak)
    acc = partial.acc * keep + _weigh("naqk,nakd->naqd", weights, at_slot(mv))
    return _Partial(acc, peak, partial.total * keep + weights.sum(axis=-1, keepdims=True))

  # On a mesh each device goes by its own beams: it need not ask the others for the largest count.
  partial = jax.lax.fori_loop(0, count.max(), visit, jax.tree.map(rows, own))
  return (partial.acc / partial.total).reshape(q.shape).transpose(0, 2, 3, 1, 4)
