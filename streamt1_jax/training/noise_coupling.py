"""Lets the noise of a first chunk say what its caption leaves open: one denoising step can then commit to it.

At sigma = 1 the input of the model is pure noise, and the best prediction of a video whose start position is unknown is
the average over all positions: a ghost. A model that is sampled in four steps cannot afford that. So noise and clip are
drawn together: the start cell is read off the noise, which is rolled until it says the clip's, and where the caption
omits size or speed, the noise is reflected until it says the clip's size or speed. All are functions of standard normal
noise with the right marginals, so at sampling time plain noise is all that is needed. (Minibatch optimal-transport
couplings do the same by assignment.)

A first chunk's noise is `[F, C, H, W]` with F >= 3; the frame is divided into 4 x 4 cells, one per start position of
the first object; the second starts half a world away from it. The noise says the cell whose sum in frame 0 is the
largest. Size and speed of the first object are said by the first half of the channels, those of the second by the
second half.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from streamt1_jax.data.shapes import START_POSITIONS
from streamt1_jax.typing import HostArray, IntScalar, Latents

_CELLS = 4
BIT_FRAMES = (1, 2)
"""Latent frames that say size and speed."""


def _cells(frame: Float[Array, "C H W"]) -> Float[Array, "4 4"]:
  """Sums of the cells, by (x, y)."""
  channels, height, width = frame.shape
  # START_POSITIONS runs over x first: row-major in (x, y).
  assert tuple(START_POSITIONS[1]) == (8, 24)
  return frame.reshape(channels, _CELLS, height // _CELLS, _CELLS, width // _CELLS).sum(axis=(0, 2, 4)).T


def rolled(
  noise: Latents, before: Latents, sigma: Float[HostArray, ""], start: IntScalar
) -> tuple[Latents, Bool[Array, ""]]:
  """Noise whose first frame is rolled by whole cells until the noisy chunk chooses a start.

  Args:
    noise: standard normal.
    before: what the noise will be added to.
    sigma: noise level; the noisy chunk is (1 - sigma) before + sigma noise.
    start: row of `START_POSITIONS`.

  Returns:
    The noise, and whether there is such a roll. There nearly always is.
  """
  of_noise, of_before = _cells(noise[0]), _cells(before[0])
  rolls = [(x, y) for x in range(_CELLS) for y in range(_CELLS)]
  noisy = jnp.stack([(1.0 - sigma) * of_before + sigma * jnp.roll(of_noise, roll, (0, 1)) for roll in rolls])
  matches = jnp.argmax(noisy.reshape(len(rolls), -1), axis=1) == start
  which = jnp.asarray(rolls, jnp.int32)[jnp.argmax(matches)]
  height, width = (size // _CELLS for size in noise.shape[2:])
  first = jnp.roll(noise[0], which[::-1] * jnp.array([height, width]), (1, 2))
  return noise.at[0].set(first), matches.any()


def says(noise: Latents) -> Int32[Array, "2 2"]:
  """Sizes and speeds that a chunk says, by object and (size, speed)."""
  return jnp.stack([(_half(noise, frame).sum(axis=(1, 2, 3)) > 0).astype(jnp.int32) for frame in BIT_FRAMES], axis=1)


def _half(noise: jax.Array, frame: int) -> jax.Array:
  """[2, C / 2, H, W] of a frame: the channels of each object."""
  channels, height, width = noise.shape[1:]
  return noise[frame].reshape(2, channels // 2, height, width)


def couple(noise: Latents, values: Int32[Array, "2 2"], omitted: Bool[Array, "2 2"]) -> Latents:
  """Noise that says the sizes and speeds that a caption omits.

  What says another one is mirrored at the plane of zero mean: it stays standard normal.

  Args:
    noise: a noisy chunk.
    values: size and speed of each object.
    omitted: whether the caption is silent about them.
  """
  wrong = omitted & (says(noise) != values)
  for column, frame in enumerate(BIT_FRAMES):
    halves = _half(noise, frame)
    mirrored = halves - 2.0 * halves.mean(axis=(1, 2, 3), keepdims=True)
    halves = jnp.where(wrong[:, column, None, None, None], mirrored, halves)
    noise = noise.at[frame].set(halves.reshape(noise[frame].shape))
  return noise
