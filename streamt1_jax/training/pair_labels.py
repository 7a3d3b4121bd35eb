"""What is known of pairs of clips because they were drawn: which words are true, what is shown instead, what is where.

  captions, descriptions ── objects of both put side by side ── per attribute: is it true, what is shown

The labels come from the descriptions that the clips were drawn from, and from nothing that looks at frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import MOST_OBJECTS, Description, Thing
from streamt1_jax.training.corruptions import CORRUPTIONS, NAMES
from streamt1_jax.training.preferences import Pair
from streamt1_jax.typing import HostArray

FIELDS = (*Thing._fields, "background")
"""Columns of the labels."""
MOTION_FIELDS = ("speed", "direction")
"""What no single frame shows."""
ROWS = MOST_OBJECTS + 1
"""The first object, the second one, the background."""
UNKNOWN = -1


class Labels(NamedTuple):
  """What is known of B pairs. `UNKNOWN` where nothing is known, or nothing was said.

  Attributes:
    kind: index into `NAMES`.
    is_text: whether the worse clips are of another caption, at least in the end.
    late: whether only the newest chunk is worse.
    shows_other: whether the worse clips show what the other caption says, and not only in their last chunk.
    is_true: whether what a caption says is so in a clip, by captions (right, other) and clips (better, worse).
    shown: what is so in the clip: index into the field's table.
    there: whether an object of every colour is in the better clip.
    named: attributes of the object of every colour in it, columns as `FIELDS`.
    background: of it.
  """

  kind: Int32[HostArray, " B"]
  is_text: Bool[HostArray, " B"]
  late: Bool[HostArray, " B"]
  shows_other: Bool[HostArray, " B"]
  is_true: Int32[HostArray, "2 2 B 3 6"]
  shown: Int32[HostArray, "2 2 B 3 6"]
  there: Int32[HostArray, "B colors"]
  named: Int32[HostArray, "B colors 6"]
  background: Int32[HostArray, " B"]


def labels(pairs: Sequence[Pair]) -> Labels:
  """The labels of pairs."""
  count, colors = len(pairs), len(shapes.COLORS)
  is_true, shown = (np.full((2, 2, count, ROWS, len(FIELDS)), UNKNOWN, np.int32) for _ in range(2))
  there = np.full((count, colors), UNKNOWN, np.int32)
  named = np.full((count, colors, len(FIELDS)), UNKNOWN, np.int32)
  background = np.full(count, UNKNOWN, np.int32)
  for index, pair in enumerate(pairs):
    in_clips = (pair.caption, pair.other if pair.shows_other else None)
    for row, text in enumerate(pair.texts):
      for column, description in enumerate(in_clips):
        if description is not None:
          is_true[row, column, index], shown[row, column, index] = compared(text, description)
    if pair.steady:
      there[index], background[index] = 0, pair.caption.background
      for thing in pair.caption.things:
        there[index, thing.color] = 1
        named[index, thing.color, :-1] = np.array(thing)
  kinds = [CORRUPTIONS[NAMES[pair.kind]] for pair in pairs]
  return Labels(
    kind=np.array([pair.kind for pair in pairs], np.int32),
    is_text=np.array([kind.family == "text" for kind in kinds]),
    late=np.array([pair.late for pair in pairs]),
    shows_other=np.array([pair.shows_other for pair in pairs]),
    is_true=is_true,
    shown=shown,
    there=there,
    named=named,
    background=background,
  )


def compared(text: Description, shown: Description) -> tuple[Int32[np.ndarray, "3 6"], Int32[np.ndarray, "3 6"]]:
  """What a caption says against what is shown, a complete description: whether it is true, and what is so instead."""
  is_true, values = (np.full((ROWS, len(FIELDS)), UNKNOWN, np.int32) for _ in range(2))
  for row, (thing, seen) in enumerate(zip(text.things, _seen(text, shown), strict=True)):
    if seen is None:
      # If an object is not there, only this is false: that something has its colour.
      is_true[row, FIELDS.index("color")] = 0
      continue
    said = np.array([value is not None for value in thing])
    values[row, :-1] = np.where(said, np.array(seen), UNKNOWN)
    is_true[row, :-1] = np.where(said, np.array([a == b for a, b in zip(thing, seen, strict=True)]), UNKNOWN)
  values[-1, -1], is_true[-1, -1] = shown.background, text.background == shown.background
  return is_true, values


def _seen(text: Description, shown: Description) -> list[Thing | None]:
  """What is shown of every object of a caption; None of one that is not there."""
  if len(text.things) > len(shown.things):
    (kept,) = world.followed(text, shown)
    return [shown.things[0] if row == kept else None for row in range(len(text.things))]
  if len(text.things) < len(shown.things):
    return [shown.things[index] for index in world.followed(shown, text)]
  return list(shown.things)
