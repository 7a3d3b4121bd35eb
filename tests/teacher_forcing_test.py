"""The training view equals streaming: the same chunks, one after the other, through a memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from streamt1_jax import memory_sinking
from streamt1_jax.backbone.schedule import time_features
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.training.teacher_forcing import Seen, chunk_velocity, clip_velocity
from tests import small_search as small

NUM_CHUNKS = 6
SEARCH = SearchConfig(max_sink_frames=6)
FIRST_FRAME = np.arange(NUM_CHUNKS, dtype=np.int32) * small.MODEL.chunk_frames
FEATURES = time_features(np.array([1000.0, 937.5, 625.0, 833.0, 937.5, 625.0]), small.MODEL.backbone.freq_dim)
CONTEXT_FEATURES = time_features(np.array(0.0), small.MODEL.backbone.freq_dim)

# Sink, two past chunks, current chunk. What every chunk sees, by hand:
PLAIN = [[], [0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]  # chunks 1 and 2 are evicted
WITH_SINK = [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]]  # chunk 1 becomes a sink, chunk 2 is evicted


def _chunks(seed):
  shape = (NUM_CHUNKS, *small.MODEL.latent_shape)
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _table(visible, places=None, clean_frames=FIRST_FRAME):
  """What the clean chunks see, and then the noisy ones: lists of clean chunks; the padding must not count.

  Noisy chunks are at `FIRST_FRAME`; `places` are the clean chunks' own lists where they differ.
  """
  rows = (visible if places is None else places) + visible
  width = max(len(row) for row in rows)
  padded = np.array([row + [NUM_CHUNKS - 1] * (width - len(row)) for row in rows], np.int32)
  valid = np.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])
  own = np.concatenate([clean_frames, FIRST_FRAME])
  distance = own[:, None] - np.asarray(clean_frames)[padded]
  fields = padded, valid, distance.astype(np.int32), np.zeros(len(rows), np.int32)
  return Seen(*map(jnp.asarray, fields))


@functools.partial(jax.jit, static_argnums=0)
def _clip_velocity(graphdef, weights, noisy, clean, text, seen):
  model = nnx.merge(graphdef, weights)
  # Another clip with another prompt beside it, and another prompt of the same: nothing of them may reach the first.
  pair = lambda x: jnp.stack([x, -x])
  text = jax.tree.map(lambda x: pair(jnp.stack([x, 2 * x])), text)
  seen = jax.tree.map(lambda x: jnp.stack([x, x]), seen)
  return clip_velocity(model, pair(noisy), pair(clean), pair(jnp.asarray(FEATURES)), CONTEXT_FEATURES, text, seen)[0]


@jax.jit
def _stream_chunk(params, memory, noisy, clean, features, first_frame, text, flags):
  """Velocity of the noisy chunk; then the clean chunk goes into the memory."""
  generator, chunk_index = small.models().generator, first_frame // small.MODEL.chunk_frames
  memory, _ = generator.open(memory, SEARCH)
  context = text, generator.view(memory, chunk_index, SEARCH), Execution()
  flow, _ = generator.velocity(params["backbone"], noisy, features, *context)
  chunk = generator.clean_pass(params["backbone"], clean, *context)
  return flow, generator.commit(memory, chunk, flags, chunk_index), memory.frame, memory.count


def _stream(noisy, clean, visible, appended):
  """Velocities of all chunks; `appended` names the chunk that becomes a sink when it leaves the window."""
  params, text = small.params(), small.condition(NUM_CHUNKS).text
  memory = memory_sinking.empty_memory(small.MODEL, SEARCH, jnp.float32)
  flows = []
  for index in range(NUM_CHUNKS):
    flags = Flags(ema=jnp.bool(False), append=jnp.bool(index == appended))
    inputs = noisy[index], clean[index], FEATURES[index], jnp.int32(FIRST_FRAME[index])
    flow, memory, frame, count = _stream_chunk(params, memory, *inputs, text, flags)
    assert sorted(np.asarray(frame)[: int(count)] // small.MODEL.chunk_frames) == visible[index]
    flows.append(flow)
  return np.stack(flows)


@pytest.mark.parametrize(("visible", "appended"), [(PLAIN, None), (WITH_SINK, 1)], ids=["plain", "with_sink"])
def test_equals_streaming(visible, appended):
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  together = _clip_velocity(graphdef, weights, noisy, clean, text, _table(visible))
  streamed = _stream(noisy, clean, visible, appended)
  np.testing.assert_allclose(together, streamed, rtol=0, atol=2e-5)
  assert np.abs(streamed).mean() > 0.1


def test_what_a_chunk_sees_matters():
  """The negative control: the two tables differ in chunks 4 and 5, and so do the velocities, and only there."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  plain, with_sink = (
    np.asarray(_clip_velocity(graphdef, weights, noisy, clean, text, _table(visible))) for visible in (PLAIN, WITH_SINK)
  )
  difference = np.abs(plain - with_sink).max(axis=(1, 2, 3, 4))
  assert (difference[:4] < 2e-5).all()
  assert (difference[4:] > 1e-3).all()


