"""Does a video of the shapes world show what its caption says?

Every verdict is measured from the frames alone and compared with what the caption says. All verdicts hold in any
temporal window of a long video, because objects move for ever on a torus. The thresholds lie between two kinds of
clips: correct ones, blurred and made noisy to about 28 dB, must pass, and clips with one defect must fail.

  frames ── `sight.look` ── background, and of each object its colour, coverage [T, 64, 64], track
                 │
                 ├─ clear frames, in which no other object touches it ── size, shape, motion
                 └─ all frames, with what the front object must hide ─── permanence
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes, sight, world
from streamt1_jax.data.sight import ObjectSight, Sight
from streamt1_jax.data.world import Description

VERDICTS = ("background", "color", "size", "motion", "shape", "permanence", "all_at_once")
"""Keys of every result; `all_at_once` is the conjunction of the others."""
OBJECT_VERDICTS = ("color", "size", "motion", "shape", "permanence")
"""What is said of every object."""
DRIFT_WINDOWS = ((0, 5), (7, 12), (15, 20), (24, 29))
"""Windows, in seconds, of a video of 30 seconds: 40 chunks, which are 29.8."""

_COLOR_TOLERANCE = 60.0  # less than half the distance between any two object colours
_BACKGROUND_TOLERANCE = 45.0  # half the distance between black and dark green
_MOST_FRAMES = 0.9  # of a clip; permanence alone must hold in all of them
_VELOCITY_TOLERANCE = 0.25  # pixels per frame, on each axis; speeds are 1 apart
_TRACK_TOLERANCE = 3.0  # pixels, root mean square distance from a straight line
_AREA_BOUNDS = (0.75, 1.3)  # of the nominal area; small and large differ by 2.47
_HIDDEN_TOLERANCE = 0.3  # of the nominal area, from what the front object leaves to be seen
_LEGIBLE_SHARE = 0.6  # of the nominal area; the colour of a partly hidden object is judged only if this much is visible
_STRAY_SHARE = 0.1  # foreground pixels away from the object, of the object's area
_OVERLAP = 40  # pixels in which two objects overlap; with fewer, nobody sees which is in front
# Right shapes reach 0.97 at 30 dB. The best of the three decides, and this bound rejects all other shapes.
_MIN_CORRELATION = 0.9


def verify(frames: UInt8[np.ndarray, "T 64 64 3"], description: Description) -> dict[str, bool]:
  """Checks a clip, or a window of one, against its caption.

  Args:
    frames: `[T, 64, 64, 3]` uint8 RGB, T >= 2, consecutive.
    description: what the caption says; see `world.parse`. Where `size` or `speed` is `None`, any will do.

  Returns:
    One bool for each of `VERDICTS`; those of objects hold if they hold for each.

  Raises:
    ConfigError: if `frames` has another shape or dtype.
  """
  clip = sight.look(frames, description)
  objects = _objects(clip, description)
  both = {name: all(found[name] for found in objects) for name in OBJECT_VERDICTS}
  verdicts = {"background": _background_is_right(clip, description.background)} | both
  return verdicts | {"all_at_once": all(verdicts.values())}


def verify_objects(frames: UInt8[np.ndarray, "T 64 64 3"], description: Description) -> list[dict[str, bool]]:
  """What `verify` finds of each object: `OBJECT_VERDICTS`."""
  return _objects(sight.look(frames, description), description)


def verify_windows(
  frames: UInt8[np.ndarray, "T 64 64 3"],
  description: Description,
  windows: Sequence[tuple[int, int]] = DRIFT_WINDOWS,
) -> list[dict[str, bool]]:
  """`verify` on every window that lies wholly within the video.

  Args:
    frames: `[T, 64, 64, 3]` uint8 RGB.
    description: what the caption says.
    windows: (begin, end) in seconds.
  """
  spans = [(begin * shapes.FPS, end * shapes.FPS) for begin, end in windows]
  return [verify(frames[begin:end], description) for begin, end in spans if end <= len(frames)]


def verify_rates(results: Iterable[Mapping[str, bool]]) -> dict[str, float]:
  """Share of clips, in [0, 1], for which each verdict holds. Raises ConfigError if there are no results."""
  results = list(results)
  if not results:
    raise ConfigError("no verified clips to average over")
  return {name: float(np.mean([result[name] for result in results])) for name in VERDICTS}


def _objects(clip: Sight, description: Description) -> list[dict[str, bool]]:
  found = []
  for index, (seen, thing) in enumerate(zip(clip.objects, description.things, strict=True)):
    found.append(
      {
        "color": _color_is_right(seen, thing.color),
        "size": _size_is_right(seen, thing.size),
        "motion": _motion_is_right(seen, thing),
        "shape": _shape_is_right(seen, thing.shape),
        "permanence": _is_permanent(clip, index),
      }
    )
  return found


def _background_is_right(clip: Sight, expected: int) -> bool:
  return bool(_near(clip.background, shapes.BACKGROUNDS, expected, _BACKGROUND_TOLERANCE).mean() >= _MOST_FRAMES)


def _color_is_right(seen: ObjectSight, expected: int) -> bool:
  # A frame in which too little of the object is seen has the colour NaN, which no comparison accepts.
  judged = seen.shows | _may_be_hidden(seen)
  # What is left of an object behind another is mostly rim, where blur mixes the two.
  legible = seen.shows & (seen.visible_area >= _LEGIBLE_SHARE * seen.nominal)
  right = _near(seen.color, shapes.COLORS, expected, _COLOR_TOLERANCE)
  return bool(legible.any() and (right[legible].mean() >= _MOST_FRAMES) and judged.mean() >= _MOST_FRAMES)


def _near(colors: np.ndarray, table: Mapping[str, tuple[int, int, int]], expected: int, tolerance: float) -> np.ndarray:
  palette = np.array(list(table.values()), np.float32)
  distances = np.linalg.norm(colors[:, None, :] - palette[None, :, :], axis=-1)
  return (distances.argmin(axis=1) == expected) & (distances[:, expected] < tolerance)


def _size_is_right(seen: ObjectSight, expected: int | None) -> bool:
  right = _within_bounds(seen.area[seen.clear] / seen.nominal)
  return expected in (None, seen.size) and bool(right.size and right.mean() >= _MOST_FRAMES)


def _motion_is_right(seen: ObjectSight, thing: world.Thing) -> bool:
  times = np.flatnonzero(seen.clear)
  enough = seen.present | _may_be_hidden(seen)
  if len(times) < 2 or enough.mean() < _MOST_FRAMES:
    return False
  speeds = list(shapes.SPEEDS.values()) if thing.speed is None else [list(shapes.SPEEDS.values())[thing.speed]]
  heading = np.array(list(shapes.DIRECTIONS.values())[thing.direction])
  return any(_moves(seen.centers[times], times, heading * pace) for pace in speeds)


def _moves(centers: np.ndarray, times: np.ndarray, velocity: np.ndarray) -> bool:
  """Whether places (x, y) at some times lie on a straight line of about this velocity."""
  # What is left of the way wraps rarely, so gaps between the times do no harm.
  rest = np.unwrap(centers - velocity * times[:, None], period=shapes.FRAME_SIZE, axis=0)
  slope, intercept = np.polyfit(times, rest, 1)
  residual = rest - (slope * times[:, None] + intercept)
  straight = np.sqrt(np.mean(np.sum(residual**2, axis=-1))) < _TRACK_TOLERANCE
  return bool(straight and np.abs(slope).max() < _VELOCITY_TOLERANCE)


def _shape_is_right(seen: ObjectSight, expected: int) -> bool:
  peaks = seen.likeness[seen.clear]
  if not len(peaks):
    return False
  right = (peaks.argmax(axis=1) == expected) & (peaks[:, expected] > _MIN_CORRELATION)
  return bool(right.mean() >= _MOST_FRAMES)


def _is_permanent(clip: Sight, index: int) -> bool:
  """Whether the object is there in every frame, alone, as large as it must be, and hidden only where it must be."""
  seen = clip.objects[index]
  steady = np.where(
    seen.clear,
    _within_bounds(seen.area / seen.nominal),
    np.abs(seen.area - seen.visible_area) < _HIDDEN_TOLERANCE * seen.nominal,
  )
  alone = (seen.strays < _STRAY_SHARE * seen.nominal) & (clip.unexplained < _STRAY_SHARE * seen.nominal)
  in_front = (clip.overlap < _OVERLAP) | (clip.front_share > 0.5)
  there = seen.present | _may_be_hidden(seen)
  return bool(np.all(there & steady & alone & in_front))


def _may_be_hidden(seen: ObjectSight) -> np.ndarray:
  return seen.visible_area < _HIDDEN_TOLERANCE * seen.nominal


def _within_bounds(ratio: np.ndarray) -> np.ndarray:
  return (ratio > _AREA_BOUNDS[0]) & (ratio < _AREA_BOUNDS[1])
