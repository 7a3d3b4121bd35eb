"""Which device holds what: one table from the axes of arrays to the axes of the mesh.

The compiler (GSPMD) divides the programs: from the shardings of their arguments and from the few constraints that
`chunk_step` puts on what it computes. Only attention is divided by hand, since its kernels are closed to the compiler.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

_SHARDS = ("model", "seq")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  "prompt": "data",
  "beam": "beam",
  "candidate": "sibling",
  "patch": "seq",  # tokens of a latent frame in the backbone, outside self-attention
  "projected": "model",  # there: heads, the channels of all heads one after the other, or inner feed-forward channels
  "head": _SHARDS,  # attention heads, or the channels of all heads one after the other
  "hidden": _SHARDS,  # inner channels of a feed-forward layer
  "word": _SHARDS,  # rows of a token embedding
  "row": _SHARDS,  # of a latent frame or its pixels inside the video decoder
  "layer": None,
  "slot": None,
  "frame": None,
  "token": None,
  "column": None,
  "channel": None,
}
"""Axis of an array to axis or axes of the mesh, None for an axis that every device holds in full."""

_PROJECTIONS = "blocks/(self|cross)_attention"
# A tree may hold several reward models, each under its name.
_MODEL = r"(\w+/)?"
_QWEN2_VL_KERNELS = (
  (rf"{_MODEL}backbone/vision/blocks/qkv/kernel", ("layer", "channel", "head")),
  (rf"{_MODEL}backbone/vision/blocks/out/kernel", ("layer", "head", "channel")),
  (rf"{_MODEL}backbone/vision/blocks/ffn_in/kernel", ("layer", "channel", "hidden")),
  (rf"{_MODEL}backbone/vision/blocks/ffn_out/kernel", ("layer", "hidden", "channel")),
  (rf"{_MODEL}backbone/vision/merger/hidden/kernel", ("channel", "hidden")),
  (rf"{_MODEL}backbone/vision/merger/out/kernel", ("hidden", "channel")),
  # Keys and values have few heads: they are small, and no mesh divides them all.
  (rf"{_MODEL}backbone/decoder/blocks/query/kernel", ("layer", "channel", "head")),
  (rf"{_MODEL}backbone/decoder/blocks/out/kernel", ("layer", "head", "channel")),
  (rf"{_MODEL}backbone/decoder/blocks/(gate|up)/kernel", ("layer", "channel", "hidden")),
  (rf"{_MODEL}backbone/decoder/blocks/down/kernel", ("layer", "hidden", "channel")),
)
_QWEN2_VL = (
  *_QWEN2_VL_KERNELS,
  # Of kernels in int8: the scale belongs to the output channels.
  *((f"{kernel}/values", axes) for kernel, axes in _QWEN2_VL_KERNELS),
  *((f"{kernel}/scale", (*axes[:-2], axes[-1])) for kernel, axes in _QWEN2_VL_KERNELS),
  (rf"{_MODEL}backbone/vision/blocks/qkv/bias", ("layer", "head")),
  (rf"{_MODEL}backbone/vision/blocks/ffn_in/bias", ("layer", "hidden")),
  (rf"{_MODEL}backbone/vision/merger/hidden/bias", ("hidden",)),
  (rf"{_MODEL}backbone/decoder/token_embedding", ("word", "channel")),
  (rf"{_MODEL}backbone/decoder/blocks/query/bias", ("layer", "head")),
)
_MEMORY = (
  ("k|v", ("beam", "layer", "slot", "head", "token", "channel")),
  ("accumulator/(k|v)", ("beam", "layer", "head", "token", "channel")),
  (".*", ("beam",)),
)
ARRAYS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
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
  "reward": _QWEN2_VL,
  "image_reward": _QWEN2_VL,
  "video_reward": _QWEN2_VL,
  "text": (("k|v", ("layer", "projected", "token", "channel")),),
  "condition": (("text/(k|v)", ("layer", "projected", "token", "channel")),),
  "memory": _MEMORY,
  "chunk_memory": (("k|v", ("beam", "layer", "head", "token", "channel")), (".*", ("beam",))),
  "per_beam": ((".*", ("beam",)),),
  "shared": (),
  "state": (
    *((f"beams/memory/({pattern})", axes) for pattern, axes in _MEMORY),
    ("beams/codec/.*", ("beam", "frame", "row", "column", "channel")),
    ("(beams|policy)(/.*)?", ("beam",)),
  ),
}
"""Per tree, the axes of its arrays by path; the first pattern that fits counts, and what none fits is replicated."""


def partition_spec(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
  """The table applied to one array; `axes` name its leading axes.

  An axis that its part of the mesh does not divide stays whole: the one candidate of a clean pass, say. Of several axes
  of the mesh those count that divide it, and those of size 1 are left out as long as one remains.

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


def tree_shardings(mesh: Mesh, name: str, tree: Any, *, leading: tuple[str, ...] = ()) -> Any:
  """The sharding of every array of a tree that `ARRAYS` describes.

  Args:
    mesh: the mesh.
    name: the tree's name in `ARRAYS`.
    tree: arrays, or anything with shapes.
    leading: axes that all its arrays have in front of the described ones.
  """

  def of_leaf(path, leaf):
    axes = axes_of(name, jax.tree_util.keystr(path, simple=True, separator="/"))
    return sharding(mesh, (*leading, *axes)[: len(leaf.shape)], leaf.shape)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def axes_of(name: str, path: str) -> tuple[str, ...]:
  """Axes of the array at `path`, keys joined by "/", of the tree called `name`; those that are not named are whole."""
  return next((axes for pattern, axes in ARRAYS[name] if re.fullmatch(pattern, path)), ())


def placed(mesh: Mesh | None, name: str, tree: Any, *, leading: tuple[str, ...] = ()) -> Any:
  """The shapes of a tree with the shardings of `tree_shardings`: arguments for `load_params` or to compile for."""
  shardings = tree_shardings(mesh, name, tree, leading=leading) if mesh else jax.tree.map(lambda x: None, tree)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, tree, shardings)


def with_shardings(mesh: Mesh | None, name: str, tree: T, *, leading: tuple[str, ...] = ()) -> T:
  """A traced tree, constrained to `tree_shardings`; as it is without a mesh."""
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, name, tree, leading=leading))


def constrain(mesh: Mesh | None, tree: T, *axes: str) -> T:
  """A traced tree whose arrays all begin with `axes`, constrained to the table; as it is without a mesh."""
  if mesh is None:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape)), tree)


def by_shards(f: Callable, mesh: Mesh | None, inputs: Sequence[str], outputs: Sequence[str]) -> Callable:
  """`f` as every device runs it on its own shards; only where none needs what another one holds.

  Args:
    f: takes trees, and returns a tuple of trees.
    mesh: the mesh; without one the result is `f`.
    inputs: names in `ARRAYS` of the trees it takes.
    outputs: of those it returns.
  """
  if mesh is None:
    return f
  specs = lambda names, trees: tuple(
    jax.tree.map(lambda x: x.spec, tree_shardings(mesh, name, tree)) for name, tree in zip(names, trees, strict=True)
  )

  def run(*trees: Any) -> Any:
    out = specs(outputs, jax.eval_shape(f, *trees))
    return jax.shard_map(f, mesh=mesh, in_specs=specs(inputs, trees), out_specs=out, check_vma=False)(*trees)

  return run
