"""A new prompt in the middle of a video: what the memory holds is computed anew under it, as far as it is asked to.

The text reaches keys and values through every block but the first, so what was remembered under the old prompt pulls
the next chunks back to it. Between two chunks, every beam:

  sinks     what becomes of them, and which slots are computed anew: `SWITCH_SINKS`
  recache   how these are computed: `RECACHES`

Nothing else changes: no label, flag, noise, seed or decoder state. Inputs are the latents of the slots, not their keys,
so doing it twice with one prompt is doing it once. Source: docs/reference/interactive.md.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from streamt1_jax.backbone.attention import MemoryView, attend_with_memory
from streamt1_jax.backbone.dit import Attend, ChunkMemory
from streamt1_jax.config import ModelConfig, SearchConfig, SwitchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.memory_sinking import (
  Memory,
  SinkAccumulator,
  last_sink_slot,
  longest_distance,
  placed_frames,
  slot_of,
  valid_slots,
)
from streamt1_jax.nn.rotary import frame_turns, turns_of
from streamt1_jax.typing import IntScalar, Queries


@runtime_checkable
class Forward(Protocol):
  """The clean pass of one chunk or several under the new prompt, with any self-attention."""

  def __call__(
    self, latents: Float32[Array, "frames C H W"], attend: Attend
  ) -> tuple[Float32[Array, "frames C H W"], ChunkMemory]: ...


class Recached(NamedTuple):
  """What a recache leaves.

  Attributes:
    memory: the memory under the new prompt.
    velocity: of the chunk in every slot at the context timestep; zeros where nothing was computed.
  """

  memory: Memory
  velocity: Float32[Array, "R F C H W"]


class Sinks(NamedTuple):
  """What becomes of the sinks at a switch.

  Attributes:
    prepare: changes the labels of a memory, and tells which of its slots are to be computed anew.
    most: static; how many these are at most once a chunk has left the window. Before that they are all there are.
  """

  prepare: Callable[[Memory, ModelConfig], tuple[Memory, Bool[Array, " R"]]]
  most: Callable[[ModelConfig, SearchConfig], int]


def recache(
  memory: Memory,
  forward: Forward,
  first_frame: IntScalar,
  model: ModelConfig,
  search: SearchConfig,
  switch: SwitchConfig,
  execution: Execution,
) -> Recached:
  """The memory of one beam between two chunks, under a new prompt.

  Args:
    memory: before the chunk that begins at `first_frame` makes room in it.
    forward: the clean pass under the new prompt.
    first_frame: of the next chunk.
    model: static.
    search: static.
    switch: static; how.
    execution: static.
  """
  sinks = SWITCH_SINKS[switch.sinks]
  memory, targets = sinks.prepare(memory, model)
  run = lambda count: (
    lambda: RECACHES[switch.recache](_Inputs(memory, targets, forward, first_frame, model, search, execution), count)
  )
  early, rolled = model.local_attention_frames // model.chunk_frames, sinks.most(model, search)
  if early == rolled:
    return run(early)()
  return jax.lax.cond(first_frame <= model.local_attention_frames, run(early), run(rolled))


def _never_rolled(memory: Memory) -> jax.Array:
  """Whether every chunk of the video is still in the memory."""
  return memory.departed.frame < 0


def _window_slots(model: ModelConfig, search: SearchConfig) -> int:
  return model.window_chunks


def _keep(memory: Memory, model: ModelConfig) -> tuple[Memory, jax.Array]:
  # The released guard of the sinks works once the cache has rolled. Before, they are rewritten with the rest.
  return memory, valid_slots(memory) & (~memory.is_sink | _never_rolled(memory))


def _recache(memory: Memory, model: ModelConfig) -> tuple[Memory, jax.Array]:
  return memory, valid_slots(memory)


def _first(memory: Memory, model: ModelConfig) -> tuple[Memory, jax.Array]:
  first = ~memory.is_sink | (memory.frame < model.sink_frames)
  return _keep(_only(memory, valid_slots(memory) & first), model)


def _move(memory: Memory, model: ModelConfig) -> tuple[Memory, jax.Array]:
  sinks = valid_slots(memory) & memory.is_sink
  # One slot is enough for the new sink.
  first = jnp.arange(memory.frame.shape[0]) == jnp.argmin(jnp.where(sinks, memory.frame, jnp.iinfo(jnp.int32).max))
  moved = first & ~_never_rolled(memory)
  memory = memory._replace(
    frame=jnp.where(moved, memory.departed.frame, memory.frame),
    latents=jnp.where(moved[:, None, None, None, None], memory.departed.latents[None], memory.latents),
  )
  memory = _only(memory, valid_slots(memory) & (~memory.is_sink | first | _never_rolled(memory)))
  return memory, valid_slots(memory)


def _only(memory: Memory, kept: jax.Array) -> Memory:
  """The memory without the slots that are not kept; valid slots stay a prefix."""
  order = jnp.argsort(~kept, stable=True)
  take = lambda entries: entries[order]
  frame_before = memory.frame[last_sink_slot(memory)]
  memory = memory._replace(
    k=memory.k[:, order],
    v=memory.v[:, order],
    frame=take(memory.frame),
    is_sink=take(memory.is_sink),
    flags=jax.tree.map(take, memory.flags),
    latents=take(memory.latents),
    count=kept.sum(dtype=jnp.int32),
  )
  return _accumulate_anew(memory, memory.frame[last_sink_slot(memory)] != frame_before)


def _accumulate_anew(memory: Memory, anew: jax.Array) -> Memory:
  """Where `anew` (bool scalar) holds, the accumulator of averages begins again with the last sink."""
  if memory.accumulator is None:
    return memory
  last = last_sink_slot(memory)
  now = SinkAccumulator(*(slot_of(cache, last).astype(jnp.float32) for cache in (memory.k, memory.v)))
  return memory._replace(accumulator=jax.tree.map(lambda x, y: jnp.where(anew, x, y), now, memory.accumulator))


SWITCH_SINKS: dict[str, Sinks] = {
  "keep": Sinks(_keep, _window_slots),
  "recache": Sinks(_recache, lambda model, search: search.max_sink_frames // model.chunk_frames + model.window_chunks),
  "first": Sinks(_first, _window_slots),
  "move": Sinks(_move, lambda model, search: 1 + model.window_chunks),
}
"""By the names that `SwitchConfig.sinks` has."""


class Seen(NamedTuple):
  """What a chunk sees of some slots.

  Attributes:
    visible: whether it sees them at all.
    distance: latent frames from its first frame back to theirs.
  """

  visible: Bool[Array, "*chunks slots"]
  distance: Int32[Array, "*chunks slots"]


class _Inputs(NamedTuple):
  """What the ways to recache have in common: arguments of `recache`, and the slots to be computed anew."""

  memory: Memory
  targets: jax.Array
  forward: Forward
  first_frame: jax.Array
  model: ModelConfig
  search: SearchConfig
  execution: Execution

  def oldest(self, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` slots to be computed anew, oldest first, and whether each exists."""
    at = jnp.where(self.targets, self.memory.frame, jnp.iinfo(jnp.int32).max)
    slots = jnp.argsort(at)[:count]
    return slots, self.targets[slots]

  def attend(
    self,
    q: Queries,
    k: Queries,
    v: Queries,
    slots_k: Float[Array, "slots A T D"],
    slots_v: Float[Array, "slots A T D"],
    seen: Seen,
  ) -> Queries:
    """Attention of one chunk to itself and to the slots that it can see."""
    order = jnp.argsort(~seen.visible, stable=True)[: self.memory.frame.shape[0]]
    longest = longest_distance(self.model, self.search)
    turns = turns_of(frame_turns(q.shape[-1], longest), jnp.where(seen.visible, seen.distance, 0)[order])
    view = MemoryView(slots_k[order][None], slots_v[order][None], seen.visible.sum(dtype=jnp.int32), turns)
    options = self.execution.attention, self.execution.divide_attention
    return attend_with_memory(q, k, v, view, jnp.int32(0), *options)


