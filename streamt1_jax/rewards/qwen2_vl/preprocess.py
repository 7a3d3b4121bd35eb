"""Frames to the patches of the vision tower, as the published models do it (docs/reference/rewards.md).

  frames uint8 ── which ones (video) ── resize to whole tokens ── normalise ── patches [S, N, V]

Everything but the choice of frames runs on the device; sizes are static.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards.qwen2_vl.config import VisionConfig
from streamt1_jax.typing import Frames, HostArray

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_ASPECT = 200
_FRAME_FACTOR = 2  # sampled frames come in whole temporal patches


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
  """Size near `height` x `width` whose sides are multiples of `factor` and whose area lies in the pixel budget.

  Both sides are rounded (half to even) to a multiple of `factor`; if the area is outside the budget, both are scaled
  to it first and rounded towards its inside.

  Raises ConfigError if a side is not positive, the aspect ratio exceeds 200, or the picture is so elongated that a side
  would become 0 within the budget.
  """
  if height < 1 or width < 1:
    raise ConfigError(f"a picture needs at least one row and one column, got {height}x{width}")
  if max(height, width) / min(height, width) > _MAX_ASPECT:
    raise ConfigError(f"the aspect ratio of a picture must be at most {_MAX_ASPECT}, got {height}x{width}")
  resized = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
  if math.prod(resized) > max_pixels:
    shrink = math.sqrt(height * width / max_pixels)
    resized = math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
  elif math.prod(resized) < min_pixels:
    grow = math.sqrt(min_pixels / (height * width))
    resized = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
  if min(resized) == 0:
    raise ConfigError(f"a picture of {height}x{width} is too elongated for {max_pixels} pixels in tiles of {factor}")
  return resized


def sample_frames(
  num_frames: int, fps: float, sample_fps: float = 2.0, min_frames: int = 4, max_frames: int = 768
) -> Int32[np.ndarray, " n"]:
  """Indices, even in number, of the frames that represent a video.

  Evenly spaced from the first to the last frame, `sample_fps` of them per second within the limits; counts and
  positions are rounded half to even.

  Raises ConfigError for fewer than 2 frames or an fps that is not positive.
  """
  if num_frames < _FRAME_FACTOR:
    raise ConfigError(f"a video needs at least {_FRAME_FACTOR} frames to be judged, got {num_frames}")
  if not (math.isfinite(fps) and fps > 0):
    raise ConfigError(f"fps must be positive, got {fps}")
  most = min(max_frames, num_frames) // _FRAME_FACTOR * _FRAME_FACTOR
  wanted = min(max(num_frames / fps * sample_fps, min_frames), most)
  count = round(wanted / _FRAME_FACTOR) * _FRAME_FACTOR
  return np.round(np.linspace(0, num_frames - 1, count)).astype(np.int32)


def resize(frames: Frames, size: tuple[int, int]) -> UInt8[HostArray, "Q {size[0]} {size[1]} 3"]:
  """Antialiased bicubic resize to `size`, rounded to bytes; VideoAlign was trained on it.

  In 1e-5 of the bytes, where the sum falls on a rounding tie, it is one level off torchvision's.
  """
  if frames.shape[1:3] == tuple(size):
    return frames
  shape = (frames.shape[0], *size, frames.shape[3])
  resized = jax.image.resize(
    frames.astype(jnp.float32), shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def resize_like_pillow(frames: Frames, size: tuple[int, int]) -> UInt8[HostArray, "Q {size[0]} {size[1]} 3"]:
  """Antialiased bicubic resize to `size`, byte for byte as Pillow 11.3 does it; HPSv3's.

  Columns first, then rows; each pass multiplies bytes by integer weights (22 fractional bits) and rounds to bytes
  again, so the result is the same on every device. The float resize differs in every sixth byte. Pillow 13 does the
  rows first for some changes of the aspect ratio, which moves a quarter of the bytes; HPSv3 is pinned to 11.3.
  """
  for axis, length in ((2, size[1]), (1, size[0])):
    if frames.shape[axis] != length:
      frames = _resample(frames, axis, length)
  return frames


def _resample(frames: Frames, axis: int, length: int) -> UInt8[Array, "Q rows columns 3"]:
  source, weights = _pillow_taps(frames.shape[axis], length)
  lead = (1,) * axis
  total = jnp.int32(1 << (_PILLOW_BITS - 1))
  for tap in range(source.shape[1]):
    weight = jnp.asarray(weights[:, tap]).reshape(*lead, -1, *(1,) * (frames.ndim - axis - 1))
    total = total + jnp.take(frames, source[:, tap], axis=axis).astype(jnp.int32) * weight
  return jnp.clip(total >> _PILLOW_BITS, 0, 255).astype(jnp.uint8)


_PILLOW_BITS = 22


@functools.cache
def _pillow_taps(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Source positions and integer weights, both int32 [new_length, taps], of one pass; unused taps weigh 0."""
  scale = length / new_length
  stretch = max(scale, 1.0)
  support = 2.0 * stretch
  taps = math.ceil(support) * 2 + 1
  center = (np.arange(new_length) + 0.5) * scale
  # The casts truncate towards zero, as C's do; a negative start is moved to 0 afterwards.
  first = np.maximum((center - support + 0.5).astype(np.int32), 0)
  end = np.minimum((center + support + 0.5).astype(np.int32), length)
  position = first[:, None] + np.arange(taps)
  weight = np.where(position < end[:, None], _cubic((position - center[:, None] + 0.5) / stretch), 0.0)
  weight /= weight.sum(axis=1, keepdims=True)
  fixed = np.trunc(weight * (1 << _PILLOW_BITS) + np.copysign(0.5, weight)).astype(np.int32)
  return np.minimum(position, length - 1).astype(np.int32), fixed


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel with a = -0.5."""
  x = np.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1.0
  far = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
  return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def normalise(frames: Frames) -> Float32[Array, "Q height width 3"]:
  """(level / 255 - mean) / std per channel, CLIP's statistics."""
  # XLA turns a division by something broadcast into a product with its rounded reciprocal, unless it cannot see that.
  # The last bit counts: where a picture is flat, the tower's first LayerNorm multiplies it by up to 1000.
  as_frames = lambda values: jnp.broadcast_to(jnp.asarray(values, jnp.float32), frames.shape)
  levels, std = jax.lax.optimization_barrier((as_frames(255.0), as_frames(_STD)))
  return (frames.astype(jnp.float32) / levels - as_frames(_MEAN)) / std


def to_patches(pixels: Float[Array, "Q height width 3"], config: VisionConfig) -> Float[Array, "S N V"]:
  """Pixels of a video to patches; a slice is `temporal_patch` frames.

  Patches of one token follow each other (token row, token column, row and column inside the token); the numbers of a
  patch are ordered channel, frame, row, column.
  """
  frames, height, width, channels = pixels.shape
  time, merge, side = config.temporal_patch, config.merge_size, config.patch_size
  rows, columns = height // config.token_pixels, width // config.token_pixels
  x = pixels.reshape(frames // time, time, rows, merge, side, columns, merge, side, channels)
  x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
  return x.reshape(frames // time, rows * columns * merge**2, config.patch_values)


def pictures_to_patches(pixels: Float[Array, "Q height width 3"], config: VisionConfig) -> Float[Array, "Q N V"]:
  """Single pictures, each repeated to fill a temporal patch, to patches."""
  return to_patches(jnp.repeat(pixels, config.temporal_patch, axis=0), config)


def grid_of(size: tuple[int, int], config: VisionConfig) -> tuple[int, int]:
  """Rows and columns of patches of a picture of `size`."""
  return size[0] // config.patch_size, size[1] // config.patch_size
