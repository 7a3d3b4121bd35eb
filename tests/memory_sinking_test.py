"""Memory sinking against a model of its rules in plain Python: a list of chunks with raw keys and values.

The rules are those of tests/golden/README.md ("Cache"), which speaks of capacities in frames and of un-rotated keys;
the code under test has slots and rotated keys.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import memory_sinking
from streamt1_jax.config import BackboneConfig, ModelConfig, SearchConfig
from streamt1_jax.memory_sinking import APPEND, APPEND_AT_MAXIMUM, DISCARD, EMA, NOTHING, FinishedChunk
from streamt1_jax.reward_pruning import Flags

BEAMS = 2
ROWS, COLUMNS = 1, 2


def _model(attention, sink, chunk=3, max_frames=128):
  backbone = BackboneConfig(
    dim=24, ffn_dim=8, num_heads=2, num_layers=2, freq_dim=4, text_dim=4, text_len=2, max_frames=max_frames
  )
  return ModelConfig(
    name="rules",
    backbone=backbone,
    codec=None,
    text=None,
    latent_height=2 * ROWS,
    latent_width=2 * COLUMNS,
    chunk_frames=chunk,
    local_attention_frames=attention,
    sink_frames=sink,
  )


@functools.cache
def _angles(model):
  """Rotary angles [T, D / 2] of a chunk at its own frames, float64."""
  half = model.backbone.head_dim // 2
  space = model.backbone.head_dim // 6
  frame, row, column = np.meshgrid(np.arange(model.chunk_frames), np.arange(ROWS), np.arange(COLUMNS), indexing="ij")
  axis = lambda position, pairs: position.reshape(-1, 1) * 10000.0 ** (-np.arange(pairs) / pairs)
  return np.concatenate([axis(frame, half - 2 * space), axis(row, space), axis(column, space)], axis=1)


def _turn(keys, model, sign=1):
  """Rotates keys [..., T, D] (pairs as halves) to the frames of their chunk, or back with sign -1."""
  half = keys.shape[-1] // 2
  turned = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(sign * 1j * _angles(model))
  return np.concatenate([turned.real, turned.imag], axis=-1)


@dataclasses.dataclass
class _Chunk:
  frame: int
  k: np.ndarray  # raw
  v: np.ndarray
  ema: bool
  append: bool


class _Rules:
  """One beam's cache: sinks, then window, each oldest first."""

  def __init__(self, model, search):
    self.model, self.search = model, search
    self.sinks, self.window = [], []
    self.capacity = model.local_attention_frames

  def evict(self):
    """Route, frame that left, frame of the sink that took it in."""
    size = self.model.chunk_frames
    if (len(self.sinks) + len(self.window) + 1) * size <= self.capacity:
      return NOTHING, -1, -1
    oldest = self.window.pop(0)
    if oldest.append and len(self.sinks) * size < self.search.max_sink_frames:
      self.sinks.append(oldest)
      self.capacity += size
      return APPEND, oldest.frame, -1
    if oldest.append or oldest.ema:
      sink, keep = self.sinks[-1], self.search.sink_ema_decay
      sink.k = keep * sink.k + (1 - keep) * oldest.k
      sink.v = keep * sink.v + (1 - keep) * oldest.v
      return (APPEND_AT_MAXIMUM if oldest.append else EMA), oldest.frame, sink.frame
    return DISCARD, oldest.frame, -1

  def commit(self, chunk):
    group = self.sinks if chunk.frame < self.model.sink_frames else self.window
    group.append(chunk)


def _random_chunk(generator, model, frame, dtype):
  """A chunk, and its keys and values as the code under test gets them; both hold the same rounded numbers."""
  shape = (model.backbone.num_layers, model.backbone.num_heads, model.chunk_tokens, model.backbone.head_dim)
  narrow = lambda x: np.asarray(jnp.asarray(x, dtype))
  v = narrow(generator.standard_normal(shape))
  k = narrow(_turn(generator.standard_normal(shape), model))
  # Neither, ema, append; each a third of the time.
  kind = generator.integers(3)
  raw = _turn(k.astype(np.float64), model, sign=-1)
  return _Chunk(frame, raw, v.astype(np.float64), kind == 1, kind == 2), (k, v)


def _step(memory, chunk, flags, first_frame, model, search):
  """Eviction and commit of one beam; every chunk of a search has the same shapes, so it is traced once."""
  memory, eviction = memory_sinking.evict(memory, model, search)
  return memory_sinking.commit(memory, chunk, flags, first_frame, model), eviction