def _none(inputs: _Inputs, count: int) -> Recached:
  return Recached(inputs.memory, jnp.zeros_like(inputs.memory.latents))


def _released(inputs: _Inputs, count: int) -> Recached:
  """One forward of all chunks: each sees all others, later ones too, and the sinks that are kept."""
  memory, frames = inputs.memory, inputs.model.chunk_frames
  slots, exists = inputs.oldest(count)
  # As the newest chunk has seen them.
  placed = placed_frames(memory, inputs.first_frame - frames, inputs.model, inputs.search)
  kept = valid_slots(memory) & ~inputs.targets
  others = exists[None] & ~jnp.eye(count, dtype=bool)
  visible = jnp.concatenate([jnp.broadcast_to(kept[None], (count, len(kept))), others], axis=1)
  seen = Seen(visible, placed[slots][:, None] - jnp.concatenate([placed, placed[slots]])[None])

  def attend(q: Queries, k: Queries, v: Queries, layer: IntScalar) -> Queries:
    by_chunk = lambda x: x.reshape(count, -1, *x.shape[1:])
    remembered = lambda cache: jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
    together = lambda cache, own: jnp.concatenate([remembered(cache), by_chunk(own).swapaxes(1, 2)])
    slots_k, slots_v = together(memory.k, k), together(memory.v, v)
    one = lambda q, k, v, seen: inputs.attend(q, k, v, slots_k, slots_v, seen)
    return jax.vmap(one)(by_chunk(q), by_chunk(k), by_chunk(v), seen).reshape(q.shape)

  latents = memory.latents[slots]
  velocity, chunks = inputs.forward(latents.reshape(-1, *latents.shape[2:]), attend)
  divide = lambda x: jnp.split(x, count, axis=2)
  for slot, exist, k, v in zip(slots, exists, divide(chunks.k), divide(chunks.v), strict=True):
    memory = _write(memory, slot, exist, ChunkMemory(k, v))
  return _finish(inputs, memory, slots, exists, velocity.reshape(latents.shape))


