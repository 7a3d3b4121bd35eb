"""Which device holds what: one table from the axes of arrays to the axes of the mesh.

The compiler (GSPMD) divides the programs. It follows the shardings of their arguments, and the few constraints that
`chunk_step` puts on what it computes. Attention alone is divided by hand: the compiler cannot look into its kernels.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

Layout = Sequence[tuple[str, tuple[str, ...]]]
"""Axes of the arrays of a tree: pairs of a pattern and names in `RULES`.

A pattern is a regular expression for the whole path of an array, its keys joined by "/". The first pattern that fits
counts. Every device holds all of an array that no pattern fits, and of the axes that are not named.
"""

_SHARDS = ("model", "seq")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  "prompt": "data",
  "beam": "beam",
  "candidate": "sibling",
  "patch": "seq",  # tokens of a latent frame in the backbone, outside self-attention
  "projected": "model",  # there: heads, the channels of all heads in a row, or inner feed-forward channels
  "head": _SHARDS,  # attention heads, or the channels of all heads in a row
  "hidden": _SHARDS,  # inner channels of a feed-forward layer
  "word": _SHARDS,  # rows of a token embedding
  "row": _SHARDS,  # rows of a latent frame, or of its pixels inside the video decoder
  "layer": None,
  "slot": None,
  "frame": None,
  "token": None,
  "column": None,
  "channel": None,
}
"""Axis of an array to axis or axes of the mesh, None for an axis that every device holds in full."""

BY_BEAM: Layout = ((".*", ("beam",)),)
"""Divided by beams alone."""
_PROJECTIONS = "blocks/(self|cross)_attention"
_MEMORY = (
  ("k|v", ("beam", "layer", "slot", "head", "token", "channel")),
  ("accumulator/(k|v)", ("beam", "layer", "head", "token", "channel")),
  (".*", ("beam",)),
)
LAYOUTS: Mapping[str, Layout] = {
  "backbone": (
    (f"{_PROJECTIONS}/(query|key|value)/kernel", ("layer", "channel", "projected")),
    (f"{_PROJECTIONS}/(query|key|value)/bias", ("layer", "projected")),
    (f"{_PROJECTIONS}/(query|key)_norm/scale", ("layer", "projected")),
    (f"{_PROJECTIONS}/out/kernel", ("layer", "projected", "channel")),
    ("blocks/ffn_in/kernel", ("layer", "channel", "projected")),
    ("blocks/ffn_in/bias", ("layer", "projected")),
    ("blocks/ffn_out/kernel", ("layer", "projected", "channel")),
  ),
  "codec": (),
  # A reward with weights that are worth dividing brings a layout of its own.
  "image_reward": (),
  "video_reward": (),
  "text": (("k|v", ("layer", "projected", "token", "channel")),),
  "condition": (("text/(k|v)", ("layer", "projected", "token", "channel")),),
  "memory": _MEMORY,
  "chunk_memory": (("k|v", ("beam", "layer", "head", "token", "channel")), (".*", ("beam",))),
  "per_beam": BY_BEAM,
  "shared": (),
  "state": (
    *((f"beams/memory/({pattern})", axes) for pattern, axes in _MEMORY),
    ("beams/codec/.*", ("beam", "frame", "row", "column", "channel")),
    ("(beams|policy)(/.*)?", ("beam",)),
  ),
}
"""The layouts of this package's own trees."""


def partition_spec(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
  """The table applied to one array; `axes` name its leading axes.

  An axis stays whole if its part of the mesh does not divide it, as the one candidate of a clean pass does. Where the
  table has several axes of the mesh, those that divide the array's axis count. Axes of size 1 are left out as long as
  another one remains.

  Raises:
    ValueError: two axes would lie on the same axis of the mesh.
    KeyError: an axis is not in the table.
  """
  placed = [_as_tuple(RULES[axis]) for axis in axes]
  used = [axis for several in placed for axis in several]
  if len(used) != len(set(used)):
    raise ValueError(f"axes {tuple(axes)} use an axis of the mesh twice: {tuple(placed)}")

  def entry(several: tuple[str, ...], size: int) -> str | tuple[str, ...] | None:
    dividing = ()
    for axis in several:
      if mesh.shape[axis] > 1 and size % math.prod(mesh.shape[one] for one in (*dividing, axis)) == 0:
        dividing = (*dividing, axis)
    if len(dividing) > 1:
      return dividing
    return next((axis for axis in dividing or several if size % mesh.shape[axis] == 0), None)

  return PartitionSpec(*map(entry, placed, shape))


def _as_tuple(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (rule,) if isinstance(rule, str) else rule or ()


def sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
  """`partition_spec` on its mesh."""
  return NamedSharding(mesh, partition_spec(mesh, axes, shape))


def tree_shardings(mesh: Mesh, layout: str | Layout, tree: Any, *, leading: tuple[str, ...] = ()) -> Any:
  """The sharding of every array of a tree.

  Args:
    mesh: the mesh.
    layout: the axes of its arrays, or their name in `LAYOUTS`.
    tree: arrays, or anything with shapes.
    leading: axes that all its arrays have in front of the described ones.
  """

  def of_leaf(path, leaf):
    axes = axes_of(layout, jax.tree_util.keystr(path, simple=True, separator="/"))
    return sharding(mesh, (*leading, *axes)[: len(leaf.shape)], leaf.shape)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def axes_of(layout: str | Layout, path: str) -> tuple[str, ...]:
  """Axes of the array at `path`, its keys joined by "/"."""
  patterns = LAYOUTS[layout] if isinstance(layout, str) else layout
  return next((axes for pattern, axes in patterns if re.fullmatch(pattern, path)), ())


def placed(mesh: Mesh | None, layout: str | Layout, tree: Any, *, leading: tuple[str, ...] = ()) -> Any:
  """The shapes of a tree with the shardings of `tree_shardings`, to load arrays into or to compile for."""
  shardings = tree_shardings(mesh, layout, tree, leading=leading) if mesh else jax.tree.map(lambda x: None, tree)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, tree, shardings)


def with_shardings(mesh: Mesh | None, layout: str | Layout, tree: T, *, leading: tuple[str, ...] = ()) -> T:
  """A traced tree, constrained to `tree_shardings`; as it is without a mesh."""
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, layout, tree, leading=leading))


def constrain(mesh: Mesh | None, tree: T, *axes: str) -> T:
  """A traced tree whose arrays all begin with `axes`, constrained to the table; as it is without a mesh."""
  if mesh is None:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape)), tree)


def by_shards(
  f: Callable, mesh: Mesh | None, inputs: Sequence[str | Layout], outputs: Sequence[str | Layout]
) -> Callable:
  """`f` as every device runs it on its own shards. No device may need what another one holds.

  Args:
    f: takes trees, and returns a tuple of trees.
    mesh: the mesh; without one the result is `f`.
    inputs: layouts of the trees that `f` takes, or their names in `LAYOUTS`.
    outputs: the same of the trees that it returns.
  """
  if mesh is None:
    return f
  specs = lambda layouts, trees: tuple(
    jax.tree.map(lambda x: x.spec, tree_shardings(mesh, layout, tree))
    for layout, tree in zip(layouts, trees, strict=True)
  )

  def run(*trees: Any) -> Any:
    out = specs(outputs, jax.eval_shape(f, *trees))
    return jax.shard_map(f, mesh=mesh, in_specs=specs(inputs, trees), out_specs=out, check_vma=False)(*trees)

  return run
