"""A video decoder of random weights for the latents of `small_search`, and a reward that reads its frames."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.codec.streaming import StreamingDecoder
from streamt1_jax.codec.vae import VideoDecoder
from streamt1_jax.config import CodecConfig
from streamt1_jax.rewards.base import Promptless

CODEC = CodecConfig(
  base_dim=4,
  dim_mult=(1, 1),
  num_res_blocks=0,
  spatial_down=(False,),
  temporal_down=(True,),
  latent_channels=4,
  patch_size=2,
  latent_mean=(0.1, -0.2, 0.3, 0.0),
  latent_std=(1.5, 0.5, 1.0, 2.0),
)
"""3 latent frames are 5 pixel frames at the start of a stream and 6 later."""


@dataclasses.dataclass(frozen=True)
class Brightness(Promptless):
  """Sum over frames of (index + 1) * mean of the left half, less the mean of the right half."""

  def __call__(self, params, condition, frames, info):
    count = frames.shape[0] if isinstance(frames, jax.Array) else frames.num_frames
    if not isinstance(frames, jax.Array):
      index = jnp.arange(frames.past.shape[0] + frames.chunk.shape[0])
      frames = frames.take(jnp.minimum(index, count - 1))
    index = jnp.arange(frames.shape[0])
    x = frames.astype(jnp.float32) / 255.0
    contrast = x[:, :, :4].mean(axis=(1, 2, 3)) - x[:, :, 4:].mean(axis=(1, 2, 3))
    return jnp.where(index < count, (index + 1) * contrast, 0.0).sum()

  def by_numpy(self, frames):
    x = frames.astype(np.float64) / 255.0
    contrast = x[:, :, :4].mean(axis=(1, 2, 3)) - x[:, :, 4:].mean(axis=(1, 2, 3))
    return (np.arange(1, len(x) + 1) * contrast).sum()


@functools.cache
def decoder() -> tuple[StreamingDecoder, dict]:
  """The decoder of latents of 4 rows and 4 columns, and its parameters."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: VideoDecoder(CODEC, rngs=nnx.Rngs(0))), nnx.Param)
  generator = np.random.default_rng(7)
  random = lambda leaf: jnp.asarray(0.3 * generator.standard_normal(leaf.shape), jnp.float32)
  return StreamingDecoder(graphdef, CODEC, (4, 4)), jax.tree.map(random, nnx.to_pure_dict(state))
