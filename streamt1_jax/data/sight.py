"""What a video of the shapes world shows, measured from its frames: the background, and each object's pixels and track.

frames ── median ── background ─┐
   └────────────────────────────┴─ which colours are there ── mixture of every pixel ── coverage of each object
                                                                                            │
                     size, centre, likeness to every shape ── what the front object must hide of the other
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped, UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.data.world import Description
from streamt1_jax.typing import FloatLike

MIN_PIXELS = 20
"""Fewer pixels are no object; the smallest object covers 154."""

_SIZE = shapes.FRAME_SIZE
_COLORS = np.array(list(shapes.COLORS.values()), np.float32)
_RADII = np.array(list(shapes.SIZES.values()), np.float32)
_AREAS = np.pi * _RADII**2

_FOREGROUND_DISTANCE = 60.0  # RGB units; the faintest object is 136 from its background
_SAME_COLOR = 75.0  # less than half of what is between two object colours, and more than half a blurred rim
_TOUCHING = 3  # pixels between two objects that are too near to be told apart at their rims
_FEW_CLEAR = 4  # frames


class ObjectSight(NamedTuple):
  """What a clip shows of one object, whatever its caption says.

  Attributes:
    color: RGB in 0..255, NaN where too little is seen.
    shows: whether its colour can be read.
    present: whether there is anything of it.
    clear: whether it is there and touches no other object.
    size: index into `shapes.SIZES`.
    nominal: area of that size in pixels.
    coverage: in [0, 1].
    centers: (x, y) in pixels, interpolated where the object is not clear; NaN if it never is.
    area: in pixels, near the centre.
    strays: its pixels far from the centre.
    likeness: correlation with every shape of its size.
    visible_area: what must be seen of it, in pixels.
  """

  color: Float[np.ndarray, "T 3"]
  shows: Bool[np.ndarray, " T"]
  present: Bool[np.ndarray, " T"]
  clear: Bool[np.ndarray, " T"]
  size: int
  nominal: float
  coverage: Float[np.ndarray, "T 64 64"]
  centers: Float[np.ndarray, "T 2"]
  area: Float[np.ndarray, " T"]
  strays: Int[np.ndarray, " T"]
  likeness: Float[np.ndarray, "T 3"]
  visible_area: Float[np.ndarray, " T"]


class Sight(NamedTuple):
  """What a clip shows.

  Attributes:
    background: RGB in 0..255.
    objects: as many as the caption names.
    unexplained: pixels that are neither background nor any of the objects.
    overlap: pixels in which two objects must overlap.
    front_share: how many of them show the first object.
  """

  background: Float[np.ndarray, "T 3"]
  objects: list[ObjectSight]
  unexplained: Int[np.ndarray, " T"]
  overlap: Float[np.ndarray, " T"]
  front_share: Float[np.ndarray, " T"]


def look(frames: UInt8[np.ndarray, "T 64 64 3"], description: Description) -> Sight:
  """Measures a clip that should show the objects of a description.

  An object is what has its colour. Where a colour is missing, it is what has the most frequent other colour: so that
  an object of a wrong colour may still be of the right shape.

  Args:
    frames: `[T, 64, 64, 3]` uint8 RGB, T >= 2, consecutive.
    description: of what the clip should show.

  Raises:
    ConfigError: if `frames` has another shape or dtype.
  """
  frames = checked(frames)
  # Objects cover less than half a frame, so the median is background even where they are badly drawn.
  background = np.median(frames.reshape(len(frames), -1, 3), axis=1)
  colors = _COLORS[_colors_shown(frames, background, [thing.color for thing in description.things])]
  coverage, residual = unmix(frames, background, colors)
  masks = [cover > 0.5 for cover in coverage]
  clear = present = [np.any(mask, axis=(1, 2)) for mask in masks]
  if len(masks) == 2:
    apart = present[0] & present[1] & ~(_grown(masks[0]) & masks[1]).any(axis=(1, 2))
    # Behind the other object there may be nothing to see.
    clear = [apart if apart.sum() >= _FEW_CLEAR else there for there in present]
  measured = [_measure(frames, cover, c) for cover, c in zip(coverage, clear, strict=True)]
  unexplained = residual > _FOREGROUND_DISTANCE
  if len(masks) == 2:
    # Where two objects meet, a video codec mixes three colours.
    unexplained &= ~(_grown(masks[0]) & _grown(masks[1]))
  objects, overlap, front_share = _with_hidden_parts(measured)
  return Sight(background, objects, unexplained.sum(axis=(1, 2)), overlap, front_share)


def checked(frames: Shaped[np.ndarray, " ..."]) -> Float32[np.ndarray, "T 64 64 3"]:
  """Frames as float32. Raises ConfigError unless they are at least 2 uint8 frames of 64x64."""
  frames = np.asarray(frames)
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (_SIZE, _SIZE, 3) or len(frames) < 2:
    raise ConfigError(
      f"expected at least 2 uint8 frames of {_SIZE}x{_SIZE}x3, got {frames.dtype} of shape {frames.shape}"
    )
  return frames.astype(np.float32)


def _colors_shown(frames: np.ndarray, background: np.ndarray, expected: list[int]) -> list[int]:
  """The colours of the objects that a clip shows in place of those expected."""
  is_background = _length(frames - background[:, None, None]) < _FOREGROUND_DISTANCE
  distance = np.stack([_length(frames - color) for color in _COLORS])
  near = (distance.min(axis=0) < _SAME_COLOR) & ~is_background
  nearest = distance.argmin(axis=0)
  count = np.array([(near & (nearest == color)).sum() for color in range(len(_COLORS))]) / len(frames)
  shown = [color for color in np.argsort(-count) if count[color] >= MIN_PIXELS and color not in expected]
  return [color if count[color] >= MIN_PIXELS or not shown else int(shown.pop(0)) for color in expected]


def unmix(
  frames: Float32[np.ndarray, "T 64 64 3"],
  background: Float[np.ndarray, "T 3"],
  colors: Float[np.ndarray, "objects 3"],
) -> tuple[list[Float[np.ndarray, "T 64 64"]], Float[np.ndarray, "T 64 64"]]:
  """How much of each object every pixel shows, and how far its colour is from any mixture.

  A pixel is a mixture of the background and one object, or of both objects, whichever is nearest.

  Args:
    frames: [T, 64, 64, 3] float32 RGB in 0..255.
    background: [T, 3] RGB.
    colors: [n, 3] RGB of one object or two.
  """
  base = background[:, None, None]
  mixes = [_between(frames, base, color) for color in colors]
  shares = [[share if i == index else np.zeros_like(share) for i in range(len(colors))]
            for index, (share, _) in enumerate(mixes)]  # fmt: skip
  residuals = [residual for _, residual in mixes]
  if len(colors) == 2:
    share, residual = _between(frames, colors[0], colors[1])
    shares.append([1.0 - share, share])
    residuals.append(residual)
  best = np.argmin(residuals, axis=0)[None]
  pick = lambda values: np.take_along_axis(np.stack(values), best, axis=0)[0]
  return [pick([share[index] for share in shares]) for index in range(len(colors))], pick(residuals)


def _between(frames: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where on the way from one colour to another every pixel is, in [0, 1], and how far from it."""
  way = end - start
  length = np.maximum(np.linalg.norm(way, axis=-1), _FOREGROUND_DISTANCE)
  done = frames - start
  share = np.clip(np.einsum("...c,...c->...", done, way) / length**2, 0.0, 1.0)
  return share, _length(done - share[..., None] * way)


