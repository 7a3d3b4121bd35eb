"""Which scenes of the shapes world make pairs: those that differ in one attribute."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from streamt1_jax.data import shapes
from streamt1_jax.training.corruptions import FIELDS

# The same two hues on object and background: the pair of attributes that the generator confuses most.
_HUES = {("green", "dark blue"): ("blue", "dark green"), ("blue", "dark green"): ("green", "dark blue")}


class Neighbours(NamedTuple):
  """Which scenes make pairs; a scene is its row in `shapes.all_scenes()`.

  Attributes:
    rows: scenes that have a neighbour, by what the neighbour differs in; padded.
    num_rows: how many there are, padding aside.
    others: neighbours of every scene; padded.
    num_others: how many there are, padding aside.
  """

  rows: Int32[Array, "fields N"]
  num_rows: Int32[Array, " fields"]
  others: Int32[Array, "1152 fields K"]
  num_others: Int32[Array, "1152 fields"]


def neighbours(split: str, other_splits: tuple[str, ...]) -> Neighbours:
  """Pairs of scenes that differ in one field, the first of `split`, the second of one of `other_splits`."""
  scenes = shapes.all_scenes()
  row = {scene: index for index, scene in enumerate(scenes)}
  splits = {scene: shapes.split_of(scene) for scene in scenes}
  captioned = [index for index, scene in enumerate(scenes) if splits[scene] == split]
  found = [
    [[row[s] for s in _that_differ(scene, field) if splits[s] in other_splits] for field in FIELDS] for scene in scenes
  ]
  rows = [[index for index in captioned if found[index][field]] for field in range(len(FIELDS))]
  count = lambda lists: np.array([len(entry) for entry in lists], np.int32)
  most = max(len(entry) for lists in found for entry in lists)
  return Neighbours(
    rows=jnp.asarray(_padded(rows, max(map(len, rows)))),
    num_rows=jnp.asarray(count(rows)),
    others=jnp.asarray(np.stack([_padded(lists, most) for lists in found])),
    num_others=jnp.asarray(np.stack([count(lists) for lists in found])),
  )


def _that_differ(scene: shapes.Attributes, field: str) -> list[shapes.Attributes]:
  names = shapes.attribute_names()
  if field != "binding":
    values = range(len(names[field]))
    return [scene._replace(**{field: value}) for value in values if value != getattr(scene, field)]
  hues = _HUES.get((names["color"][scene.color], names["background"][scene.background]))
  if hues is None:
    return []
  return [scene._replace(color=names["color"].index(hues[0]), background=names["background"].index(hues[1]))]


def _padded(lists: list[list[int]], length: int) -> np.ndarray:
  return np.array([entry + [0] * (length - len(entry)) for entry in lists], np.int32)
