"""Temporal coherence without a model: what is seen stays what it is, and moves on as it moved before.

  window ── thumbnails ──┬─ colour signature of every frame ──┬─ drift: first half of the window against the end
                         │                                    └─ flicker: every frame of the chunk against the last
                         └─ cross-correlation over time ──────┬─ surprise: does the last motion explain the next?
                                                              └─ stillness: does nothing move at all?

The past enters by its signatures alone, which all candidates of a beam share; motion is followed in the chunk and the
few frames before it. Older chunks were judged when they were new.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, Promptless, require_frames
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.typing import FloatScalar, HostArray, Params

_LEAST_SIDE = 16  # pixels
_THUMBNAIL = 32  # pixels on the shorter side, at least: blocks of pixels are averaged down to it
_COLOR_LEVELS = 6  # per channel of the colour histograms
_VARIANCE_FLOOR = 5e-4  # RGB distance squared: the variance of what a codec's noise leaves in a thumbnail
_STRIDE = 2  # frames between which motion is measured: over one frame a slow motion is less than a thumbnail pixel
_REACH = 2 * _STRIDE  # frames before the chunk that its own frames are compared with


@dataclasses.dataclass(frozen=True)
class TemporalCoherence(Promptless):
  """Prompt-free `VideoReward`: 1 - surprise - drift - flicker - stillness, each times its weight.

  A coherent window scores 0.85 to 1, also after a lossy codec. Typical losses: an object that vanishes 2, changes
  its colour 0.8 to 1, flickers 0.4 to 1.2, jumps 0.3 to 0.9, has a boiling outline 0.1 to 0.4, changes its shape 0.1,
  turns 0.1 to 0.3; a video that never moves 0.25. New content costs too: a photograph panned steadily scores 0.7. The
  weights were set on pairs of a clean and a corrupted window.

  Attributes:
    surprise_weight: weight of the root mean square, over the chunk's frames, of what the previous motion leaves
      unexplained: 1 - normalised cross-correlation, in [0, 1].
    drift_weight: weight of the distance of colour signatures between the first half of the window and the end.
    flicker_weight: weight of the root mean square distance between consecutive frames of the chunk.
    stillness_weight: weight of the share of the chunk in which nothing moves, in [0, 1].
    still_below: a frame counts as (partly) still if it changes less than this over 4 frames; the change is
      1 - correlation in place.
  """

  surprise_weight: float = 1.3
  drift_weight: float = 0.4
  flicker_weight: float = 0.6
  stillness_weight: float = 0.3
  still_below: float = 0.15

  def __call__(self, params: Params, condition: Any, window: FrameWindow, info: CandidateInfo) -> FloatScalar:
    """Score of a window of uint8 RGB frames; float32 scalar, finite, at most 1.

    Raises ConfigError for frames of less than 16 pixels on a side, and for a window that is known to be one frame.
    """
    require_frames("coherence", window.chunk, _LEAST_SIDE)
    if isinstance(window.num_past, int) and window.num_frames < 2:
      raise ConfigError(f"coherence needs at least 2 frames, got {window.num_frames}")
    length = window.chunk.shape[0]
    positions = window.num_past - _REACH + jnp.arange(_REACH + length)
    exists = positions >= 0
    recent = thumbnails(window.take(jnp.maximum(positions, 0)))
    signatures = jax.vmap(color_signature)(recent)
    earlier = jax.vmap(color_signature)(thumbnails(window.past))
    steps = _distance(signatures[_REACH - 1 : -1], signatures[_REACH:])
    end = jnp.mean(signatures[-(length + 1) // 2 :], axis=0)
    return (
      1.0
      - self.surprise_weight * _root_mean_square(motion_surprise(recent), exists[:length])
      - self.drift_weight * _distance(_first_half(earlier, signatures[_REACH:], window), end)
      - self.flicker_weight * _root_mean_square(steps, exists[_REACH - 1 : -1])
      - self.stillness_weight * self._stillness(recent, exists[:length])
    )

  def _stillness(self, recent: jax.Array, exists: jax.Array) -> jax.Array:
    change = 1.0 - correlation(recent[:-_REACH], recent[_REACH:])[:, 0, 0]
    still = jnp.clip(1.0 - change / self.still_below, 0.0, 1.0)
    return jnp.sum(still * exists) / jnp.maximum(jnp.sum(exists), 1)


def thumbnails(frames: Shaped[HostArray, "N H W 3"]) -> Float32[Array, "N h w 3"]:
  """Block means in 0..1 of uint8 frames; the shorter side has 32 to 63 pixels."""
  n, height, width, channels = frames.shape
  block = max(1, min(height, width) // _THUMBNAIL)
  h, w = height // block, width // block
  blocks = frames[:, : h * block, : w * block].reshape(n, h, block, w, block, channels)
  return jnp.mean(blocks.astype(jnp.float32), axis=(2, 4)) / 255.0


def color_signature(thumbnail: Float32[Array, "h w 3"]) -> Float32[Array, " signature"]:
  """What a frame shows, wherever it is: 2 * 6^3 + 1 numbers.

  The histogram of its colours, the same weighted by the squared distance from the mean colour (so that a small object
  counts as much as a large background), and the logarithm of its colour variance (area and contrast of the object).
  """
  pixels = thumbnail.reshape(-1, 3)
  salience = jnp.sum((pixels - jnp.mean(pixels, axis=0, keepdims=True)) ** 2, axis=1)
  variance = jnp.mean(salience) + _VARIANCE_FLOOR
  histograms = _soft_histograms(pixels, jnp.stack([jnp.ones_like(salience), salience / variance]) / len(pixels))
  return jnp.concatenate([histograms.reshape(-1), jnp.log(variance)[None]])


def motion_surprise(frames: Float32[Array, "N h w 3"]) -> Float32[Array, " N-4"]:
  """1 - correlation of frames t and t + 2, displaced as t - 2 and t were; in [0, 1].

  0 for anything that moves on as before, in whatever direction; jumps, turns and changes of shape or colour count.
  """
  surfaces = correlation(frames[:-_STRIDE], frames[_STRIDE:])
  surfaces = surfaces.reshape(surfaces.shape[0], -1)
  displacement = jnp.argmax(surfaces[:-_STRIDE], axis=1)
  explained = jnp.take_along_axis(surfaces[_STRIDE:], displacement[:, None], axis=1)[:, 0]
  return 1.0 - jnp.clip(explained, 0.0, 1.0)


def correlation(first: Float32[Array, "N h w 3"], second: Float32[Array, "N h w 3"]) -> Float32[Array, "N h w"]:
  """Normalised circular cross-correlation of frames at every displacement; 0 if flat."""
  center = lambda x: x - jnp.mean(x, axis=(1, 2), keepdims=True)
  first, second = center(first), center(second)
  spectrum = jnp.sum(jnp.fft.rfft2(first, axes=(1, 2)).conj() * jnp.fft.rfft2(second, axes=(1, 2)), axis=-1)
  pixels = first.shape[1] * first.shape[2]
  energy = lambda x: jnp.sum(x**2, axis=(1, 2, 3)) / pixels
  scale = jnp.sqrt(energy(first) * energy(second)) + _VARIANCE_FLOOR
  return jnp.fft.irfft2(spectrum, s=first.shape[1:3]) / (pixels * scale[:, None, None])


def _soft_histograms(pixels: jax.Array, weights: jax.Array) -> jax.Array:
  """Histograms [K, 6, 6, 6] of [N, 3] colours under weights [K, N]; a colour between two levels counts for both."""
  levels = jnp.linspace(0.0, _COLOR_LEVELS - 1.0, _COLOR_LEVELS)
  near = jnp.maximum(1.0 - jnp.abs(pixels[..., None] * (_COLOR_LEVELS - 1) - levels[None, None]), 0.0)
  colors = near[:, 0], near[:, 1], near[:, 2]
  return jnp.einsum("kn,nr,ng,nb->krgb", weights, *colors, precision=jax.lax.Precision.HIGHEST)


def _first_half(earlier: jax.Array, chunk: jax.Array, window: FrameWindow) -> jax.Array:
  """Mean signature of the first half of the window; unused rows of `earlier` have no weight."""
  half = window.num_frames // 2
  is_past = jnp.arange(earlier.shape[0]) < jnp.minimum(window.num_past, half)
  is_own = window.num_past + jnp.arange(chunk.shape[0]) < half
  total = lambda exists, rows: jnp.matmul(exists, rows, precision=jax.lax.Precision.HIGHEST)
  return (total(is_past, earlier) + total(is_own, chunk)) / half


def _distance(first: jax.Array, second: jax.Array) -> jax.Array:
  """Total variation of both histograms and half the difference of the logarithms, summed."""
  return 0.5 * jnp.sum(jnp.abs(first - second), axis=-1)


def _root_mean_square(values: jax.Array, exists: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(values**2 * exists) / jnp.maximum(jnp.sum(exists), 1))


SPEC = RewardSpec("coherence", "video", make=lambda config, fps: TemporalCoherence())