def _causal(inputs: _Inputs, count: int) -> Recached:
  """Chunk by chunk, oldest first: each sees the sinks and what has been computed before it."""
  slots, exists = inputs.oldest(count)

  def step(memory: Memory, target: tuple[jax.Array, jax.Array]) -> tuple[Memory, jax.Array]:
    slot, exist = target
    first_frame = memory.frame[slot]
    placed = placed_frames(memory, first_frame, inputs.model, inputs.search)
    seen = Seen(valid_slots(memory) & (memory.frame < first_frame), first_frame - placed)

    def attend(q: Queries, k: Queries, v: Queries, layer: IntScalar) -> Queries:
      at_layer = lambda cache: jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
      return inputs.attend(q, k, v, at_layer(memory.k), at_layer(memory.v), seen)

    velocity, chunk = inputs.forward(memory.latents[slot], attend)
    return _write(memory, slot, exist, chunk), velocity

  memory, velocity = jax.lax.scan(step, inputs.memory, (slots, exists))
  return _finish(inputs, memory, slots, exists, velocity)


def _write(memory: Memory, slot: jax.Array, exists: jax.Array, chunk: ChunkMemory) -> Memory:
  # A choice slot by slot, which compilers write in place: `slot` differs from beam to beam.
  here = ((jnp.arange(memory.frame.shape[0]) == slot) & exists)[None, :, None, None, None]
  put = lambda cache, value: jnp.where(here, value.astype(cache.dtype)[:, None], cache)
  return memory._replace(k=put(memory.k, chunk.k), v=put(memory.v, chunk.v))


def _finish(inputs: _Inputs, memory: Memory, slots: jax.Array, exists: jax.Array, velocity: jax.Array) -> Recached:
  memory = _accumulate_anew(memory, inputs.targets[last_sink_slot(memory)])
  velocity = jnp.where(exists[:, None, None, None, None], velocity, 0.0)
  return Recached(memory, jnp.zeros_like(memory.latents).at[slots].add(velocity))


RECACHES: dict[str, Callable[[_Inputs, int], Recached]] = {
  "released": _released,
  "causal": _causal,
  "none": _none,
}
"""By the names that `SwitchConfig.recache` has; each computes a static number of slots, oldest first."""
