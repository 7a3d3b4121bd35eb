"""Memory Sinking: what leaves the attention window is discarded, averaged into the last sink, or kept as a new sink.

  discard   the chunk is forgotten
  ema       sink <- decay * sink + (1 - decay) * chunk, for the last sink             (Stream-T1, memory sinking)
  append    the chunk stays, as a new sink, while the sinks are below their maximum; at the maximum it becomes an ema

A beam's memory is a table of chunk slots. Slots 0..count-1 are valid, in no particular order: attention does not
care, keys are rotated at the frames of their own chunk when they are written, and the table says which slot is which
and where it is. So an append moves no data (it labels the slot anew), a commit writes one slot, and the last slot moves
into one that becomes free. Where a slot is decides how far a query turns to look at it (`view`), and nothing else:
positions may be as large as a video is long, and sinks may be seen nearer than they are (`placed_frames`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from streamt1_jax.backbone.attention import MemoryView
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.generator import Eviction
from streamt1_jax.nn.rotary import FrameTurns, turns_of
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.typing import IntLike, IntScalar, Latents

NOTHING, DISCARD, EMA, APPEND, APPEND_AT_MAXIMUM = range(5)
"""Routes of an `Eviction`."""
_NO_FRAME = jnp.iinfo(jnp.int32).max


class SinkAccumulator(NamedTuple):
  """The last sink in float32. A narrower memory needs it: `0.999 * x` rounds to `x` in bfloat16."""

  k: Float32[Array, "L A T D"]
  v: Float32[Array, "L A T D"]


class FinishedChunk(NamedTuple):
  """What a finished chunk leaves in the memory: keys and values of its clean pass, and itself."""

  k: Float[Array, "L A T D"]
  v: Float[Array, "L A T D"]
  latents: Latents


class Departed(NamedTuple):
  """A chunk that has left the window."""

  latents: Latents
  frame: IntScalar


class Memory(NamedTuple):
  """One beam's attention memory; R slots of one chunk each.

  Attributes:
    k: keys, rotated at the frames of their own chunk.
    v: values.
    frame: absolute index of the first latent frame in the slot.
    is_sink: whether the slot is a sink.
    flags: bool [R] each, how the chunk in the slot will be routed when it leaves the window.
    count: valid slots.
    latents: the latent chunk in every slot; keys and values can be computed from it again. A sink that others were
      averaged into keeps the latents it began with.
    departed: the chunk that left the window last, discarded or not, and its first frame; -1 if none did.
    accumulator: the last sink in float32, or None if the memory's own dtype serves.
  """

  k: Float[Array, "L R A T D"]
  v: Float[Array, "L R A T D"]
  frame: Int32[Array, " R"]
  is_sink: Bool[Array, " R"]
  flags: Flags
  count: IntScalar
  latents: Float32[Array, "R F C H W"]
  departed: Departed
  accumulator: SinkAccumulator | None


def memory_slots(model: ModelConfig, search: SearchConfig) -> int:
  """Slots a beam needs: the sinks at their maximum and the window, current chunk included."""
  return search.max_sink_frames // model.chunk_frames + model.window_chunks


def empty_memory(model: ModelConfig, search: SearchConfig, dtype: DTypeLike) -> Memory:
  """Memory of one beam in `dtype`, without a chunk."""
  c, slots = model.backbone, memory_slots(model, search)
  chunk = (c.num_heads, model.chunk_tokens, c.head_dim)
  cache = jnp.zeros((c.num_layers, slots, *chunk), dtype)
  no_slot = jnp.zeros(slots, bool)
  narrow = search.sink_ema_dtype == "float32" and dtype != jnp.float32
  accumulator = jnp.zeros((c.num_layers, *chunk), jnp.float32)
  return Memory(
    k=cache,
    v=jnp.zeros_like(cache),
    frame=jnp.full(slots, -1, jnp.int32),
    is_sink=no_slot,
    flags=Flags(no_slot, no_slot),
    count=jnp.int32(0),
    latents=jnp.zeros((slots, *model.latent_shape)),
    departed=Departed(jnp.zeros(model.latent_shape), jnp.int32(-1)),
    accumulator=SinkAccumulator(accumulator, jnp.zeros_like(accumulator)) if narrow else None,
  )


def view(
  memory: Memory, first_frame: IntLike, turns: FrameTurns, model: ModelConfig, search: SearchConfig
) -> MemoryView:
  """What attention reads from a chunk that begins at `first_frame`.

  `turns` are those of 0 to `longest_distance` frames.
  """
  distance = first_frame - placed_frames(memory, first_frame, model, search)
  return MemoryView(memory.k, memory.v, memory.count, turns_of(turns, jnp.where(valid_slots(memory), distance, 0)))


def placed_frames(memory: Memory, first_frame: IntLike, model: ModelConfig, search: SearchConfig) -> Int32[Array, " R"]:
  """Where a chunk that begins at `first_frame` sees the first frame of every slot.

  That is where it is, unless the search has a `sink_distance`: the first sink is then never farther away. All sinks
  move by as much as the first one, in their order, but never past the beginning of the window. What does not come
  before the chunk stays where it is and moves nothing: when a sink is computed anew, later ones are in the memory.
  """
  if search.sink_distance is None:
    return memory.frame
  at = lambda mask: jnp.where(mask, memory.frame, _NO_FRAME)
  earlier = valid_slots(memory) & (memory.frame < first_frame)
  sinks, window = earlier & memory.is_sink, earlier & ~memory.is_sink
  shift = jnp.maximum(first_frame - search.sink_distance - at(sinks).min(), 0)
  window_start = jnp.minimum(at(window).min(), first_frame)
  later_sinks = (sinks[None] & (memory.frame[None] > memory.frame[:, None])).sum(axis=1)
  nearest = window_start - model.chunk_frames * (1 + later_sinks)
  return jnp.where(sinks, jnp.minimum(memory.frame + shift, nearest), memory.frame)


def longest_distance(model: ModelConfig, search: SearchConfig) -> int:
  """Most latent frames between the first frame of a chunk and what it sees of a slot."""
  if search.sink_distance is None:
    return model.backbone.max_frames
  return max(search.sink_distance, search.max_sink_frames + model.local_attention_frames)


def _first_window_slot(memory: Memory) -> IntScalar:
  in_window = valid_slots(memory) & ~memory.is_sink
  return jnp.argmin(jnp.where(in_window, memory.frame, _NO_FRAME))


def last_sink_slot(memory: Memory) -> IntScalar:
  """The slot of the newest sink."""
  return jnp.argmax(jnp.where(valid_slots(memory) & memory.is_sink, memory.frame, -1))


def valid_slots(memory: Memory) -> Bool[Array, " R"]:
  """Whether each slot holds a chunk."""
  return jnp.arange(memory.frame.shape[0]) < memory.count


@jax.custom_batching.custom_vmap
def slot_of(cache: Float[Array, "L R A T D"], slot: IntScalar) -> Float[Array, "L A T D"]:
  """Keys or values of one slot."""
  return jax.lax.dynamic_index_in_dim(cache, slot, 1, keepdims=False)


@slot_of.def_vmap
def _slot_of_every_beam(size, batched, cache, slot):
  # Beam by beam: a TPU would copy all memories into another layout and back to gather or scatter over beams. The
  # barrier keeps the compiler from reading slots again, out of a copy of all of them, while others are being written.
  assert all(batched)
  shape = (1, cache.shape[1], 1, *cache.shape[3:])
  slots = [jax.lax.dynamic_slice(cache, _start(cache, beam, slot[beam]), shape) for beam in range(size)]
  return jax.lax.optimization_barrier(jnp.concatenate(slots).squeeze(2)), True


@jax.custom_batching.custom_vmap
def with_slot(
  cache: Float[Array, "L R A T D"], slot: IntScalar, value: Float[Array, "L A T D"]
) -> Float[Array, "L R A T D"]:
  """The cache with keys or values in one slot."""
  return jax.lax.dynamic_update_index_in_dim(cache, value.astype(cache.dtype), slot, 1)


@with_slot.def_vmap
def _with_slot_of_every_beam(size, batched, cache, slot, value):
  assert all(batched)
  value = value.astype(cache.dtype)
  for beam in range(size):
    cache = jax.lax.dynamic_update_slice(cache, value[beam, :, None][None], _start(cache, beam, slot[beam]))
  return cache, True


def _start(cache: Float[Array, "K L R A T D"], beam: int, slot: IntScalar) -> tuple[int | IntScalar, ...]:
  return (beam, 0, slot, *(0,) * (cache.ndim - 3))


def _choose_route(memory: Memory, leaving: jax.Array, model: ModelConfig, search: SearchConfig) -> jax.Array:
  window = (valid_slots(memory) & ~memory.is_sink).sum()
  sinks = (valid_slots(memory) & memory.is_sink).sum()
  room = sinks < search.max_sink_frames // model.chunk_frames
  ema, append = memory.flags.ema[leaving], memory.flags.append[leaving]
  route = jnp.where(append, jnp.where(room, APPEND, APPEND_AT_MAXIMUM), jnp.where(ema, EMA, DISCARD))
  return jnp.where(window < model.window_chunks, NOTHING, route).astype(jnp.int32)


def mix(sink: Float[Array, "*axes"], chunk: Float[Array, "*axes"], decay: float) -> Float[Array, "*axes"]:
  """decay * sink + (1 - decay) * chunk, every product rounded to the sink's dtype as in the released code."""
  product = lambda x, weight: (x.astype(jnp.float32) * weight).astype(sink.dtype)
  return product(sink, decay) + product(chunk, 1.0 - decay)