def _valid_slots(memory, model):
  """The valid slots by frame, which the rules do not order: numpy arrays, keys raw and in float64."""
  slots = np.argsort(memory.frame[: memory.count])
  raw = [_turn(memory.k[:, slot].astype(np.float64), model, sign=-1) for slot in slots]
  discrete = {name: getattr(memory, name)[slots] for name in ("frame", "is_sink")}
  return discrete | {name: getattr(memory.flags, name)[slots] for name in Flags._fields}, {
    "k": np.stack(raw),
    "v": memory.v[:, slots].astype(np.float64).swapaxes(0, 1),
  }


def _expected_slots(rules):
  chunks = sorted(rules.sinks + rules.window, key=lambda chunk: chunk.frame)
  discrete = {
    "frame": np.array([chunk.frame for chunk in chunks], np.int32),
    "is_sink": np.array([any(chunk is sink for sink in rules.sinks) for chunk in chunks]),
  }
  discrete |= {name: np.array([getattr(chunk, name) for chunk in chunks]) for name in Flags._fields}
  return discrete, {name: np.stack([getattr(chunk, name) for chunk in chunks]) for name in ("k", "v")}


def _run(model, search, dtype=jnp.float32, atol=1e-5, num_chunks=40, seed=0, transform=jax.jit):
  """Both beams, with flags of their own, against the rules after every chunk; the routes that were taken."""
  generator = np.random.default_rng(seed)
  memory = jax.vmap(lambda: memory_sinking.empty_memory(model, search, dtype), axis_size=BEAMS)()
  rules = [_Rules(model, search) for _ in range(BEAMS)]
  one_beam = functools.partial(_step, model=model, search=search)
  step, routes = transform(jax.vmap(one_beam, in_axes=(0, 0, 0, None))), []
  for index in range(num_chunks):
    frame = index * model.chunk_frames
    chunks, arrays = zip(*(_random_chunk(generator, model, frame, dtype) for _ in rules), strict=True)
    expected = [beam.evict() for beam in rules]
    for beam, chunk in zip(rules, chunks, strict=True):
      beam.commit(chunk)
    k, v = (np.stack(parts) for parts in zip(*arrays, strict=True))
    flags = Flags(*(np.array([getattr(chunk, name) for chunk in chunks]) for name in Flags._fields))
    before = memory
    memory, eviction = step(
      memory, FinishedChunk(k, v, np.zeros((BEAMS, *model.latent_shape), np.float32)), flags, jnp.int32(frame)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, before)
    chex.assert_tree_shape_prefix((memory, eviction), (BEAMS,))
    np.testing.assert_array_equal(np.stack(eviction, axis=1), expected)
    host = jax.device_get(memory)
    for beam, follow in enumerate(rules):
      found = _valid_slots(jax.tree.map(lambda x, beam=beam: x[beam], host), model)
      should = _expected_slots(follow)
      chex.assert_trees_all_equal(found[0], should[0])
      chex.assert_trees_all_close(found[1], should[1], rtol=0, atol=atol)
    routes += [route for route, _, _ in expected]
  return rules, host, set(routes)


EVERY_ROUTE = {NOTHING, DISCARD, EMA, APPEND, APPEND_AT_MAXIMUM}


@pytest.mark.parametrize(
  ("attention", "sink", "maximum", "chunk", "routes"),
  [
    (12, 3, 9, 3, EVERY_ROUTE),
    (12, 3, 3, 3, EVERY_ROUTE - {APPEND}),  # no growth allowed
    (15, 6, 12, 3, EVERY_ROUTE),  # the first sinks are two chunks
    (24, 3, 15, 3, EVERY_ROUTE),
    (6, 3, 6, 3, EVERY_ROUTE),  # the window is the current chunk alone
    (5, 1, 3, 1, EVERY_ROUTE),
  ],
)
def test_forty_chunks(attention, sink, maximum, chunk, routes):
  search = SearchConfig(max_sink_frames=maximum, sink_ema_decay=0.7)
  assert _run(_model(attention, sink, chunk), search)[2] == routes


