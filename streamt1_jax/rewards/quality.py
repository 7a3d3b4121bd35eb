"""Image quality without a model: sharp edges, clean flat areas, strong contrast.

  frame ── local range (3 x 3) ──┬─ concentration: are the edges few and strong?
                                 └─ strength: how high are they?
  frame ── colour variance ──────── spread: how much does it show?

A ghost, a blurred or ragged outline and noise all spread the same amount of edge over more pixels, so
*concentration* sees them all; it is Hoyer's sparseness (Hoyer 2004) and ignores contrast. Contrast alone would be
easy to please, and so would concentration (erase half of the picture): the weights balance the two.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from streamt1_jax.rewards.base import CandidateInfo, Promptless, require_frames
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.typing import FloatScalar, Frames, Params

_LEAST_SIDE = 16  # pixels
_STRENGTH_FLOOR = 0.1  # RGB distance; an edge below it hardly counts
_VARIANCE_FLOOR = 0.003  # RGB distance squared: what a shape of 40 pixels adds to a 64 x 64 frame


@dataclasses.dataclass(frozen=True)
class ImageQuality(Promptless):
  """Prompt-free `ImageReward`: the mean over the chunk's frames of

    concentration_weight * concentration + strength_weight * log(strength) + spread_weight * log(spread).

  Clean frames score about 0.5 to 1. Typical losses are: ghosts 0.2 to 1, half-erased shapes 0.1 to 0.6, blur 0.2 to
  0.9, noise 0.3 to 2, half the contrast 0.6 to 0.9, an empty frame more than 2. The weights were fitted to pairs of
  a clean and a corrupted frame, then scaled by 0.3. Comparable between candidates of one prompt only: texture and
  small subjects lower it.

  Attributes:
    concentration_weight: weight of the sparseness, in [0, 1], of the local range.
    strength_weight: weight of the natural logarithm of the edges' height.
    spread_weight: weight of the natural logarithm of the frame's colour standard deviation.
  """

  concentration_weight: float = 3.5
  strength_weight: float = 0.4
  spread_weight: float = 1.25

  def __call__(self, params: Params, condition: Any, chunk: Frames, info: CandidateInfo) -> FloatScalar:
    """Score of uint8 RGB frames [Q, H, W, 3]; float32 scalar, finite.

    Raises ConfigError for frames of less than 16 pixels on a side.
    """
    require_frames("quality", chunk, _LEAST_SIDE)
    return jnp.mean(jax.vmap(self._frame_quality)(jnp.asarray(chunk, jnp.float32) / 255.0))

  def _frame_quality(self, frame: jax.Array) -> jax.Array:
    edges = local_range(frame)
    spread = jnp.sqrt(jnp.sum(jnp.var(frame, axis=(0, 1))) + _VARIANCE_FLOOR)
    return (
      self.concentration_weight * concentration(edges)
      + self.strength_weight * jnp.log(edge_strength(edges) + _STRENGTH_FLOOR)
      + self.spread_weight * jnp.log(spread)
    )


def local_range(frame: Float32[Array, "H W 3"]) -> Float32[Array, "H-2 W-2"]:
  """Largest minus smallest value in every 3 x 3 neighbourhood of [H, W, 3]; norm over channels."""
  difference = _of_neighbours(jnp.maximum, frame) - _of_neighbours(jnp.minimum, frame)
  return jnp.linalg.norm(difference, axis=-1)


def concentration(edges: Float32[Array, " ..."]) -> FloatScalar:
  """Hoyer's sparseness (sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1) of n values.

  0 if all are equal (also if all are zero), 1 if only one is not zero.
  """
  root = edges.size**0.5
  norm = jnp.linalg.norm(edges.reshape(-1))
  ratio = jnp.where(norm > 0.0, jnp.sum(edges) / jnp.maximum(norm, 1e-6), root)
  return (root - ratio) / (root - 1.0)


def edge_strength(edges: Float32[Array, " ..."]) -> FloatScalar:
  """Mean of the values, weighted by their squares: the height of the strong edges, however few they are."""
  return jnp.sum(edges**3) / jnp.maximum(jnp.sum(edges**2), 1e-6)


def _of_neighbours(reduce, frame: jax.Array) -> jax.Array:
  rows = functools.reduce(reduce, (frame[:-2], frame[1:-1], frame[2:]))
  return functools.reduce(reduce, (rows[:, :-2], rows[:, 1:-1], rows[:, 2:]))


SPEC = RewardSpec("quality", "image", make=lambda config, fps: ImageQuality())
