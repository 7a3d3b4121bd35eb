"""Clips that the model goes on with in a training are those that it streams."""

import functools

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
from streamt1_jax.training.batches import ClipKind
from streamt1_jax.training.dataset import CHUNKS, Dataset
from tests import small_search as small

SEARCH = SearchConfig(max_sink_frames=6)
KEY = jax.random.key(5)
CLIPS = jnp.asarray(np.random.default_rng(1).standard_normal((4, CHUNKS, *small.MODEL.latent_shape)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _roll(graphdef, weights, *arguments):
  return rollouts.roll_out(nnx.merge(graphdef, weights), small.MODEL, *arguments)


def _made(switch, late, gap=(0, 0, 0, 0), earlier=2.0):
  graphdef, weights = small.backbone()
  text = small.condition(CHUNKS).text
  # The caption of the first chunk is another one.
  prompts = jax.tree.map(lambda x: jnp.broadcast_to(jnp.stack([x, earlier * x]), (len(CLIPS), 2, *x.shape)), text)
  return np.asarray(_roll(graphdef, weights, CLIPS, prompts, ClipKind(*map(jnp.asarray, (switch, late, gap))), KEY))


def _open(memory, chunk):
  generator = small.models().generator
  memory, _ = generator.open(memory, SEARCH)
  return generator, memory, generator.view(memory, chunk, SEARCH)


@jax.jit
def _denoised(params, memory, chunk, text, x, step):
  generator, _, view = _open(memory, chunk)
  return generator.denoise(params, x, step, text, view, Execution())


@jax.jit
def _committed(params, memory, chunk, text, latents):
  generator, memory, view = _open(memory, chunk)
  never = Flags(ema=jnp.bool(False), append=jnp.bool(False))
  finished = generator.clean_pass(params, latents, text, view, Execution())
  return generator.commit(memory, finished, never, chunk)


def _stream(params, text, first, noise):
  """Seven chunks, and the first one is given; noise of every chunk and timestep."""
  memory = memory_sinking.empty_memory(small.MODEL, SEARCH, jnp.float32)
  sigmas, chunks = small.models().generator.schedule.sigmas, [first]
  for chunk in range(CHUNKS):
    if chunk > 0:
      x0 = jnp.zeros_like(first)
      for step, sigma in enumerate(sigmas):
        x = jnp.float32(1.0 - sigma) * x0 + jnp.float32(sigma) * noise[chunk - 1, step]
        x0 = _denoised(params, memory, jnp.int32(chunk), text, x, jnp.int32(step))
      chunks.append(x0)
    memory = _committed(params, memory, jnp.int32(chunk), text, chunks[-1])
  return jnp.stack(chunks)


def test_made_chunks_are_streamed():
  """The caption changes with the second chunk: such clips never come much later than their first chunk."""
  made = _made([1, 1, 1, 1], [False, False, False, False])
  steps = len(small.models().generator.schedule.sigmas)
  noise_key = jax.random.split(KEY)[1]
  draw = lambda chunk, step: jax.random.normal(jax.random.fold_in(noise_key, chunk * steps + step), CLIPS[:, 0].shape)
  noise = jnp.stack([jnp.stack([draw(chunk, step)[2] for step in range(steps)]) for chunk in range(1, CHUNKS)])
  params, text = small.params()["backbone"], small.condition(CHUNKS).text
  streamed = np.asarray(_stream(params, text, CLIPS[2, 0], noise))
  np.testing.assert_allclose(made[2], streamed, rtol=0, atol=2e-5)
  # Every made chunk is another one than the true one.
  assert np.abs(streamed - CLIPS[2])[1:].mean(axis=(1, 2, 3, 4)).min() > 0.1


def test_what_is_not_learned_stays_true():
  made = _made([0, 3, 0, 4], [False, False, False, True], gap=[0, 0, 7, 0])
  is_true = (made == CLIPS).all(axis=(2, 3, 4, 5))
  np.testing.assert_array_equal(is_true.sum(axis=1), [1, 3, 3, 4])
  np.testing.assert_array_equal(np.sort(is_true, axis=1)[:, ::-1], is_true)


def test_only_a_sink_from_long_ago_has_the_caption_of_the_first_chunk():
  kinds = ([0, 3, 0, 4], [False, False, True, True])
  differs = np.abs(_made(*kinds) - _made(*kinds, earlier=-1.0)).max(axis=(2, 3, 4, 5))
  assert (differs[:2] == 0).all()
  np.testing.assert_array_equal(differs[2:] > 1e-3, np.arange(CHUNKS) >= np.array([[3], [4]]))


class _Text(nnx.Module):
  def __call__(self, ids, valid):
    return ids[:, None] * valid[:, None]


class _Backbone(nnx.Module):
  def text_memory(self, embeddings):
    return embeddings


def test_every_clip_goes_on_under_its_own_captions(monkeypatch):
  """Eight go on together; the last ones are filled up, and what fills them is dropped."""
  told = lambda backbone, model, clips, text, kind, key: (
    clips + (100 * text[:, 0, 0, 0] + text[:, 1, 0, 0] + sum(kind)).reshape(-1, 1, 1, 1, 1, 1)
  )
  monkeypatch.setattr(rollouts, "roll_out", told)
  number, shape = jnp.arange(11), (11, CHUNKS, *small.MODEL.latent_shape)
  data = Dataset(
    clips=jnp.zeros(shape, jnp.float16),
    tokens=jnp.broadcast_to(1 + number[:, None, None], (11, 16, 3)),
    sink_tokens=jnp.broadcast_to(20 + number[:, None], (11, 3)),
    switch=number % 5,
    late=number % 2 == 1,
    gap=3 * number,
    **dict.fromkeys(Dataset._fields[6:]),
  )
  graphdefs = {"backbone": nnx.graphdef(_Backbone()), "text": nnx.graphdef(_Text())}
  made = rollouts.make_rollouts({"backbone": {}, "text": {}}, graphdefs, data, small.MODEL, 9, seed=0)
  assert made.dtype == np.float16
  expected = 100 * (1 + np.arange(9)) + 20 + np.arange(9) + np.arange(9) % 5 + np.arange(9) % 2 + 3 * np.arange(9)
  np.testing.assert_array_equal(made, np.broadcast_to(expected.reshape(-1, 1, 1, 1, 1, 1), (9, *shape[1:])))


def test_they_are_made_once(tmp_path):
  cache, made = epath.Path(tmp_path) / "rollouts.npy", np.arange(14, dtype=np.float16).reshape(2, 7, 1, 1, 1, 1)
  np.testing.assert_array_equal(rollouts.read_or_make(lambda: made, cache), made)
  np.testing.assert_array_equal(rollouts.read_or_make(lambda: 1 / 0, cache), made)