def test_noisy_chunks_see_no_noisy_chunk():
  """Another noisy chunk in place 2 changes the velocity there and nowhere else."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  run = lambda noisy: np.asarray(_clip_velocity(graphdef, weights, noisy, clean, text, _table(PLAIN)))
  difference = np.abs(run(noisy) - run(noisy.at[2].set(_chunks(3)[0]))).max(axis=(1, 2, 3, 4))
  assert difference[2] > 1e-2
  assert (np.delete(difference, 2) == 0).all()


def test_a_chunk_that_was_committed_elsewhere():
  """Chunk 1 sees nothing, so that its place decides nothing but how far from it the others are."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  visible = [[], [], [0], [0, 2], [0, 2, 3], [0, 1, 3, 4]]
  run = lambda seen: np.asarray(_clip_velocity(graphdef, weights, noisy, clean, text, seen))[5]
  elsewhere = FIRST_FRAME + np.where(np.arange(NUM_CHUNKS) == 1, 60, 0)
  table = _table(visible)
  moved = table._replace(distance=table.distance - 60 * (table.chunks == 1))
  np.testing.assert_allclose(run(_table(visible, clean_frames=elsewhere)), run(moved), rtol=0, atol=2e-5)
  assert np.abs(run(table) - run(moved)).max() > 1e-3


def test_equals_streaming_after_a_change_of_prompt():
  """Three chunks under one prompt, then the released recache, then the others under a second prompt."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  params, switch = small.params(), 3
  old, new = (small.condition(NUM_CHUNKS, prompt).text for prompt in (0, 1))
  generator = small.models().generator
  memory = memory_sinking.empty_memory(small.MODEL, SEARCH, jnp.float32)
  no = Flags(jnp.bool(False), jnp.bool(False))
  streamed = []
  for index in range(NUM_CHUNKS):
    if index == switch:
      memory = generator.recache(params["backbone"], memory, jnp.int32(index), new, SEARCH, SwitchConfig(), Execution())
    inputs = noisy[index], clean[index], FEATURES[index], jnp.int32(FIRST_FRAME[index])
    flow, memory, *_ = _stream_chunk(params, memory, *inputs, old if index < switch else new, no)
    streamed.append(flow)
  # The chunks before the change see all others of them; the rest is as ever.
  seen = _table(PLAIN, places=[[1, 2], [0, 2], [0, 1], *PLAIN[switch:]])
  together = _clip_velocity(graphdef, weights, noisy, clean, new, seen)
  np.testing.assert_allclose(together[switch:], np.stack(streamed[switch:]), rtol=0, atol=2e-5)
  causal = _clip_velocity(graphdef, weights, noisy, clean, new, _table(PLAIN))
  assert np.abs(together[switch:] - causal[switch:]).max() > 1e-3


def test_chunks_are_under_their_own_prompts():
  """The first clean chunk under the second prompt: noisy chunks see another sink, and nothing else changes."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  table = _table(PLAIN)
  other = table._replace(prompt=table.prompt.at[0].set(1))
  first, second = (np.asarray(_clip_velocity(graphdef, weights, noisy, clean, text, seen)) for seen in (table, other))
  np.testing.assert_array_equal(first[0], second[0])
  assert np.abs(first[1:] - second[1:]).max(axis=(1, 2, 3, 4)).min() > 1e-4


def test_first_chunk():
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text

  @jax.jit
  def alone(weights, noisy):
    """The chunk beside others of its prompt and of another one."""
    features = jnp.broadcast_to(FEATURES[0][None, None], (2, 3, FEATURES.shape[1]))
    both = jax.tree.map(lambda x: jnp.stack([x, -x]), text)
    return chunk_velocity(nnx.merge(graphdef, weights), jnp.stack([noisy, -noisy]), features, both)[0]

  streamed = _stream_chunk(
    small.params(),
    memory_sinking.empty_memory(small.MODEL, SEARCH, jnp.float32),
    noisy[0],
    clean[0],
    FEATURES[0],
    jnp.int32(0),
    text,
    Flags(jnp.bool(False), jnp.bool(False)),
  )[0]
  np.testing.assert_allclose(alone(weights, noisy[:3])[0], streamed, rtol=0, atol=2e-5)
