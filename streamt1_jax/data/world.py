"""One or two objects of the shapes world, and what happens to them: captions, splits, timelines, frames.

  caption ── parse ──► Description ── draw_timeline ──► Descriptions, one after the other
                           │                                   │ when each begins, where objects start
                           └──── caption                     play ──► FrameStates ── draw ──► frames [T, 64, 64, 3]

A second object is described behind "and": "a small red circle moves quickly left and a large blue square moves slowly
up over a gray background". It has another colour, and where the two cross the first one is in front. It begins half a
world away from the first one in both directions, at the start of a video or when it appears.

What a caption says may change while a video goes on: an attribute of an object, the background, a second object appears
or one of two leaves. Objects keep their places.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.data.shapes import FRAME_SIZE
from streamt1_jax.typing import HostArray

MOST_OBJECTS = 2
APART = FRAME_SIZE // 2
"""Pixels from the first object to a second one that appears, in both directions."""
_BUCKETS = 20  # of pairs, one each for "tune" and "test"


class Thing(NamedTuple):
  """What a caption says of one object. Indices into the tables of `shapes`; `None` where it is silent."""

  size: int | None
  color: int
  shape: int
  speed: int | None
  direction: int


class Description(NamedTuple):
  """What a caption says: one object or two of different colours, the one in front first, and the background."""

  things: tuple[Thing, ...]
  background: int


class FrameStates(NamedTuple):
  """What every one of T frames shows. The first of two objects is in front; the second may be absent.

  Attributes:
    center: (x, y) in pixels, any integer: the world is a torus.
    size: index into `shapes.SIZES`.
    color: index into `shapes.COLORS`.
    shape: index into `shapes.SHAPES`.
    present: whether the object is there.
    background: index into `shapes.BACKGROUNDS`.
  """

  center: Int[HostArray, "T 2 2"]
  size: Int[HostArray, "T 2"]
  color: Int[HostArray, "T 2"]
  shape: Int[HostArray, "T 2"]
  present: Bool[HostArray, "T 2"]
  background: Int[HostArray, " T"]


def of_attributes(attributes: shapes.Attributes) -> Description:
  """The description of a caption of one object."""
  return Description((Thing(*attributes[:-1]),), attributes.background)


def attributes_of(description: Description, index: int = 0) -> shapes.Attributes:
  """One object of a description, and the background."""
  return shapes.Attributes(*description.things[index], background=description.background)


def caption(description: Description) -> str:
  """The caption of a description."""
  words = [shapes.caption(*thing, description.background).partition(" over a ")[0] for thing in description.things]
  return f"{' and '.join(words)} over a {list(shapes.BACKGROUNDS)[description.background]} background"


def parse(text: str) -> Description:
  """Inverse of `caption`. Raises ConfigError for any other text, and for two objects of one colour."""
  things, separator, background = text.strip().rpartition(" over a ")
  try:
    found = [shapes.parse_caption(f"{thing}{separator}{background}") for thing in things.split(" and ")]
  except ConfigError:
    found = []
  if not 1 <= len(found) <= MOST_OBJECTS or len({attributes.color for attributes in found}) < len(found):
    example = "a small red circle moves left and a blue square moves slowly up over a gray background"
    raise ConfigError(
      f"not a caption of the shapes world: {text!r}; expected one object, or two of different colours, for example "
      f"{example!r}"
    )
  return Description(tuple(Thing(*attributes[:-1]) for attributes in found), found[0].background)


def without(description: Description, omit: Sequence[tuple[bool, bool]]) -> Description:
  """The description without size or speed of its objects; `omit` says (size, speed) of each."""
  silent = lambda thing, size, speed: thing._replace(
    size=None if size else thing.size, speed=None if speed else thing.speed
  )
  return description._replace(things=tuple(silent(thing, *o) for thing, o in zip(description.things, omit)))


@functools.cache
def split_of(description: Description) -> str | None:
  """The split of a complete description, or None where it belongs to none.

  One object with its background is divided by `shapes.split_of`. Two are divided by a hash of both, whichever is in
  front, and only where no object alone belongs elsewhere: those of "train" have no object that is held out, and those
  of "test" none of "tune".
  """
  parts = [shapes.split_of(attributes_of(description, index)) for index in range(len(description.things))]
  if len(parts) == 1:
    return parts[0]
  words = sorted(shapes.caption(*attributes_of(description, index)) for index in range(len(parts)))
  bucket = int.from_bytes(hashlib.sha256(" and ".join(words).encode()).digest()[:8], "big") % _BUCKETS
  split = {0: "tune", 1: "test"}.get(bucket, "train")
  return split if set(parts) <= {"train", split} else None


def draw_description(rng: np.random.Generator, split: str, num_objects: int) -> Description:
  """A complete description of a split."""
  scenes = shapes.scenes_in(split)
  if num_objects == 1:
    return of_attributes(scenes[rng.integers(len(scenes))])
  everything = shapes.all_scenes()
  while True:
    first, second = (everything[index] for index in rng.integers(len(everything), size=2))
    drawn = Description((Thing(*first[:-1]), Thing(*second[:-1])), first.background)
    if first.color != second.color and split_of(drawn) == split:
      return drawn


def held_out_captions(split: str, n: int, seed: int, num_objects: int = MOST_OBJECTS) -> list[str]:
  """`n` complete captions of a split, in random order; those of one object come again only after all others."""
  if num_objects == 1:
    return shapes.held_out_captions(split, n, seed)
  rng, found = np.random.default_rng(seed), {}
  while len(found) < n:
    found[caption(draw_description(rng, split, num_objects))] = None
  return list(found)


def neighbours(description: Description) -> list[Description]:
  """Every description that is one event away."""
  tables = shapes.attribute_names()
  other = lambda thing, field: (
    thing._replace(**{field: value}) for value in range(len(tables[field])) if value != getattr(thing, field)
  )
  changed = []
  for index, thing in enumerate(description.things):
    kept = description.things[:index], description.things[index + 1 :]
    colors = {t.color for things in kept for t in things}
    for field in Thing._fields:
      changed += [(*kept[0], new, *kept[1]) for new in other(thing, field) if new.color not in colors]
  if len(description.things) == MOST_OBJECTS:
    changed += [(thing,) for thing in description.things]
  else:
    (thing,) = description.things
    every = itertools.product(*(range(len(tables[field])) for field in Thing._fields))
    changed += [(thing, new) for new in map(Thing._make, every) if new.color != thing.color]
  backgrounds = (value for value in range(len(shapes.BACKGROUNDS)) if value != description.background)
  return [description._replace(things=things) for things in changed] + [
    description._replace(background=value) for value in backgrounds
  ]


def draw_event(rng: np.random.Generator, description: Description, split: str) -> Description:
  """A description of the split that is one event away or, where the split has none, two.

  A kind of event is drawn first, an attribute or an object or the background, since there are far more objects that may
  appear than anything else.
  """
  once = neighbours(description)
  found = [new for new in once if split_of(new) == split]
  if not found:
    middle = [once[index] for index in rng.permutation(len(once))]
    twice = (new for between in middle for new in neighbours(between))
    found = [next(new for new in twice if new != description and split_of(new) == split)]
  kinds = [kind_of_event(description, new) for new in found]
  kind = sorted(set(kinds))[rng.integers(len(set(kinds)))]
  matching = [new for new, other in zip(found, kinds, strict=True) if other == kind]
  return matching[rng.integers(len(matching))]


def kind_of_event(before: Description, after: Description) -> str:
  """What happens: "background", "appears", "leaves" or the name of the first attribute that changes."""
  if before.background != after.background:
    return "background"
  if len(before.things) != len(after.things):
    return "appears" if len(before.things) < len(after.things) else "leaves"
  pairs = zip(before.things, after.things, strict=True)
  changes = (field for old, new in pairs for field in Thing._fields if getattr(old, field) != getattr(new, field))
  return next(changes, "nothing")


def draw_timeline(rng: np.random.Generator, split: str, segments: int) -> list[Description]:
  """Descriptions one after the other, each of the split and one event away from the one before, none twice in a row.

  The first has one object or two.
  """
  timeline = [draw_description(rng, split, int(rng.integers(1, 1 + MOST_OBJECTS)))]
  while len(timeline) < segments:
    timeline.append(draw_event(rng, timeline[-1], split))
  return timeline


def starts_of(start: Int[HostArray, 2]) -> Int32[np.ndarray, "2 2"]:
  """Where both objects of a video start, of the start of the first one."""
  return np.stack([np.asarray(start), np.asarray(start) + APART]).astype(np.int32)


def followed(before: Description, after: Description) -> list[int]:
  """Which object of `before` every object of `after` is; -1 for a new one."""
  if len(before.things) <= len(after.things):
    return [*range(len(before.things)), *[-1] * (len(after.things) - len(before.things))]
  (remaining,) = after.things
  likeness = [sum(a == b for a, b in zip(thing, remaining, strict=True)) for thing in before.things]
  return [int(np.argmax(likeness))]


def play(
  descriptions: Sequence[Description], begins: Sequence[int], starts: Int[HostArray, "2 2"], times: Int[HostArray, " T"]
) -> FrameStates:
  """The frames of a timeline.

  Args:
    descriptions: complete ones.
    begins: the frame with which each begins; the first is 0, and they increase.
    starts: (x, y) of the objects in frame 0; the second is not used for one object.
    times: int32 [T], frames in any order, at least 0.
  """
  size, color, shape = (np.zeros((len(times), 2), np.int32) for _ in range(3))
  center, present = np.zeros((len(times), 2, 2), np.int64), np.zeros((len(times), 2), bool)
  background, times = np.zeros(len(times), np.int32), np.asarray(times)
  places, last = np.asarray(starts, np.int64), 0
  for number, (description, begin) in enumerate(zip(descriptions, begins, strict=True)):
    if number:
      # Where objects are in the last frame of what was before.
      places = _moved(descriptions[number - 1], places, begin - 1 - last)
      places = _placed(followed(descriptions[number - 1], description), places)
      last = begin - 1
    shown = times >= begin
    background[shown] = description.background
    present[shown] = False
    center[shown] = _moved(description, places, times[shown] - last)
    for index, thing in enumerate(description.things):
      present[shown, index] = True
      size[shown, index], color[shown, index] = _given(thing.size), thing.color
      shape[shown, index] = thing.shape
  return FrameStates((center % FRAME_SIZE).astype(np.int32), size, color, shape, present, background)


def _moved(description: Description, places: np.ndarray, elapsed: int | np.ndarray) -> np.ndarray:
  """Places [..., 2, 2] after `elapsed` frames [...]."""
  velocity = np.zeros((2, 2), np.int64)
  for index, thing in enumerate(description.things):
    speed = list(shapes.SPEEDS.values())[_given(thing.speed)]
    velocity[index] = np.array(list(shapes.DIRECTIONS.values())[thing.direction]) * speed
  return places + velocity * np.asarray(elapsed)[..., None, None]


def _given(index: int | None) -> int:
  """An index of a complete description."""
  if index is None:
    raise ConfigError("a video is of complete captions: size and speed must be given")
  return index


def _placed(which: list[int], places: np.ndarray) -> np.ndarray:
  placed = places.copy()
  for index, old in enumerate(which):
    placed[index] = places[old] if old >= 0 else placed[0] + APART
  return placed


def draw(states: FrameStates) -> Float32[Array, "T 64 64 3"]:
  """Draws frames: float32 RGB in [0, 1]. Can be jitted; frames of many clips may be drawn at once."""
  color = shapes.palette(shapes.COLORS)[states.color]
  frames = shapes.palette(shapes.BACKGROUNDS)[states.background][:, None, None]
  radius = jnp.asarray(list(shapes.SIZES.values()), jnp.float32)[states.size]
  for index in reversed(range(MOST_OBJECTS)):
    offsets = shapes.torus_offsets(jnp.asarray(states.center)[:, index])
    of_object = jnp.asarray(states.shape), radius, jnp.asarray(states.present)
    shape, size, present = (values[:, index, None, None] for values in of_object)
    distance = shapes.signed_distance(shape, size, offsets[:, None, :, 0], offsets[:, :, None, 1])
    coverage = jnp.where(present, jnp.clip(0.5 - distance, 0.0, 1.0), 0.0)[..., None]
    frames = frames + coverage * (color[:, index, None, None] - frames)
  return frames