class TestStep(chex.TestCase):
  """A window that is full after four chunks, and at most two sinks beside the first."""

  MODEL, SEARCH = _model(12, 3), SearchConfig(max_sink_frames=9, sink_ema_decay=0.7)

  @chex.variants(with_jit=True, without_jit=True)
  def test_rules(self):
    assert _run(self.MODEL, self.SEARCH, num_chunks=20, transform=self.variant)[2] == EVERY_ROUTE

  def test_one_trace_for_any_video(self):
    """A chunk's frame and flags are data: nothing is compiled for chunk 20 that was not for chunk 0."""
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(_step, n=1)
    model, search = self.MODEL, self.SEARCH
    step = jax.jit(functools.partial(counted, model=model, search=search))
    memory = memory_sinking.empty_memory(model, search, jnp.float32)
    c = model.backbone
    keys, values = np.ones((2, c.num_layers, c.num_heads, model.chunk_tokens, c.head_dim), np.float32)
    chunk = FinishedChunk(keys, values, np.zeros(model.latent_shape, np.float32))
    for index in range(20):
      flags = Flags(np.bool_(index % 3 == 1), np.bool_(index % 3 == 2))
      memory, _ = step(memory, chunk, flags, np.int32(index * model.chunk_frames))


def test_capacity():
  """Sinks at their maximum and a full window fill the slots: (9 + 12 - 3) / 3."""
  model, search = _model(12, 3), SearchConfig(max_sink_frames=9)
  assert memory_sinking.memory_slots(model, search) == 6
  rules, memory, _ = _run(model, search, num_chunks=20)
  assert [len(beam.sinks) for beam in rules] == [3, 3]
  assert list(memory.count) == [6, 6]


@pytest.mark.parametrize("keep", ["compute", "float32"])
def test_float32_memory_needs_no_accumulator(keep):
  memory = memory_sinking.empty_memory(_model(12, 3), SearchConfig(sink_ema_dtype=keep), jnp.float32)
  assert memory.accumulator is None


def test_bfloat16_memory_with_float32_sinks():
  """The accumulator follows the rules as closely as a float32 memory does; the memory holds it rounded."""
  model = _model(12, 3)
  search = SearchConfig(max_sink_frames=6, sink_ema_decay=0.7, sink_ema_dtype="float32")
  rules, memory, routes = _run(model, search, jnp.bfloat16, atol=0.03)
  assert routes == EVERY_ROUTE
  for beam, expected in enumerate(rules):
    sink = expected.sinks[-1]
    k = np.asarray(memory.accumulator.k[beam], np.float64)
    np.testing.assert_allclose(_turn(k, model, sign=-1), sink.k, rtol=0, atol=1e-5)
    np.testing.assert_allclose(memory.accumulator.v[beam], sink.v, rtol=0, atol=1e-5)


def _distance_left(sink_ema_dtype):
  """Share of the distance to a fixed target that a bfloat16 sink keeps after 1000 updates, for keys and for values."""
  model = _model(9, 3, max_frames=3072)
  search = SearchConfig(max_sink_frames=3, sink_ema_dtype=sink_ema_dtype)
  shape = (model.backbone.num_layers, model.backbone.num_heads, model.chunk_tokens, model.backbone.head_dim)
  start, target = np.random.default_rng(0).standard_normal((2, *shape))
  frames = np.arange(1, 1003) * model.chunk_frames
  narrow = lambda x: jnp.asarray(x, jnp.bfloat16)
  key, latents = narrow(_turn(target, model)), jnp.zeros(model.latent_shape)
  flags, none = Flags(jnp.bool(True), jnp.bool(False)), Flags(jnp.bool(False), jnp.bool(False))

  def step(memory, frame):
    memory, eviction = memory_sinking.evict(memory, model, search)
    return memory_sinking.commit(
      memory, FinishedChunk(key, narrow(target), latents), flags, frame, model
    ), eviction.route

  @jax.jit
  def run():
    memory = memory_sinking.empty_memory(model, search, jnp.bfloat16)
    first = FinishedChunk(narrow(_turn(start, model)), narrow(start), latents)
    memory = memory_sinking.commit(memory, first, none, jnp.int32(0), model)
    return jax.lax.scan(step, memory, jnp.asarray(frames))

  memory, routes = run()
  assert (np.asarray(routes) == EMA).sum() == 1000
  sink = int(np.flatnonzero(np.asarray(memory.is_sink))[0])
  raw = _turn(np.asarray(memory.k[:, sink], np.float64), model, sign=-1)
  left = lambda sink: np.linalg.norm(sink - target) / np.linalg.norm(start - target)
  return left(raw), left(np.asarray(memory.v[:, sink], np.float64))


def test_float32_sinks_decay():
  """0.999^1000 = 0.368; keys and values themselves are rounded to eight bits."""
  np.testing.assert_allclose(_distance_left("float32"), 0.999**1000, atol=0.01)


def test_compute_dtype_loses_the_decay():
  """0.999 x rounds back to x in bfloat16: 0.927 of the distance is left."""
  np.testing.assert_allclose(_distance_left("compute"), 0.927, atol=0.025)


class TestPlacedFrames:
  """Where a chunk sees the sinks, by hand: one window of two chunks beside it, sinks of one chunk."""

  MODEL = _model(12, 3)

  def _placed(self, sink_distance, sinks, first_frame, window=None):
    """Frames of sinks and window as a chunk at `first_frame` sees them; the slots are out of order."""
    window = (first_frame - 6, first_frame - 3) if window is None else window
    frames, order = np.array([*sinks, *window]), [*range(1, len(sinks) + len(window)), 0]
    memory = memory_sinking.empty_memory(self.MODEL, SearchConfig(max_sink_frames=9), jnp.float32)
    valid = len(frames)
    fill = lambda entries, values: entries.at[:valid].set(jnp.asarray(np.asarray(values)[order], entries.dtype))
    memory = memory._replace(
      frame=fill(memory.frame, frames),
      is_sink=fill(memory.is_sink, [True] * len(sinks) + [False] * len(window)),
      count=jnp.int32(valid),
    )
    search = SearchConfig(max_sink_frames=9, sink_distance=sink_distance)
    placed = memory_sinking.placed_frames(memory, jnp.int32(first_frame), self.MODEL, search)[:valid]
    return list(np.asarray(placed)[np.argsort(order)])

  def test_no_distance_leaves_all_where_they_are(self):
    assert self._placed(None, [0, 6, 30], 300) == [0, 6, 30, 294, 297]

  def test_endless_videos_of_longlive(self):
    """The sink right before the window, for ever; at first it is there anyway."""
    assert self._placed(9, [0], 9) == [0, 3, 6]
    assert self._placed(9, [0], 300) == [291, 294, 297]
    assert self._placed(9, [0], 6, window=[3]) == [0, 3]

  def test_sinks_move_together_and_keep_their_order(self):
    assert self._placed(90, [0, 6, 30], 90) == [0, 6, 30, 84, 87]
    assert self._placed(90, [0, 6, 30], 102) == [12, 18, 42, 96, 99]

  def test_sinks_stop_at_the_window(self):
    """Shifted by 210, the last two would be at 261 and 270: the window begins at 294."""
    assert self._placed(90, [0, 51, 60], 300) == [210, 261, 270, 294, 297]
    assert self._placed(30, [0, 27, 60], 300) == [270, 288, 291, 294, 297]
    assert self._placed(9, [0, 27, 60], 300) == [285, 288, 291, 294, 297]

  def test_later_slots_move_nothing(self):
    """The sink at 6 is computed anew, and sees those at 0 and 3 where they are, whatever comes after it."""
    assert self._placed(90, [0, 3, 6], 6, window=[30, 33]) == [0, 3, 6, 30, 33]

  def test_a_first_sink_that_is_not_the_first_chunk(self):
    assert self._placed(90, [12], 96) == [12, 90, 93]
    assert self._placed(90, [12], 105) == [15, 99, 102]


def test_products_are_rounded_one_by_one():
  """Beside 1 in bfloat16 lie 255/256 and 1 + 1/128. 0.999 * 1 rounds to 1, and 1 - 0.001 to 1 once more.

  The sum of both products, 0.998, would round to 255/256. In float32 nothing is lost.
  """
  one = jnp.ones(1, jnp.bfloat16)
  assert memory_sinking.mix(one, -one, 0.999).tolist() == [1.0]
  assert memory_sinking.mix(one, -one, 0.999).dtype == jnp.bfloat16
  np.testing.assert_allclose(memory_sinking.mix(jnp.ones(1), -one, 0.999), [0.998], rtol=1e-6)


def test_beams_take_the_memories_of_their_parents():
  memory = memory_sinking.empty_memory(_model(9, 3), SearchConfig(), jnp.float32)
  generator = np.random.default_rng(0)
  beams = jax.tree.map(lambda x: np.asarray(generator.integers(100, size=(3, *x.shape)), x.dtype), memory)
  gathered = jax.jit(memory_sinking.gather)(beams, jnp.asarray([2, 0, 0], jnp.int32))
  chex.assert_trees_all_equal(gathered, jax.tree.map(lambda x: x[[2, 0, 0]], beams))
