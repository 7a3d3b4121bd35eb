"""How a chunk step runs: on which devices, with which attention, and how much memory it spends on decoding."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from streamt1_jax.backbone.attention import Implementation
from streamt1_jax.backbone.dit import ANYWHERE, Placement
from streamt1_jax.parallel.sharding import RULES, constrain

Decoding = Literal["together", "in_turn", "twice"]


@dataclasses.dataclass(frozen=True)
class Execution:
  """Changes no result beyond rounding.

  Attributes:
    mesh: devices; None for one.
    attention: implementation of attention; None chooses by platform.
    decoding: "together" decodes and scores all candidates at once. "in_turn" takes one candidate of a device after the
      other, with the activations of one. "twice" does so too and forgets their decoder states, so that no candidate
      holds one; winners are decoded again.
  """

  mesh: Mesh | None = None
  attention: Implementation | None = None
  decoding: Decoding = "together"

  @property
  def placement(self) -> Placement:
    """Of the backbone's tokens: divided on the axis `seq`, without it as the compiler likes."""
    if self.mesh is None or self.mesh.shape[RULES["patch"]] == 1:
      return ANYWHERE
    to = lambda *axes: lambda x: constrain(self.mesh, x, *axes)
    to_tokens, to_heads = to("frame", "patch", "projected"), to("frame", "token", "head")
    # Both, or the compiler might gather what the queries, keys and values are computed from.
    return Placement(tokens=to("frame", "patch"), to_heads=lambda x: to_heads(to_tokens(x)), to_tokens=to_tokens)

  def map_candidates(self, f: Callable) -> Callable:
    """`f(candidate, beam)` as a function of trees that lead with [K, B] and [K]; its results lead with [K, B]."""
    if self.decoding == "together":
      return jax.vmap(jax.vmap(f, in_axes=(0, None)))
    at_once = jax.vmap(jax.vmap(f, in_axes=(0, None)))
    shards = self._shards("beam", "candidate")

    def one_beam(inputs):
      candidates, beam = inputs
      return jax.lax.map(lambda candidate: at_once(candidate, beam), candidates)

    def run(candidates: Any, beams: Any) -> Any:
      turns = _turns_first(candidates, shards), _turns_first(beams, shards[:1])
      return _turns_back(jax.lax.map(one_beam, turns), shards)

    return run

  def map_beams(self, f: Callable) -> Callable:
    """`f(*beam)` as a function of trees that lead with [K]."""
    if self.decoding == "together":
      return jax.vmap(f)
    shards = self._shards("beam")
    one_turn = lambda inputs: jax.vmap(f)(*inputs)
    return lambda *beams: _turns_back(jax.lax.map(one_turn, _turns_first(beams, shards)), shards)

  def _shards(self, *axes: str) -> tuple[int, ...]:
    return tuple(1 if self.mesh is None else self.mesh.shape[RULES[axis]] for axis in axes)


def _turns_first(tree: Any, shards: tuple[int, ...]) -> Any:
  """Each leading axis as turns by shards, all turns first: [K, B, ...] to [K / k, B / b, k, b, ...]."""
  count = len(shards)

  def split(x: jax.Array) -> jax.Array:
    sizes = [part for size, shard in zip(x.shape, shards) for part in (shard, size // shard)]
    order = [*range(1, 2 * count, 2), *range(0, 2 * count, 2)]
    x = x.reshape(*sizes, *x.shape[count:])
    return x.transpose(*order, *range(2 * count, x.ndim))

  return jax.tree.map(split, tree)


def _turns_back(tree: Any, shards: tuple[int, ...]) -> Any:
  """The inverse of `_turns_first`."""
  count = len(shards)

  def join(x: jax.Array) -> jax.Array:
    order = [axis for pair in zip(range(count, 2 * count), range(count)) for axis in pair]
    sizes = [x.shape[axis] * x.shape[axis + count] for axis in range(count)]
    return x.transpose(*order, *range(2 * count, x.ndim)).reshape(*sizes, *x.shape[2 * count :])

  return jax.tree.map(join, tree)