def _length(colors: np.ndarray) -> np.ndarray:
  """Length of vectors of three numbers; `np.linalg.norm` takes several times longer for so short an axis."""
  return np.sqrt(np.einsum("...c,...c->...", colors, colors))


def _measure(frames: np.ndarray, coverage: np.ndarray, clear: np.ndarray) -> ObjectSight:
  mask = coverage > 0.5
  pixels = mask.sum(axis=(1, 2))
  size = _nearest_size(pixels[clear])
  centers = _tracked(_circular_centers(mask), clear)
  # The farthest corner any shape of this size has, and a margin for blur.
  nearby = distance_from(centers) < _corner(_RADII[size]) + 3.0
  color = _object_colors(frames, coverage)
  visible = np.full(len(frames), _AREAS[size])
  return ObjectSight(
    color=color,
    shows=np.isfinite(color[:, 0]),
    present=pixels > 0,
    clear=clear,
    size=size,
    nominal=float(_AREAS[size]),
    coverage=coverage,
    centers=centers,
    area=np.sum(coverage * nearby, axis=(1, 2)),
    strays=np.sum(mask & ~nearby, axis=(1, 2)),
    likeness=_template_correlations(coverage, size),
    visible_area=visible,
  )


def _with_hidden_parts(objects: list[ObjectSight]) -> tuple[list[ObjectSight], np.ndarray, np.ndarray]:
  """The objects with what the first one hides of the second, and where they overlap."""
  none = np.zeros(len(objects[0].present))
  if len(objects) == 1 or not all(seen.present.any() for seen in objects):
    return objects, none, none
  front, back = objects
  ideal = [ideal_coverage(_usual_shape(seen), _RADII[seen.size], seen.centers) for seen in objects]
  visible = (ideal[1] * (1.0 - ideal[0])).sum(axis=(1, 2))
  both = ideal[0] * ideal[1]
  of_front, of_back = ((both * seen.coverage).sum(axis=(1, 2)) for seen in objects)
  share = of_front / np.maximum(of_front + of_back, 1e-6)
  return [front, back._replace(visible_area=visible)], both.sum(axis=(1, 2)), share


