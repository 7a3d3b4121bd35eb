"""The training view equals streaming: the same chunks, one after the other, through a memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from streamt1_jax import memory_sinking
from streamt1_jax.backbone.schedule import time_features
from streamt1_jax.config import SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.training.teacher_forcing import chunk_velocity, clip_velocity
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


def _table(visible):
  """Lists of chunks as padded indices and their validity; the padding names a chunk that must not count."""
  width = max(len(row) for row in visible)
  padded = [row + [NUM_CHUNKS - 1] * (width - len(row)) for row in visible]
  valid = [[True] * len(row) + [False] * (width - len(row)) for row in visible]
  return jnp.asarray(padded, jnp.int32), jnp.asarray(valid)


@functools.partial(jax.jit, static_argnums=0)
def _clip_velocity(graphdef, weights, noisy, clean, text, visible, valid, moved=None, first_frame=FIRST_FRAME):
  model = nnx.merge(graphdef, weights)
  # Another clip with another prompt beside it: nothing of it may reach the first.
  pair = lambda x: jnp.stack([x, -x])
  text = jax.tree.map(pair, text)
  same = lambda x: None if x is None else jnp.stack([x, x])
  seen = map(same, (visible, valid, moved))
  rest = pair(jnp.asarray(FEATURES)), CONTEXT_FEATURES, same(jnp.asarray(first_frame)), text, *seen
  return clip_velocity(model, pair(noisy), pair(clean), *rest)[0]


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
  together = _clip_velocity(graphdef, weights, noisy, clean, text, *_table(visible))
  streamed = _stream(noisy, clean, visible, appended)
  np.testing.assert_allclose(together, streamed, rtol=0, atol=2e-5)
  assert np.abs(streamed).mean() > 0.1


def test_what_a_chunk_sees_matters():
  """The negative control: the two tables differ in chunks 4 and 5, and so do the velocities, and only there."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  plain, with_sink = (
    np.asarray(_clip_velocity(graphdef, weights, noisy, clean, text, *_table(visible)))
    for visible in (PLAIN, WITH_SINK)
  )
  difference = np.abs(plain - with_sink).max(axis=(1, 2, 3, 4))
  assert (difference[:4] < 2e-5).all()
  assert (difference[4:] > 1e-3).all()


def test_noisy_chunks_see_no_noisy_chunk():
  """Another noisy chunk in place 2 changes the velocity there and nowhere else."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  run = lambda noisy: np.asarray(_clip_velocity(graphdef, weights, noisy, clean, text, *_table(PLAIN)))
  difference = np.abs(run(noisy) - run(noisy.at[2].set(_chunks(3)[0]))).max(axis=(1, 2, 3, 4))
  assert difference[2] > 1e-2
  assert (np.delete(difference, 2) == 0).all()


def test_a_moved_chunk_is_one_that_was_committed_elsewhere():
  """Chunk 1 sees nothing, so that its place decides nothing but the rotation of its keys."""
  noisy, clean = _chunks(0), _chunks(1)
  graphdef, weights = small.backbone()
  text = small.condition(NUM_CHUNKS).text
  later, earlier = FIRST_FRAME + np.where(np.arange(NUM_CHUNKS) == 1, [[60], [0]], 0)
  visible, valid = _table([[], [], [0], [0, 2], [0, 2, 3], [0, 1, 3, 4]])
  moved = jnp.zeros_like(visible).at[5, 1].set(60)
  run = lambda moved, frames: np.asarray(
    _clip_velocity(graphdef, weights, noisy, clean, text, visible, valid, moved, frames)
  )[5]
  committed_later = run(jnp.zeros_like(visible), later)
  np.testing.assert_allclose(run(moved, earlier), committed_later, rtol=0, atol=2e-5)
  np.testing.assert_allclose(run(-moved, later), run(None, earlier), rtol=0, atol=2e-5)
  assert np.abs(run(None, earlier) - committed_later).max() > 1e-3


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