def _merge_into_sink(memory: Memory, sink: jax.Array, leaving: jax.Array, decay: float):
  """The sink before and after the EMA. Keys of equal frames of their chunks mix, wherever the chunks are."""
  keys, values = slot_of(memory.k, leaving), slot_of(memory.v, leaving)
  old = memory.accumulator or SinkAccumulator(slot_of(memory.k, sink), slot_of(memory.v, sink))
  return old, SinkAccumulator(mix(old.k, keys, decay), mix(old.v, values, decay))


def _update_sink(memory: Memory, sink: jax.Array, leaving: jax.Array, merge: jax.Array, decay: float) -> Memory:
  """Writes the EMA into the sink's slot where `merge` (bool scalar) holds; touches no other slot."""
  old, new = _merge_into_sink(memory, sink, leaving, decay)
  k = jnp.where(merge, new.k.astype(memory.k.dtype), slot_of(memory.k, sink))
  v = jnp.where(merge, new.v.astype(memory.v.dtype), slot_of(memory.v, sink))
  accumulator = memory.accumulator
  if accumulator is not None:
    accumulator = jax.tree.map(lambda new, old: jnp.where(merge, new, old), new, old)
  return memory._replace(k=with_slot(memory.k, sink, k), v=with_slot(memory.v, sink, v), accumulator=accumulator)


