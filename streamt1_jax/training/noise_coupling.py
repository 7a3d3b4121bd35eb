"""Lets the noise of a first chunk say what its caption leaves open: one denoising step can then commit to it.

At sigma = 1 the input of the model is pure noise, and the best prediction of a video whose start position is unknown is
the average over all positions: a ghost. A model that is sampled in four steps cannot afford that. So noise and clip are
drawn together: the start cell is read off the noise, and where the caption omits size or speed, the noise is reflected
until it says the clip's size or speed. Both are functions of standard normal noise with the right marginals, so at
sampling time plain noise is all that is needed. (Minibatch optimal-transport couplings do the same by assignment.)

A first chunk's noise is `[F, C, H, W]` with F >= 3; the frame is divided into 4 x 4 cells, one per start position.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from streamt1_jax.data.shapes import START_POSITIONS
from streamt1_jax.typing import IntLike, IntScalar, Latents

_CELLS = 4
_SIZE_FRAME, _SPEED_FRAME = 1, 2


def start_index(noise: Latents) -> IntScalar:
  """Row of `START_POSITIONS` that the noise chooses: the cell with the largest sum in frame 0."""
  channels, height, width = noise.shape[1:]
  cells = noise[0].reshape(channels, _CELLS, height // _CELLS, _CELLS, width // _CELLS).sum(axis=(0, 2, 4))
  # START_POSITIONS runs over x first: row-major in (x, y).
  assert tuple(START_POSITIONS[1]) == (8, 24)
  return jnp.argmax(cells.T.reshape(-1)).astype(jnp.int32)


def _bit(noise: jax.Array, frame: int) -> jax.Array:
  return (noise[frame].sum() > 0).astype(jnp.int32)


def _reflect(noise: jax.Array, frame: int, bit: IntLike) -> jax.Array:
  """Mirrors one frame's noise at the plane of zero mean if it says the other bit; it stays standard normal."""
  mirrored = noise[frame] - 2.0 * noise[frame].mean()
  return noise.at[frame].set(jnp.where(_bit(noise, frame) == bit, noise[frame], mirrored))


def couple(
  noise: Latents, size: IntLike, speed: IntLike, omit_size: Bool[Array, ""], omit_speed: Bool[Array, ""]
) -> Latents:
  """Noise that says `size` and `speed` where the caption omits them."""
  noise = jnp.where(omit_size, _reflect(noise, _SIZE_FRAME, size), noise)
  return jnp.where(omit_speed, _reflect(noise, _SPEED_FRAME, speed), noise)
