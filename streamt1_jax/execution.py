"""How a search runs: on which devices, with which attention, and how much memory it spends on decoding.

Nothing here changes a result by more than rounding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from streamt1_jax.parallel.sharding import RULES, constrain, partition_spec
from streamt1_jax.typing import Implementation

Decoding = Literal["together", "in_turn", "twice"]


@dataclasses.dataclass(frozen=True)
class Execution:
  """On which devices, and how.

  Attributes:
    mesh: devices; None is one device.
    attention: implementation of the backbone's attention; None chooses by platform.
    decoding: "together" decodes and scores all candidates at once. "in_turn" takes one candidate of a device after the
      other, with the activations of one. "twice" does so too and forgets their decoder states, so that no candidate
      holds one; winners are decoded again.
    preview_frames: frames of every candidate that traces hold, for a viewer of the search; none by default.
  """

  mesh: Mesh | None = None
  attention: Implementation | None = None
  decoding: Decoding = "together"
  preview_frames: int = 0

  def divides(self, axis: str) -> bool:
    """Whether arrays are divided along `axis` of the table `parallel.sharding.RULES`."""
    return self.mesh is not None and self.mesh.shape[RULES[axis]] > 1

  def place(self, *axes: str) -> Callable[[Shaped[Array, " ..."]], Shaped[Array, " ..."]]:
    """A constraint on where a traced array lies, whose leading axes are `axes` of the table."""
    return lambda x: constrain(self.mesh, x, *axes)

  @property
  def divide_attention(self) -> Callable[[Callable], Callable] | None:
    """Divides attention over memory slots among the devices; `backbone.attention` takes it. None without a mesh."""
    return None if self.mesh is None else _divide_attention(self.mesh)

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

  def map_siblings(self, f: Callable) -> Callable:
    """`f` of one candidate of every beam, [K, ...], as a function of trees [K, B, ...]; its results lead with [K, B].

    It may hold a memory for each beam: "together" runs it for all B at once, and all else one by one on each device.
    """
    divided = RULES["candidate"] if self.divides("candidate") else None
    at_once = jax.vmap(f, spmd_axis_name=divided)
    shards = self._shards("candidate")

    def run(tree: Any) -> Any:
      siblings = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
      if self.decoding == "together":
        made = at_once(siblings)
      else:
        made = _turns_back(jax.lax.map(at_once, _turns_first(siblings, shards)), shards)
      return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), made)

    return run

  def map_beams(self, f: Callable) -> Callable:
    """`f(*beam)` as a function of trees that lead with [K]; its results lead with [K]."""
    if self.decoding == "together":
      return jax.vmap(f)
    shards = self._shards("beam")
    one_turn = lambda inputs: jax.vmap(f)(*inputs)
    return lambda *beams: _turns_back(jax.lax.map(one_turn, _turns_first(beams, shards)), shards)

  def _shards(self, *axes: str) -> tuple[int, ...]:
    return tuple(1 if self.mesh is None else self.mesh.shape[RULES[axis]] for axis in axes)


def _turns_first(tree: Any, shards: tuple[int, ...]) -> Any:
  """Each leading axis as turns by shards, all turns first: [K, B, ...] to [K / k, B / b, k, b, ...].

  An axis that its shards do not divide stays whole, as in `parallel.sharding.partition_spec`.
  """
  count = len(shards)

  def split(x: jax.Array) -> jax.Array:
    shared = [shard if size % shard == 0 else 1 for size, shard in zip(x.shape, shards)]
    sizes = [part for size, shard in zip(x.shape, shared) for part in (shard, size // shard)]
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


def compiler_options(argument: Any, *, runs_once: bool) -> tuple[tuple[str, int], ...]:
  """What XLA is told of a chunk step, names and values: on CPUs, how much to spend on making it fast.

  There level 2 gives the same bits as level 3, its default, at the same speed, and compiles in less time. A program
  that runs once, for the first chunk, is not worth even that. `jax_disable_most_optimizations` overrules both.

  Args:
    argument: array that the step takes, or its shape: it lies where the step will run.
    runs_once: whether it runs for the first chunk alone.
  """
  sharding = getattr(argument, "sharding", None)
  platform = next(iter(sharding.device_set)).platform if sharding else jax.default_backend()
  if platform != "cpu" or jax.config.values["jax_disable_most_optimizations"]:
    return ()
  return (("xla_backend_optimization_level", 0 if runs_once else 2),)


@functools.cache
def _divide_attention(mesh: Mesh) -> Callable[[Callable], Callable]:
  """Every device attends with its own heads, candidates, beams and prompts, and no device waits for another.

  The compiler cannot divide attention itself: it does not see into the kernels.
  """

  def divide(attend: Callable) -> Callable:
    def run(q, k, v, mk, mv, count, cos, sin, layer):
      spec = lambda x, *axes: partition_spec(mesh, axes, x.shape)
      queries = spec(q, "prompt", "beam", "candidate", "token", "head")
      memory = spec(mk, "prompt", "beam", "layer", "slot", "head")
      per_beam = lambda x: spec(x, "prompt", "beam")
      specs = queries, queries, queries, memory, memory, *map(per_beam, (count, cos, sin)), spec(layer)
      local = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
      return local(q, k, v, mk, mv, count, cos, sin, layer)

    return run

  return divide
