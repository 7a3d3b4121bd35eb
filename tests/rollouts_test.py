"""Clips that the model goes on with in a training are those that it streams."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from streamt1_jax import memory_sinking
from streamt1_jax.config import SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.training import rollouts
from streamt1_jax.training.dataset import CHUNKS
from tests import small_search as small

SEARCH = SearchConfig(max_sink_frames=6)
KEY = jax.random.key(5)


def _clips(count):
  return jnp.asarray(np.random.default_rng(1).standard_normal((count, CHUNKS, *small.MODEL.latent_shape)), jnp.float32)


def _made(clips, switch, late):
  graphdef, weights = small.backbone()
  text = small.condition(CHUNKS).text
  # The caption of the first chunk is another one. A sink from long ago has it, everything else has the newer one.
  prompts = jax.tree.map(lambda x: jnp.broadcast_to(jnp.stack([x, 2 * x]), (len(clips), 2, *x.shape)), text)

  @jax.jit
  def roll(weights, *arguments):
    return rollouts.roll_out(nnx.merge(graphdef, weights), small.MODEL, *arguments)

  return np.asarray(roll(weights, clips, prompts, jnp.asarray(switch), jnp.asarray(late), KEY))


@jax.jit
def _stream(params, text, first, noise):
  """Seven chunks, the first of which is given; noise of every chunk and timestep."""
  generator = small.models().generator
  memory = memory_sinking.empty_memory(small.MODEL, SEARCH, jnp.float32)
  chunks, never = [first], Flags(ema=jnp.bool(False), append=jnp.bool(False))
  for chunk in range(CHUNKS):
    memory, _ = generator.open(memory, SEARCH)
    view = generator.view(memory, jnp.int32(chunk), SEARCH)
    if chunk > 0:
      x0 = jnp.zeros_like(first)
      for step, sigma in enumerate(generator.schedule.sigmas):
        x = (1.0 - sigma) * x0 + sigma * noise[chunk - 1, step]
        x0 = generator.denoise(params, x, jnp.int32(step), text, view, Execution())
      chunks.append(x0)
    finished = generator.clean_pass(params, chunks[-1], text, view, Execution())
    memory = generator.commit(memory, finished, never, jnp.int32(chunk))
  return jnp.stack(chunks)


def test_made_chunks_are_streamed():
  """The caption changes with the second chunk, so that all of them are near each other."""
  clips = _clips(1)
  made = _made(clips, [1], [False])
  steps = len(small.models().generator.schedule.sigmas)
  noise_key = jax.random.split(KEY)[1]
  draw = lambda chunk, step: jax.random.normal(jax.random.fold_in(noise_key, chunk * steps + step), clips[:, 0].shape)
  noise = jnp.stack([jnp.stack([draw(chunk, step)[0] for step in range(steps)]) for chunk in range(1, CHUNKS)])
  params, text = small.params()["backbone"], small.condition(CHUNKS).text
  streamed = np.asarray(_stream(params, text, clips[0, 0], noise))
  np.testing.assert_allclose(made[0], streamed, rtol=0, atol=2e-4)
  assert np.abs(streamed - clips[0])[1:].min(axis=0).max() > 1.0


def test_what_is_not_learned_stays_true():
  clips = _clips(4)
  made = _made(clips, [0, 3, 0, 4], [False, False, True, True])
  is_true = (made == clips).all(axis=(2, 3, 4, 5))
  np.testing.assert_array_equal(is_true.sum(axis=1), [1, 3, 3, 4])
  np.testing.assert_array_equal(np.sort(is_true, axis=1)[:, ::-1], is_true)


def test_they_are_made_once(tmp_path):
  cache, made = epath.Path(tmp_path) / "rollouts.npy", np.arange(6, dtype=np.float16)
  np.testing.assert_array_equal(rollouts.read_or_make(lambda: made, cache), made)
  np.testing.assert_array_equal(rollouts.read_or_make(lambda: 1 / 0, cache), made)