def _usual_shape(seen: ObjectSight) -> int:
  return int(seen.likeness[seen.clear].mean(axis=0).argmax())


def ideal_coverage(shape: int, radius: FloatLike, centers: Float[np.ndarray, "T 2"]) -> Float[np.ndarray, "T 64 64"]:
  """Coverage in [0, 1] of a shape at real-valued centres."""
  offsets = (np.arange(_SIZE)[None, :, None] + 0.5 - centers[:, None, :] + _SIZE / 2) % _SIZE - _SIZE / 2
  x, y = offsets[:, None, :, 0], offsets[:, :, None, 1]
  return np.clip(0.5 - np.asarray(shapes.signed_distance(shape, radius, x, y)), 0.0, 1.0)


def _object_colors(frames: np.ndarray, coverage: np.ndarray) -> np.ndarray:
  """`[T, 3]` median colour of the half of the object farthest from the background, NaN without an object.

  That half excludes the rim, where blur mixes object and background.
  """
  colors = np.full((len(frames), 3), np.nan, np.float32)
  for index, (frame, cover) in enumerate(zip(frames, coverage, strict=True)):
    values = cover[cover > 0.4]
    if values.size >= MIN_PIXELS:
      colors[index] = np.median(frame[cover >= np.median(values)], axis=0)
  return colors


def _nearest_size(pixels: np.ndarray) -> int:
  typical = max(np.percentile(pixels, 50), 1.0) if pixels.size else 1.0
  return int(np.argmin(np.abs(np.log(typical / _AREAS))))


def _circular_centers(mask: np.ndarray) -> np.ndarray:
  """`[T, 2]` (x, y) circular mean of the positions of mask pixels, in [0, 64); NaN where the mask is empty."""
  phase = np.exp(2j * np.pi * (np.arange(_SIZE) + 0.5) / _SIZE)
  count = np.sum(mask, axis=(1, 2))
  moments = np.stack([mask.sum(axis=1) @ phase, mask.sum(axis=2) @ phase], axis=-1)
  centers = np.mod(np.angle(moments) * _SIZE / (2 * np.pi), _SIZE)
  return np.where(count[:, None] > 0, centers, np.nan)


def _tracked(centers: np.ndarray, clear: np.ndarray) -> np.ndarray:
  """`centers`, and where they are not clear what lies between those that are, at the velocity of the world nearest."""
  times = np.flatnonzero(clear)
  if len(times) in (0, len(centers)):
    return centers
  moves = [np.array(step) * speed for step in shapes.DIRECTIONS.values() for speed in shapes.SPEEDS.values()]
  every, best = np.arange(len(centers)), None
  for velocity in [np.zeros(2), *moves]:
    rest = np.unwrap(centers[times] - velocity * times[:, None], period=_SIZE, axis=0)
    spread = np.square(rest - np.median(rest, axis=0)).sum(axis=1).mean()
    if best is None or spread < best[0]:
      between = np.stack([np.interp(every, times, rest[:, axis]) for axis in range(2)], axis=1)
      best = spread, between + velocity * every[:, None]
  assert best is not None
  return np.where(clear[:, None], centers, np.mod(best[1], _SIZE))


def distance_from(centers: Float[np.ndarray, "T 2"]) -> Float[np.ndarray, "T 64 64"]:
  """Distance on the torus of every pixel to the centre of its frame; NaN without a centre."""
  offsets = np.arange(_SIZE)[None, :, None] + 0.5 - centers[:, None, :]
  squared = (np.mod(offsets + _SIZE / 2, _SIZE) - _SIZE / 2) ** 2
  return np.sqrt(squared[:, None, :, 0] + squared[:, :, None, 1])


def _corner(radius: FloatLike) -> FloatLike:
  """Distance in pixels from the centroid to a corner of the triangle with the area of that circle."""
  return 2.0 * radius * np.pi**0.5 / 27**0.25


def _grown(mask: np.ndarray) -> np.ndarray:
  """A mask and what is within a few pixels of it, on the torus."""
  for axis in (1, 2):
    mask = functools.reduce(np.logical_or, [np.roll(mask, by, axis) for by in range(-_TOUCHING, _TOUCHING + 1)])
  return mask


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
