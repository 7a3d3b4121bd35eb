"""The memory plan beside what compilers said: one row for every compilation that is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax.numpy as jnp

from streamt1_jax.config import SearchConfig, preset
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.planning import memory, request
from streamt1_jax.planning.memory import GIB, Estimate
from streamt1_jax.planning.request import Request
from streamt1_jax.rewards.table import PUBLISHED_REWARDS, REWARDS

COLUMNS = (
  "program", "mesh", "decoding", "rewards", "sink frames", "arguments", "temporaries", "error", "within",
)  # fmt: skip
_CORES = {"tpu7x": 2}
"""Devices of a chip, where a chip has more than one; tables count by the chip."""


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One compilation, in bytes; those of a slice are per chip.

  Attributes:
    labels: what was compiled: program, mesh, decoding, rewards, sink frames.
    recorded: arguments and temporaries as the compiler counted them.
    planned: the same as the plan has them.
    error: by how much the plan says that its temporaries may be off.
  """

  labels: tuple[str, ...]
  recorded: tuple[int, int]
  planned: tuple[int, int]
  error: int

  @property
  def is_within(self) -> bool:
    """Whether the temporaries are as close as the plan says."""
    return abs(self.planned[1] - self.recorded[1]) <= self.error

  def cells(self) -> tuple[str, ...]:
    """The row in GiB: planned beside recorded."""
    pairs = [
      f"{planned / GIB:.3g} for {recorded / GIB:.3g}"
      for planned, recorded in zip(self.planned, self.recorded, strict=True)
    ]
    return (*self.labels, *pairs, f"{self.error / GIB:.2g}", "yes" if self.is_within else "no")


def of_slices(evidence: Mapping[str, Any]) -> Iterator[Comparison]:
  """The rows of `docs/evidence/compiled_slices.json`, whose sizes are GiB per chip. Needs eight devices of any kind."""
  names = "slice", "mesh", "decoding", "rewards", "sink frames", "arguments", "temporaries"
  at = [evidence["columns"].index(name) for name in names]
  for row in evidence["rows"]:
    topology, mesh, decoding, rewards, sinks, arguments, temporaries = (row[index] for index in at)
    model, search = preset("wan_1_3b"), SearchConfig.released(max_sink_frames=int(sinks))
    # Devices that search other prompts change nothing on this one.
    sizes = device_mesh.parse_sizes(mesh) | {"data": 1}
    names = () if rewards == "built in" else PUBLISHED_REWARDS
    large = {name: (REWARDS[name], REWARDS[name].make_config()) for name in names}
    asked = Request(
      model=model,
      search=search,
      rewards=large,
      dtype=jnp.bfloat16,
      reward_dtype=jnp.dtype(rewards if large else "bfloat16"),
      execution=Execution(device_mesh.make_mesh(sizes, model, search)),
      kernel=True,
    )
    planned = memory.estimate(request.sizes(asked), cast(Decoding, decoding))
    recorded = int(float(arguments) * GIB), int(float(temporaries) * GIB)
    labels = topology, mesh, decoding, rewards, sinks
    yield _compare(labels, recorded, planned, _CORES.get(topology.partition(":")[0], 1))


def of_candidates(evidence: Mapping[str, Any]) -> Iterator[Comparison]:
  """The rows of `docs/evidence/memory_of_candidates.json`: a small model on a CPU, attention by XLA's operations."""
  for row in evidence["rows"]:
    candidates, live, temporaries = (int(cell.replace(",", "")) for cell in row[:3])
    model = preset("bench_mid")
    search = SearchConfig.released(top_k=1, beam_size=candidates, max_sink_frames=9)
    asked = Request(model, search, {}, jnp.float32, jnp.float32, Execution(), kernel=False)
    planned = memory.estimate(request.sizes(asked), "together")
    labels = f"`bench_mid`, CPU, {candidates} of a beam", "", "together", "none", "9"
    yield _compare(labels, (live, temporaries), planned, 1)


def _compare(labels: tuple[str, ...], recorded: tuple[int, int], planned: Estimate, cores: int) -> Comparison:
  sizes = planned.argument_bytes * cores, planned.temporary_bytes * cores
  return Comparison(labels, recorded, sizes, planned.error * cores)
