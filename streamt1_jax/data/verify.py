"""Does a video of the shapes world show what its caption says?

Every verdict is measured from the frames alone and compared with the caption's attributes. All verdicts hold in any
temporal window of a long video, because objects move for ever on a torus. The thresholds lie between two kinds of
clips: correct ones, blurred and made noisy to about 28 dB, must pass, and clips with one defect must fail.

  frames ── background (median) ── object colour ── coverage [T, 64, 64] ──┬─ centroid track ── motion
                                                                          ├─ area ── size, permanence
                                                                          └─ template correlation ── shape
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.typing import FloatLike

VERDICTS = ("background", "color", "size", "motion", "shape", "permanence", "all_at_once")
"""Keys of every result; `all_at_once` is the conjunction of the others."""
DRIFT_WINDOWS = ((0, 5), (7, 12), (15, 20), (24, 29))
"""Windows, in seconds, of a video of 30 seconds: 40 chunks, which are 29.8."""

_SIZE = shapes.FRAME_SIZE
_COLORS = np.array(list(shapes.COLORS.values()), np.float32)
_BACKGROUNDS = np.array(list(shapes.BACKGROUNDS.values()), np.float32)
_RADII = np.array(list(shapes.SIZES.values()), np.float32)
_AREAS = np.pi * _RADII**2

_FOREGROUND_DISTANCE = 60.0  # RGB units; the faintest object is 136 from its background
_COLOR_TOLERANCE = 60.0  # less than half the distance between any two object colours
_BACKGROUND_TOLERANCE = 45.0  # half the distance between black and dark green
_MIN_OBJECT_PIXELS = 20  # the smallest object covers 154
_MOST_FRAMES = 0.9  # of a clip; permanence alone must hold in all of them
_VELOCITY_TOLERANCE = 0.25  # pixels per frame, on each axis; speeds are 1 apart
_TRACK_TOLERANCE = 3.0  # pixels, root mean square distance from a straight line
_AREA_BOUNDS = (0.75, 1.3)  # of the nominal area; small and large differ by 2.47
_STRAY_SHARE = 0.1  # foreground pixels away from the object, of the object's area
# Right shapes reach 0.97 at 30 dB. The best of the three decides, and this bound rejects all other shapes.
_MIN_CORRELATION = 0.9


class _Measurement(NamedTuple):
  """What a clip shows, whatever its caption says."""

  background: Float[np.ndarray, "T 3"]  # RGB in 0..255
  color: Float[np.ndarray, "T 3"]  # RGB in 0..255, NaN without an object
  present: Bool[np.ndarray, " T"]
  size: int  # index into `shapes.SIZES`
  coverage: Float[np.ndarray, "T 64 64"]  # in [0, 1]
  centers: Float[np.ndarray, "T 2"]  # (x, y) in pixels, NaN where there is no object
  area: Int[np.ndarray, " T"]  # pixels, near the centre
  strays: Int[np.ndarray, " T"]  # pixels that are not background, far from the centre


def verify(frames: np.ndarray, attributes: shapes.Attributes) -> dict[str, bool]:
  """Checks a clip, or a window of one, against the attributes of its caption.

  Args:
    frames: `[T, 64, 64, 3]` uint8 RGB, T >= 2, consecutive.
    attributes: what the caption says; see `shapes.parse_caption`. Where `size` or `speed` is `None`, any will do.

  Returns:
    One bool for each of `VERDICTS`.

  Raises:
    ConfigError: if `frames` has another shape or dtype.
  """
  clip = _measure(_checked(frames))
  verdicts = {
    "background": _matches(clip.background, _BACKGROUNDS, attributes.background, _BACKGROUND_TOLERANCE),
    "color": _matches(clip.color, _COLORS, attributes.color, _COLOR_TOLERANCE),
    "size": _size_is_right(clip, attributes.size),
    "motion": _motion_is_right(clip, attributes.direction, attributes.speed),
    "shape": _shape_is_right(clip, attributes.shape),
    "permanence": _is_permanent(clip),
  }
  return verdicts | {"all_at_once": all(verdicts.values())}


def verify_windows(
  frames: np.ndarray,
  attributes: shapes.Attributes,
  windows: Sequence[tuple[int, int]] = DRIFT_WINDOWS,
) -> list[dict[str, bool]]:
  """`verify` on every window that lies wholly within the video.

  Args:
    frames: `[T, 64, 64, 3]` uint8 RGB.
    attributes: what the caption says.
    windows: (begin, end) in seconds.
  """
  spans = [(begin * shapes.FPS, end * shapes.FPS) for begin, end in windows]
  return [verify(frames[begin:end], attributes) for begin, end in spans if end <= len(frames)]


def verify_rates(results: Iterable[Mapping[str, bool]]) -> dict[str, float]:
  """Share of clips, in [0, 1], for which each verdict holds. Raises ConfigError if there are no results."""
  results = list(results)
  if not results:
    raise ConfigError("no verified clips to average over")
  return {name: float(np.mean([result[name] for result in results])) for name in VERDICTS}


def _checked(frames: np.ndarray) -> np.ndarray:
  frames = np.asarray(frames)
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (_SIZE, _SIZE, 3) or len(frames) < 2:
    raise ConfigError(
      f"expected at least 2 uint8 frames of {_SIZE}x{_SIZE}x3, got {frames.dtype} of shape {frames.shape}"
    )
  return frames.astype(np.float32)


def _measure(frames: np.ndarray) -> _Measurement:
  # No object covers half a frame, so the median is background even where the object is badly drawn.
  background = np.median(frames.reshape(len(frames), -1, 3), axis=1)
  difference = frames - background[:, None, None, :]
  distance = np.linalg.norm(difference, axis=-1)
  color = _object_colors(frames, distance)
  present = np.isfinite(color[:, 0])
  contrast = _clip_contrast(color[present], background)
  contrast_norm = np.maximum(np.linalg.norm(contrast, axis=-1)[:, None, None], _FOREGROUND_DISTANCE)
  coverage = np.clip(np.einsum("thwc,tc->thw", difference, contrast) / contrast_norm**2, 0.0, 1.0)
  mask = distance > 0.5 * contrast_norm
  size = _nearest_size(mask[present].sum(axis=(1, 2)))
  centers = _circular_centers(mask)
  # The farthest corner any shape of this size has, and a margin for blur.
  nearby = _distance_from(centers) < _triangle_corner(_RADII[size]) + 3.0
  return _Measurement(
    background=background,
    color=color,
    present=present & mask.any(axis=(1, 2)),
    size=size,
    coverage=coverage,
    centers=centers,
    area=np.sum(coverage * nearby, axis=(1, 2)),
    strays=np.sum((distance > _FOREGROUND_DISTANCE) & ~nearby, axis=(1, 2)),
  )


def _object_colors(frames: np.ndarray, distance: np.ndarray) -> np.ndarray:
  """`[T, 3]` median colour of the half of the object farthest from the background, NaN without an object.

  That half excludes the rim, where blur mixes object and background.
  """
  colors = np.full((len(frames), 3), np.nan, np.float32)
  for index, (frame, far) in enumerate(zip(frames, distance, strict=True)):
    values = far[far > _FOREGROUND_DISTANCE]
    if values.size >= _MIN_OBJECT_PIXELS:
      colors[index] = np.median(frame[far >= np.median(values)], axis=0)
  return colors


def _clip_contrast(colors: np.ndarray, background: np.ndarray) -> np.ndarray:
  """`[T, 3]` from the background to the palette colour nearest to the clip's object.

  The palette's colour, not the one measured: a half transparent object must have half the coverage.
  """
  typical = np.median(colors, axis=0) if len(colors) else np.full(3, np.inf)
  return _COLORS[np.argmin(np.linalg.norm(_COLORS - typical, axis=-1))] - background


def _nearest_size(pixels: np.ndarray) -> int:
  typical = max(np.median(pixels), 1.0) if pixels.size else 1.0
  return int(np.argmin(np.abs(np.log(typical / _AREAS))))


def _circular_centers(mask: np.ndarray) -> np.ndarray:
  """`[T, 2]` (x, y) circular mean of the positions of mask pixels, in [0, 64); NaN where the mask is empty."""
  phase = np.exp(2j * np.pi * (np.arange(_SIZE) + 0.5) / _SIZE)
  count = np.sum(mask, axis=(1, 2))
  moments = np.stack([mask.sum(axis=1) @ phase, mask.sum(axis=2) @ phase], axis=-1)
  centers = np.mod(np.angle(moments) * _SIZE / (2 * np.pi), _SIZE)
  return np.where(count[:, None] > 0, centers, np.nan)


def _distance_from(centers: np.ndarray) -> np.ndarray:
  """`[T, 64, 64]` distance on the torus of every pixel to the centre of its frame; NaN without a centre."""
  offsets = np.arange(_SIZE)[None, :, None] + 0.5 - centers[:, None, :]
  squared = (np.mod(offsets + _SIZE / 2, _SIZE) - _SIZE / 2) ** 2
  return np.sqrt(squared[:, None, :, 0] + squared[:, :, None, 1])


def _triangle_corner(radius: FloatLike) -> FloatLike:
  """Distance in pixels from the centroid to a corner of the triangle with the area of that circle."""
  return 2.0 * radius * np.pi**0.5 / 27**0.25


def _matches(colors: np.ndarray, palette: np.ndarray, expected: int, tolerance: float) -> bool:
  # A frame without an object has the colour NaN, which no comparison accepts.
  distances = np.linalg.norm(colors[:, None, :] - palette[None, :, :], axis=-1)
  right = (distances.argmin(axis=1) == expected) & (distances[:, expected] < tolerance)
  return bool(right.mean() >= _MOST_FRAMES)


def _size_is_right(clip: _Measurement, expected: int | None) -> bool:
  right = _within_bounds(clip.area / _AREAS[clip.size])
  return expected in (None, clip.size) and bool(right.mean() >= _MOST_FRAMES)


def _motion_is_right(clip: _Measurement, direction: int, speed: int | None) -> bool:
  if clip.present.mean() < _MOST_FRAMES:
    return False
  times = np.flatnonzero(clip.present)
  track = np.unwrap(clip.centers[clip.present], period=_SIZE, axis=0)
  slope, intercept = np.polyfit(times, track, 1)
  residual = track - (slope * times[:, None] + intercept)
  straight = np.sqrt(np.mean(np.sum(residual**2, axis=-1))) < _TRACK_TOLERANCE
  speeds = list(shapes.SPEEDS.values()) if speed is None else [list(shapes.SPEEDS.values())[speed]]
  heading = np.array(list(shapes.DIRECTIONS.values())[direction])
  return bool(straight and any(np.abs(slope - heading * pace).max() < _VELOCITY_TOLERANCE for pace in speeds))


def _shape_is_right(clip: _Measurement, expected: int) -> bool:
  peaks = _template_correlations(clip.coverage, clip.size)
  right = (peaks.argmax(axis=1) == expected) & (peaks[:, expected] > _MIN_CORRELATION) & clip.present
  return bool(right.mean() >= _MOST_FRAMES)


def _is_permanent(clip: _Measurement) -> bool:
  nominal = _AREAS[clip.size]
  steady = _within_bounds(clip.area / nominal)
  alone = clip.strays < _STRAY_SHARE * nominal
  return bool(np.all(clip.present & steady & alone))


def _within_bounds(ratio: np.ndarray) -> np.ndarray:
  return (ratio > _AREA_BOUNDS[0]) & (ratio < _AREA_BOUNDS[1])


def _template_correlations(coverage: np.ndarray, size: int) -> np.ndarray:
  """`[T, 3]` normalised cross-correlation with every shape of a size, at the best whole-pixel position."""
  image = coverage - coverage.mean(axis=(1, 2), keepdims=True)
  image /= np.maximum(np.linalg.norm(image, axis=(1, 2), keepdims=True), 1e-6)
  spectrum = np.fft.rfft2(image)[:, None] * _template_spectra(size).conj()[None]
  return np.fft.irfft2(spectrum, s=(_SIZE, _SIZE)).max(axis=(2, 3))


@functools.cache
def _template_spectra(size: int) -> np.ndarray:
  """`[3, 64, 33]` spectra of the coverage of every shape, with mean 0 and norm 1."""
  x = jnp.arange(_SIZE, dtype=jnp.float32)[None, :] + 0.5 - _SIZE / 2
  distances = [shapes.signed_distance(shape, _RADII[size], x, x.T) for shape in range(len(shapes.SHAPES))]
  coverage = np.clip(0.5 - np.stack(distances), 0.0, 1.0)
  coverage -= coverage.mean(axis=(1, 2), keepdims=True)
  return np.fft.rfft2(coverage / np.linalg.norm(coverage, axis=(1, 2), keepdims=True))
