"""A generator of one number per chunk, whose searches can be followed by hand.

Its memory is the last chunk, and every denoising step predicts `x0 = last + x`. With the two noise levels 1 and 1/2 and
no noise between them a chunk is `last + (last + noise) / 2`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.generator import Eviction, Models
from streamt1_jax.noise_propagation import NoiseDraws
from streamt1_jax.parallel.sharding import BY_BEAM
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.sampling import renoise

SHAPE = (1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class ToyGenerator:
  latent_shape: tuple[int, int, int, int] = SHAPE

  memory_layout = chunk_layout = BY_BEAM

  @property
  def sigmas(self):
    return np.array([1.0, 0.5])

  def check(self, search):
    """Any search will do."""

  def max_chunks(self, search):
    return 8

  def init_memory(self, params, search):
    return jnp.zeros(SHAPE)

  def open(self, memory, search):
    return memory, Eviction(jnp.int32(0), jnp.int32(-1), jnp.int32(-1))

  def view(self, memory, chunk_index, search):
    return memory

  def denoise(self, params, x, step, text, view, execution, image=None):
    return view + x

  def clean_pass(self, params, latents, text, view, execution):
    return latents

  def commit(self, memory, chunk, flags, chunk_index):
    return chunk

  def recache(self, params, memory, chunk_index, text, search, switch, execution):
    return memory

  def gather(self, memories, parents):
    return memories[parents]


def draw_noise(seed):
  """The remainder of the seed by 7, and nothing between the steps."""
  return NoiseDraws(jnp.full(SHAPE, seed % 7, jnp.float32), jnp.zeros((1, *SHAPE)))


@dataclasses.dataclass(frozen=True)
class ChunkMean(Promptless):
  def __call__(self, params, condition, chunk, info):
    return chunk.mean()


@dataclasses.dataclass(frozen=True)
class WindowSum(Promptless):
  """The sum of the window, chunk by chunk one number."""

  def __call__(self, params, condition, window, info):
    valid = jnp.arange(window.past.shape[0]) < window.num_past
    return jnp.where(valid, window.past.ravel(), 0.0).sum() + window.chunk.sum()


MODELS = Models(ToyGenerator(), LatentCodec(SHAPE[1:]), ChunkMean(), WindowSum(), draw_noise, renoise)
PARAMS = {"backbone": {}, "codec": {}, "image_reward": {}, "video_reward": {}}
