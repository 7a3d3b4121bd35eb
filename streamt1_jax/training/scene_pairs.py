"""Which captions of the shapes world make pairs: those that differ in one thing, of one object or two.

caption ── change: an attribute, hues, what two objects exchange, one more or less, what was before ── other caption
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import Description, Thing

# The same two hues on object and background: the pair of attributes that the generator confuses most.
_HUES = {("green", "dark blue"): ("blue", "dark green"), ("blue", "dark green"): ("green", "dark blue")}

Change = Callable[[Description], Iterator[Description]]
"""Every description that differs from one in a certain way."""


def _in_field(field: str) -> Change:
  values = range(len(shapes.attribute_names()[field]))

  def change(description: Description) -> Iterator[Description]:
    for index, thing in enumerate(description.things):
      for value in values:
        if value != getattr(thing, field):
          yield _with(description, index, thing._replace(**{field: value}))

  return change


def _in_background(description: Description) -> Iterator[Description]:
  for value in range(len(shapes.BACKGROUNDS)):
    if value != description.background:
      yield description._replace(background=value)


def _in_binding(description: Description) -> Iterator[Description]:
  names = shapes.attribute_names()
  for index, thing in enumerate(description.things):
    hues = _HUES.get((names["color"][thing.color], names["background"][description.background]))
    if hues is not None:
      other = _with(description, index, thing._replace(color=names["color"].index(hues[0])))
      yield other._replace(background=names["background"].index(hues[1]))


def _swapped(description: Description) -> Iterator[Description]:
  """Two objects exchange an attribute."""
  if len(description.things) == world.MOST_OBJECTS:
    first, second = description.things
    for field in Thing._fields:
      ours, theirs = getattr(first, field), getattr(second, field)
      if ours != theirs:
        things = first._replace(**{field: theirs}), second._replace(**{field: ours})
        yield description._replace(things=things)


def _swapped_looks(description: Description) -> Iterator[Description]:
  """What `_swapped` does, where a single frame shows it."""
  moving = lambda thing: (thing.speed, thing.direction)
  for other in _swapped(description):
    if all(moving(a) == moving(b) for a, b in zip(description.things, other.things, strict=True)):
      yield other


def _fewer(description: Description) -> Iterator[Description]:
  if len(description.things) == world.MOST_OBJECTS:
    yield from (description._replace(things=(thing,)) for thing in description.things)


def _more(description: Description) -> Iterator[Description]:
  if len(description.things) < world.MOST_OBJECTS:
    yield from (new for new in world.neighbours(description) if len(new.things) > len(description.things))


def _before(description: Description) -> Iterator[Description]:
  yield from world.neighbours(description)


CHANGES: Mapping[str, Change] = {
  **{field: _in_field(field) for field in Thing._fields},
  "background": _in_background,
  "binding": _in_binding,
  "swapped": _swapped,
  "swapped_looks": _swapped_looks,
  "missing": _fewer,
  "extra": _more,
  "stale": _before,
}
"""How the other caption of a pair may differ. What was before may differ in anything that happens in the world."""


def _with(description: Description, index: int, thing: Thing) -> Description:
  things = (*description.things[:index], thing, *description.things[index + 1 :])
  return description._replace(things=things)


def draw(
  rng: np.random.Generator, split: str, other_splits: tuple[str, ...], change: str, two_objects: float
) -> tuple[Description, Description]:
  """A complete description of a split, and one of another split, or the same, that differs as `change` says.

  Args:
    rng: draws.
    split: of the first.
    other_splits: of the second; what belongs to no split counts as "train" only where all splits are allowed.
    change: key of `CHANGES`.
    two_objects: how often there are two objects, where the change leaves that open.
  """
  anything = set(other_splits) == set(shapes.SPLITS)
  while True:
    description = world.draw_description(rng, split, 1 + int(rng.random() < two_objects))
    others = [other for other in CHANGES[change](description) if _valid(other)]
    for index in rng.permutation(len(others))[:8]:
      if anything or world.split_of(others[index]) in other_splits:
        return description, others[index]


def _valid(description: Description) -> bool:
  """Whether all objects have different colours, as in every caption."""
  return len({thing.color for thing in description.things}) == len(description.things)
