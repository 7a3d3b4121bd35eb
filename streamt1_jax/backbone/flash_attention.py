"""Attention over memory slots as one Pallas kernel for TPUs.

  for every head of every candidate, for every block of its queries:
    the chunk's own keys, then slot after slot: scores, running softmax, weighted sum of values

Scores never leave the core's own memory, slots are read where they lie, and the grid is as long as there are visible
slots, a number that is data. Queries, and the chunk's own keys and values, keep their layout [T, A, D]: as [T, A * D]
the channels of a head are a block of columns, so nothing is transposed. Same mathematics as `attention`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from streamt1_jax.typing import IntScalar

_LANES = 128
_MAX_QUERIES = 1024  # rows of a block: a visible slot is read once for each block
_MAX_KEYS = 1536  # keys scored at once; with _MAX_QUERIES it bounds the scores, 6 MiB in float32
_VMEM_BYTES = 48 << 20  # of 64 MiB on the smallest core (TPU7x); compilers assume 16 or 32 unless told


def supports(width: int) -> bool:
  """Whether TPUs can run the kernel for heads of `width` channels."""
  return width % _LANES == 0


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
  """Attention of all candidates of all beams to themselves and to the valid slots of their beam.

  Args:
    q: rotated and scaled queries.
    k: rotated keys of the chunk itself.
    v: its values.
    mk: rotated keys of the slots.
    mv: their values.
    count: valid slots.
    cos: cosines of the queries' turns for every slot, see `nn.rotary.FrameTurns`.
    sin: their sines.
    layer: block.
    interpret: runs on any platform, by emulating a TPU core.
  """
  beams, candidates, tokens, heads, width = q.shape
  rows = min(tokens, _round_up(pl.cdiv(tokens, pl.cdiv(tokens, _MAX_QUERIES)), 16))
  grid = (beams, heads, candidates, pl.cdiv(tokens, rows), 1 + count.max())
  columns = lambda x: x.reshape(beams, candidates, tokens, heads * width)
  visited = lambda n, step, count: jnp.maximum(jnp.minimum(step, count[n]) - 1, 0)
  queries = pl.BlockSpec((None, None, rows, width), lambda n, a, b, i, s, layer, count: (n, b, i, a))
  own = pl.BlockSpec((None, None, tokens, width), lambda n, a, b, i, s, layer, count: (n, b, 0, a))
  slot = pl.BlockSpec(
    (None, None, None, None, tokens, width),
    lambda n, a, b, i, s, layer, count: (n, layer[0], visited(n, s, count), a, 0, 0),
  )
  turns = pl.BlockSpec((None, None, 1, width), lambda n, a, b, i, s, layer, count: (n, visited(n, s, count), 0, 0))
  call = pl.pallas_call(
    _kernel,
    out_shape=jax.ShapeDtypeStruct((beams, candidates, tokens, heads * width), jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=grid,
      in_specs=[queries, own, own, slot, slot, turns, turns],
      out_specs=queries,
      scratch_shapes=[pltpu.VMEM((rows, size), jnp.float32) for size in (width, 1, 1)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * 4 + ("arbitrary",), vmem_limit_bytes=_VMEM_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      # With every slot in use but the one that the chunk itself will take.
      flops=4 * q.size * tokens * mk.shape[2],
      bytes_accessed=(q.size + k.size + v.size) * q.dtype.itemsize
      + q.size * 4
      + (mk.size + mv.size) * mk.dtype.itemsize,
      transcendentals=q.size // width * tokens * mk.shape[2],
    ),
    interpret=pltpu.InterpretParams() if interpret else False,
  )
  row = lambda x: x[:, :, None]
  inputs = columns(q), columns(k), columns(v), mk, mv, row(cos), row(sin)
  return call(layer.reshape(1), count, *inputs).reshape(q.shape)


def _kernel(layer, count, q, k, v, mk, mv, cos, sin, out, acc, peak, total):
  """One block of queries and one set of keys; the last axis of the grid goes through the sets, its own one first."""
  del layer
  beam, step = pl.program_id(0), pl.program_id(4)

  @pl.when(step == 0)
  def _own():
    acc[...] = jnp.zeros_like(acc)
    peak[...] = jnp.full_like(peak, -jnp.inf)
    total[...] = jnp.zeros_like(total)
    _attend(q[...], k, v, acc, peak, total)

  @pl.when((step > 0) & (step <= count[beam]))
  def _slot():
    queries = q[...].astype(jnp.float32)
    turned = queries * cos[...] + pltpu.roll(queries, queries.shape[-1] // 2, 1) * sin[...]
    _attend(turned.astype(q.dtype), mk, mv, acc, peak, total)

  @pl.when(step == pl.num_programs(4) - 1)
  def _finish():
    out[...] = (acc[...] / total[...]).astype(out.dtype)


def _attend(q, k, v, acc, peak, total):
  for start in range(0, k.shape[0], _MAX_KEYS):
    keys = pl.ds(start, min(_MAX_KEYS, k.shape[0] - start))
    scores = jax.lax.dot_general(q, k[keys], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    new_peak = jnp.maximum(peak[...], scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_peak)
    keep = jnp.exp(peak[...] - new_peak)
    total[...] = total[...] * keep + weights.sum(axis=-1, keepdims=True)
    values = jnp.dot(weights.astype(v.dtype), v[keys], preferred_element_type=jnp.float32)
    acc[...] = acc[...] * keep + values
    peak[...] = new_peak


def _round_up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple
