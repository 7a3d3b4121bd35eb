"""A new prompt between two chunks, and chunks that are given: what changes, and what must not."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers, memory_sinking, recache
from streamt1_jax.between_chunks import commit_given, switch_prompt
from streamt1_jax.config import ConfigError, SearchConfig, SwitchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel.sharding import tree_shardings
from tests import small_search as small

# Every chunk is worth remembering. Chunks 3, 6 and 9 are averaged into the first sink, and 12 becomes the second.
SEARCH = dataclasses.replace(small.SEARCH, short_threshold=-10.0)
PLAIN = SearchConfig.streaming(small.MODEL)
OLD, NEW = 0, 1
# Window and first sink are full before chunk 4, and nothing has left the window. Before chunk 8 four chunks have.
JUST_FULL, ROLLED, NUM_CHUNKS = 4, 8, 10


@functools.cache
def _condition(prompt):
  return small.condition(NUM_CHUNKS, prompt=prompt)


@functools.cache
def _saved(chunks, search=SEARCH, prompt=OLD):
  """The state after some chunks, on the host."""
  inputs = small.params(), _condition(prompt), small.models(), search
  *_, (state, _) = itertools.islice(drivers.stream_states(*inputs, num_chunks=NUM_CHUNKS, seed=3), chunks)
  return jax.device_get(state)


def _state(chunks, search=SEARCH, prompt=OLD):
  return jax.tree.map(jnp.asarray, _saved(chunks, search, prompt))


def _switched(state, prompt=NEW, search=SEARCH, **switch):
  return jax.device_get(
    switch_prompt(small.params(), state, _condition(prompt), small.models(), search, SwitchConfig(**switch))
  )


def _by_frame(memory, beam=0):
  """Keys and values of the valid slots of a beam by their first frame, and the frames of the sinks."""
  valid = range(int(memory.count[beam]))
  frame = memory.frame[beam]
  return {int(frame[s]): np.stack([memory.k[beam, :, s], memory.v[beam, :, s]]) for s in valid}


def _sinks(memory, beam=0):
  count = int(memory.count[beam])
  return sorted(int(f) for f in memory.frame[beam, :count][memory.is_sink[beam, :count]])


def _largest(x, y):
  return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


WAYS = [(recache, sinks) for recache in ("released", "causal") for sinks in ("keep", "recache", "first", "move")]


@pytest.mark.parametrize(("recache", "sinks"), WAYS)
def test_labels_noise_and_decoder_stay(recache, sinks):
  before = _saved(ROLLED)
  after = _switched(_state(ROLLED), recache=recache, sinks=sinks)
  moved = "memory", "history"
  chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
  for name in set(before.beams._fields) - set(moved):
    chex.assert_trees_all_equal(getattr(after.beams, name), getattr(before.beams, name))
  chex.assert_trees_all_equal(after._replace(beams=None), before._replace(beams=None))
  if sinks in ("keep", "recache"):
    for name in ("frame", "is_sink", "flags", "count", "latents", "departed"):
      chex.assert_trees_all_equal(getattr(after.beams.memory, name), getattr(before.beams.memory, name))


@pytest.mark.parametrize(
  ("sinks", "expected"),
  [("keep", [0, 12]), ("recache", [0, 12]), ("first", [0]), ("move", [12])],
)
def test_which_sinks_are_left(sinks, expected):
  """By hand: of chunks 0 to 7 the window has 15, 18 and 21, and 12, which left it last, was appended."""
  memory = _switched(_state(ROLLED), sinks=sinks).beams.memory
  assert _sinks(_saved(ROLLED).beams.memory) == [0, 12]
  assert _sinks(memory) == expected
  assert sorted(set(_by_frame(memory)) - set(expected)) == [15, 18, 21]


@pytest.mark.parametrize(("recache", "sinks"), WAYS)
def test_what_is_computed_anew(recache, sinks):
  """Keys and values of the first block do not depend on text. In the second one those of what is recomputed change."""
  before = _by_frame(_saved(ROLLED).beams.memory)
  after = _by_frame(_switched(_state(ROLLED), recache=recache, sinks=sinks).beams.memory)
  anew = {15, 18, 21} | ({12} if sinks in ("recache", "move") else set())
  for frame in set(before) & set(after):
    # [keys and values, blocks, ...]. The sink at 0 is an average, whose old content is dropped when it is recomputed.
    first, second = (np.abs(after[frame][:, block] - before[frame][:, block]).max() for block in (0, 1))
    if frame in anew:
      assert first < 1e-5
      assert second > 1e-3
    elif sinks == "recache":
      assert frame == 0
      assert first > 1e-4
    else:
      assert first == second == 0


@pytest.mark.parametrize("sinks", [[0], [0, 12]])
def test_a_last_sink_that_stays_keeps_its_average(sinks):
  """What bfloat16 has no place for is in the accumulator. It begins anew only where another sink is now the last."""
  search = dataclasses.replace(SEARCH, sink_ema_dtype="float32")
  empty = memory_sinking.empty_memory(small.MODEL, search, jnp.bfloat16)
  count = len(sinks) + 1
  memory = empty._replace(
    k=empty.k + 1,
    frame=empty.frame.at[:count].set(jnp.array([*sinks, 30])),
    is_sink=empty.is_sink.at[: len(sinks)].set(True),
    count=jnp.int32(count),
    departed=empty.departed._replace(frame=jnp.int32(27)),
    accumulator=jax.tree.map(lambda x: x + 1.001, empty.accumulator),
  )
  after, _ = recache.SWITCH_SINKS["first"].prepare(memory, small.MODEL)
  np.testing.assert_allclose(after.accumulator.k, 1.001 if sinks == [0] else 1, rtol=0, atol=1e-6)


def test_none_leaves_the_memory_alone():
  before = _saved(ROLLED).beams.memory
  chex.assert_trees_all_equal(_switched(_state(ROLLED), recache="none").beams.memory, before)


def test_sinks_are_rewritten_until_a_chunk_has_left():
  """The released guard of the sinks works once the cache has rolled."""
  before = _by_frame(_saved(JUST_FULL).beams.memory)
  after = _by_frame(_switched(_state(JUST_FULL)).beams.memory)
  assert set(before) == set(after) == {0, 3, 6, 9}
  assert all(np.abs(after[frame] - before[frame]).max() > 1e-3 for frame in before)


@pytest.mark.parametrize("chunks", [1, 2, JUST_FULL])
def test_the_same_prompt_again(chunks):
  """Causal: what each chunk saw is still there, so nothing changes. Released: the clean passes saw no later chunk."""
  before = _by_frame(_saved(chunks, PLAIN).beams.memory)
  causal = _by_frame(_switched(_state(chunks, PLAIN), OLD, PLAIN, recache="causal").beams.memory)
  released = _by_frame(_switched(_state(chunks, PLAIN), OLD, PLAIN, recache="released").beams.memory)
  assert _largest(causal, before) < 2e-6
  assert (_largest(released, before) > 1e-3) == (chunks > 1)


@pytest.mark.parametrize(("recache", "sinks"), WAYS)
def test_twice_is_once(recache, sinks):
  switch = {"recache": recache, "sinks": sinks}
  once = _switched(_state(ROLLED), **switch)
  twice = _switched(jax.tree.map(jnp.asarray, once), **switch)
  chex.assert_trees_all_close(twice, once, rtol=0, atol=1e-6)


def test_back_to_the_first_prompt():
  """The window is what a recache with the first prompt makes of it; what was in between leaves no trace."""
  there_and_back = _switched(jax.tree.map(jnp.asarray, _switched(_state(ROLLED))), OLD)
  chex.assert_trees_all_close(there_and_back, _switched(_state(ROLLED), OLD), rtol=0, atol=1e-6)


def test_before_the_first_chunk_it_is_another_video():
  state = drivers.jitted_init_state(small.params(), np.int32(3), small.models(), SEARCH, 3)
  state = switch_prompt(small.params(), state, _condition(NEW), small.models(), SEARCH, SwitchConfig())
  run = lambda state: [
    jax.device_get(trace)
    for _, trace in drivers.stream_states(
      small.params(), _condition(NEW), small.models(), SEARCH, num_chunks=3, seed=3, state=state
    )
  ]
  chex.assert_trees_all_equal(run(state), run(None))


def test_equal_beams_stay_equal_and_beams_move_freely():
  """A switch of gathered beams is the gather of switched ones, and NaN in one beam reaches no other."""
  state = _state(ROLLED)
  swap = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[jnp.array([1, 1])], tree)
  both = _switched(state._replace(beams=swap(state.beams)))
  one = jax.device_get(swap(_switched(_state(ROLLED)).beams))
  chex.assert_trees_all_equal(both.beams, one)
  bad = _state(ROLLED)
  latents = bad.beams.memory.latents.at[0].set(jnp.nan)
  bad = bad._replace(beams=bad.beams._replace(memory=bad.beams.memory._replace(latents=latents)))
  memory, good = _switched(bad).beams.memory, _switched(_state(ROLLED)).beams.memory
  assert np.isnan(memory.k[0]).any()
  np.testing.assert_array_equal(memory.k[1], good.k[1])


def test_history_restarts():
  """The first chunk after a switch has no flags, as the first one of a video has none."""
  state = switch_prompt(small.params(), _state(ROLLED), _condition(NEW), small.models(), SEARCH, SwitchConfig())
  chex.assert_trees_all_equal(
    jax.device_get(state.beams.history), jax.device_get(drivers.jitted_init_state(
      small.params(), np.int32(0), small.models(), SEARCH, NUM_CHUNKS
    ).beams.history)
  )  # fmt: skip
  _, trace = drivers.jitted_chunk_step(small.params(), state, _condition(NEW), small.models(), SEARCH, first=False)
  assert not np.any(trace.candidates.flags.ema)
  assert not np.any(trace.candidates.flags.append)


def test_the_video_reward_may_forget_what_was_before():
  """With `since` the window begins with the new chunk alone; with `whole` it goes on."""
  for video, chunks in (("whole", 3), ("since", 1)):
    state = switch_prompt(
      small.params(), _state(ROLLED), _condition(NEW), small.models(), SEARCH, SwitchConfig(video=video)
    )
    past = 0 if video == "since" else 6
    assert int(state.num_past) == past
    before = np.asarray(state.beams.past)[:, :past]
    state, trace = drivers.jitted_chunk_step(
      small.params(), state, _condition(NEW), small.models(), SEARCH, first=False
    )
    for winner in range(SEARCH.top_k):
      n = int(trace.survivor[winner])
      window = np.concatenate([before[n // SEARCH.beam_size], trace.latents[winner]])
      assert len(window) == 3 * chunks
      expected = small.WindowChecksum().by_numpy(window)
      np.testing.assert_allclose(small.per_candidate(trace.candidates.long)[n], expected, rtol=0, atol=1e-4)


def test_every_switch_is_one_program():
  states = [_state(chunks) for chunks in (1, JUST_FULL, ROLLED)]
  _switched(_state(1))
  with CompileCounter() as compiles:
    for state in states:
      _switched(state)
  assert compiles.count == 0


@pytest.mark.parametrize("text", ["candidate:2,model:2", pytest.param("candidate:4", marks=pytest.mark.slow)])
def test_on_a_mesh(text):
  mesh = device_mesh.make_mesh(device_mesh.parse_sizes(text), small.MODEL, SEARCH)
  models = dataclasses.replace(small.models(), execution=Execution(mesh=mesh))
  place = lambda name, tree: jax.device_put(tree, tree_shardings(mesh, name, tree))
  params = {name: place(name, part) for name, part in small.params().items()}
  state, condition = place("state", _state(ROLLED)), place("condition", _condition(NEW))
  after = switch_prompt(params, state, condition, models, SEARCH, SwitchConfig())
  chex.assert_trees_all_close(jax.device_get(after), _switched(_state(ROLLED)), rtol=0, atol=1e-5)


def test_each_video_in_lockstep_switches_on_its_own():
  states = [_saved(JUST_FULL, prompt=prompt) for prompt in (OLD, NEW)]
  # The counters are shared; that videos in lockstep are searched as each would be alone is tested with the drivers.
  both = lambda *leaves: np.stack(leaves)
  before = states[0]._replace(
    base_seed=both(*(state.base_seed for state in states)), beams=jax.tree.map(both, *(state.beams for state in states))
  )
  swapped = drivers.stack_conditions([_condition(NEW), _condition(NEW)])
  state = jax.tree.map(jnp.asarray, before)
  after = jax.device_get(
    switch_prompt(small.params(), state, swapped, small.models(), SEARCH, SwitchConfig(), np.array([True, False]))
  )
  of = lambda tree, video: jax.tree.map(lambda x: x[video], tree)
  chex.assert_trees_all_equal(of(after.beams, 1), of(before.beams, 1))
  alone = before._replace(base_seed=before.base_seed[0], beams=of(before.beams, 0))
  chex.assert_trees_all_close(of(after.beams, 0), _switched(jax.tree.map(jnp.asarray, alone)).beams, rtol=0, atol=1e-6)


class TestGivenChunks:
  def test_going_on_with_its_own_chunks(self):
    """Committing what plain streaming made, and going on, is plain streaming."""
    params, models = small.params(), small.models()
    inputs = params, _condition(OLD), models, PLAIN
    traces = [jax.device_get(t) for t in drivers.stream(*inputs, num_chunks=8, seed=3)]
    state = drivers.jitted_init_state(params, np.int32(3), models, PLAIN)
    for index in range(6):
      latents = jnp.asarray(traces[index].latents[0])
      state, frames = commit_given(params, state, _condition(OLD), latents, models, PLAIN, first=index == 0)
      np.testing.assert_array_equal(frames, traces[index].frames[0])
    assert int(state.begin) == int(state.chunk_index) == 6
    # The noise of the first made chunk is that of a first chunk: seed 3 and not 6003.
    state = state._replace(begin=jnp.int32(0))
    rest = drivers.stream_states(*inputs, num_chunks=8, seed=3, state=state)
    for (_, trace), expected in zip(rest, traces[6:], strict=True):
      np.testing.assert_allclose(trace.latents, expected.latents, rtol=0, atol=1e-5)

  def test_the_first_made_chunk_has_no_parent(self):
    """All candidates have seeds and noise of a first chunk, although the beams are equal."""
    params, models = small.params(), small.models()
    state = drivers.jitted_init_state(params, np.int32(3), models, SEARCH, 8)
    given = jnp.asarray(np.random.default_rng(0).standard_normal(small.MODEL.latent_shape), jnp.float32)
    state, _ = commit_given(params, state, _condition(OLD), given, models, SEARCH, first=True)
    options = {"num_chunks": 3, "seed": 3, "state": state, "record": True}
    traces = [jax.device_get(t) for _, t in drivers.stream_states(params, _condition(OLD), models, SEARCH, **options)]
    assert traces[0].candidates.seed.ravel().tolist() == [3, 4, 5, 6]
    noise = np.stack([models.draw_noise(jnp.int32(seed)).fresh for seed in (3, 4, 5, 6)])
    np.testing.assert_allclose(small.per_candidate(traces[0].steps["noise"]), noise, rtol=0, atol=1e-6)
    assert not traces[0].candidates.flags.append.any()
    # Chunk 2, beam 0: its parent's seed again, and the second candidate of its own.
    assert traces[1].candidates.seed[0].tolist() == [traces[0].candidates.seed.ravel()[traces[0].survivor[0]], 2004]

  def test_the_first_frame_may_be_given(self):
    image = jnp.asarray(np.random.default_rng(1).standard_normal(small.MODEL.latent_shape[1:]), jnp.float32)
    condition = _condition(OLD)._replace(image=image)
    # Later chunks are those of any video, as the recorded one with an image shows.
    traces = drivers.stream(small.params(), condition, small.models(), SEARCH, num_chunks=NUM_CHUNKS, seed=3)
    first = jax.device_get(next(traces))
    np.testing.assert_array_equal(first.latents[:, 0], np.stack([image] * 2))
    assert (np.abs(first.latents[:, 1:] - np.asarray(image)) > 1e-3).any()


class TestEndless:
  """Sinks that come along: a video has no longest length, and what a chunk costs does not grow."""

  # Slow: the same of a longer stretch.
  @pytest.mark.parametrize("distance", [12, pytest.param(21, marks=pytest.mark.slow)])
  def test_equals_the_absolute_positions_up_to_the_distance(self, distance):
    run = lambda search: [
      np.asarray(t.latents)
      for t in drivers.stream(small.params(), _condition(OLD), small.models(), search, num_chunks=10, seed=3)
    ]
    absolute, moved = run(SEARCH), run(dataclasses.replace(SEARCH, sink_distance=distance))
    same = [np.abs(x - y).max() < 1e-5 for x, y in zip(absolute, moved, strict=True)]
    assert same[: distance // 3 + 1] == [True] * (distance // 3 + 1)
    assert not same[-1]

  def test_longer_than_the_tables(self):
    """The model's tables have 192 frames. A video of as many chunks uses the program of the second chunk.

    Noise that repeats after two chunks makes a video that repeats: what a chunk sees does not depend on where it is.
    """
    search = dataclasses.replace(PLAIN, sink_distance=30)
    draw = lambda seed: small.models().draw_noise(seed // 1000 % 2)
    models = dataclasses.replace(small.models(), draw_noise=draw)
    params, condition = small.params(), _condition(OLD)
    assert small.MODEL.max_chunks == 64
    state = drivers.jitted_init_state(params, np.int32(3), models, search)
    state, _ = drivers.jitted_chunk_step(params, state, condition, models, search, first=True)
    step = (
      jax.jit(lambda state: drivers.jitted_chunk_step(params, state, condition, models, search, first=False))
      .lower(state)
      .compile()
    )
    sizes = [x.nbytes for x in jax.tree.leaves(state)]
    latents = []
    for _ in range(200):
      state, trace = step(state)
      latents.append(np.asarray(trace.latents))
    assert [x.nbytes for x in jax.tree.leaves(state)] == sizes
    assert np.isfinite(latents[-1]).all()
    np.testing.assert_allclose(latents[-1], latents[-3], rtol=0, atol=1e-5)
    assert np.abs(latents[-1] - latents[-2]).max() > 1e-3
    memory = jax.tree.map(lambda x: x[0], state.beams.memory)
    placed = memory_sinking.placed_frames(memory, jnp.int32(603), small.MODEL, search)[: int(memory.count)]
    assert sorted(np.asarray(placed).tolist()) == [573, 594, 597, 600]

  def test_refused_distances(self):
    search = dataclasses.replace(PLAIN, sink_distance=8)
    with pytest.raises(ConfigError, match="sink_distance must be at least 9, where the window begins, got 8"):
      next(drivers.stream(small.params(), _condition(OLD), small.models(), search, num_chunks=1, seed=0))