def _free(memory: Memory, slot: jax.Array, free: jax.Array) -> Memory:
  """Where `free` (bool scalar) holds, moves the last valid slot into this one: valid slots stay a prefix."""
  source = jnp.where(free, memory.count - 1, slot)
  move = lambda cache: with_slot(cache, slot, slot_of(cache, source))
  move_entry = lambda entries: entries.at[slot].set(entries[source])
  return memory._replace(
    k=move(memory.k),
    v=move(memory.v),
    frame=move_entry(memory.frame),
    is_sink=move_entry(memory.is_sink),
    flags=jax.tree.map(move_entry, memory.flags),
    latents=move_entry(memory.latents),
    count=memory.count - free,
  )


def _label_sink(memory: Memory, slot: jax.Array, label: jax.Array) -> Memory:
  """Where `label` (bool scalar) holds, the slot becomes the last sink; no data moves."""
  accumulator = memory.accumulator
  if accumulator is not None:
    latest = lambda cache, old: jnp.where(label, slot_of(cache, slot).astype(jnp.float32), old)
    accumulator = SinkAccumulator(latest(memory.k, accumulator.k), latest(memory.v, accumulator.v))
  is_sink = memory.is_sink.at[slot].set(memory.is_sink[slot] | label)
  return memory._replace(is_sink=is_sink, accumulator=accumulator)


def evict(memory: Memory, model: ModelConfig, search: SearchConfig) -> tuple[Memory, Eviction]:
  """Makes room for the next chunk: if the window is full, routes its oldest chunk by the flags its scores gave it.

  Written without branches, slot by slot: under `vmap` a branch would select between whole memories.
  """
  leaving, sink = _first_window_slot(memory), last_sink_slot(memory)
  route = _choose_route(memory, leaving, model, search)
  merge = (route == EMA) | (route == APPEND_AT_MAXIMUM)
  eviction = Eviction(
    route=route,
    frame=jnp.where(route == NOTHING, -1, memory.frame[leaving]),
    sink_frame=jnp.where(merge, memory.frame[sink], -1),
  )
  departed = Departed(memory.latents[leaving], memory.frame[leaving])
  memory = memory._replace(
    departed=jax.tree.map(lambda x, y: jnp.where(route == NOTHING, x, y), memory.departed, departed)
  )
  memory = _update_sink(memory, sink, leaving, merge, search.sink_ema_decay)
  memory = _label_sink(memory, leaving, route == APPEND)
  return _free(memory, leaving, merge | (route == DISCARD)), eviction


def commit(memory: Memory, chunk: FinishedChunk, flags: Flags, first_frame: IntLike, model: ModelConfig) -> Memory:
  """Writes a chunk into the first empty slot; the first `sink_frames` are sinks."""
  slot = memory.count
  put = lambda entries, value: entries.at[slot].set(value)
  memory = memory._replace(
    k=with_slot(memory.k, slot, chunk.k),
    v=with_slot(memory.v, slot, chunk.v),
    frame=put(memory.frame, first_frame),
    is_sink=put(memory.is_sink, False),
    flags=Flags(put(memory.flags.ema, flags.ema), put(memory.flags.append, flags.append)),
    latents=put(memory.latents, chunk.latents),
    count=memory.count + 1,
  )
  return _label_sink(memory, slot, jnp.asarray(first_frame < model.sink_frames))


def gather(memories: Memory, parents: Int32[Array, " K"]) -> Memory:
  """The memories [K, ...] of the beams at `parents`, moved block by block and within their own space."""
  # "clip", because the default mode checks every index against the size and selects over whole memories.
  take = lambda x: jnp.take(x, parents, axis=0, mode="clip")

  def move(layer, caches):
    moved = jax.tree.map(lambda cache: take(jax.lax.dynamic_index_in_dim(cache, layer, 1)), caches)
    return jax.tree.map(lambda c, m: jax.lax.dynamic_update_slice_in_dim(c, m, layer, 1), caches, moved)

  caches = memories.k, memories.v, memories.accumulator
  k, v, accumulator = jax.lax.fori_loop(0, memories.k.shape[1], move, caches)
  rest = jax.tree.map(take, memories._replace(k=None, v=None, accumulator=None))
  return rest._replace(k=k, v=v, accumulator=accumulator)
