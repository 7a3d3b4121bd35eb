"""The flag --device_memory, and what a search takes of a device: as a decision, and as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from jax.sharding import Mesh

from streamt1_jax.cli import flag_types
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.io import markdown
from streamt1_jax.parallel import hosts
from streamt1_jax.planning import memory, programs
from streamt1_jax.planning import request as requests
from streamt1_jax.planning.memory import Plan
from streamt1_jax.planning.request import Request
from streamt1_jax.rewards.selection import RewardChoice


def define(values: flags.FlagValues) -> None:
  """Defines --device_memory."""
  flag_types.define_float(
    values, "device_memory", None, "GiB that a device has for the search; by default what it reports.", 1e-6, 1e6
  )


def request(
  values: flags.FlagValues,
  checkpoint: epath.Path,
  model: ModelConfig,
  search: SearchConfig,
  choice: RewardChoice,
  mesh: Mesh | None,
  dtype: str,
  num_chunks: int | None = None,
  kept_states: int = 0,
  reward_dtype: str | None = None,
) -> Request:
  """What the flags ask of a device. No weight is read. Raises ConfigError for a reward whose folder is damaged.

  `reward_dtype` is the model's by default.
  """
  kernel = requests.uses_kernel(values.attention, jax.default_backend(), model.backbone.head_dim)
  return Request(
    model=model,
    search=search,
    rewards=requests.reward_configs(checkpoint, choice),
    dtype=jnp.dtype(dtype),
    reward_dtype=jnp.dtype(reward_dtype or dtype),
    execution=Execution(mesh, values.attention),
    kernel=kernel,
    num_chunks=num_chunks,
    decoding=values.decoding,
    kept_states=kept_states,
  )


def make(values: flags.FlagValues, asked: Request) -> Plan:
  """The plan for this process's devices, or for devices of --device_memory."""
  given = values.device_memory
  limit = requests.device_limit(asked.execution.mesh) if given is None else int(given * memory.GIB)
  return requests.plan(asked, limit)


def decide(values: flags.FlagValues, asked: Mapping[str, Request]) -> Decoding:
  """How to decode what several searches ask for, so that each fits; process 0 decides for all.

  Raises ConfigError, with a remedy, for a search that does not fit. Its name in `asked` begins the message.
  """

  def on_this_process() -> Decoding:
    ways = []
    for name, one in asked.items():
      plan = make(values, one)
      try:
        require_fit(values, plan, one)
      except ConfigError as error:
        raise ConfigError(f"{name}{error}") from error
      ways.append(plan.chosen.decoding)
    return max(ways, key=memory.WAYS.index)

  return hosts.first_decides(on_this_process)


def fitting(values: flags.FlagValues, asked: Mapping[str, Request]) -> dict[str, Decoding]:
  """How those of several searches decode that fit; process 0 decides for all."""

  def on_this_process() -> dict[str, Decoding]:
    plans = {name: make(values, one) for name, one in asked.items()}
    return {name: plan.chosen.decoding for name, plan in plans.items() if plan.fits}

  return hosts.first_decides(on_this_process)


def require_fit(values: flags.FlagValues, plan: Plan, asked: Request) -> None:
  """Raises ConfigError, in one line, for a plan that does not fit, with flags of this command with which it would."""
  if not plan.fits and plan.limit is not None:
    memory.require_fit(plan, requests.remedy(asked, plan.limit, values))


def lines(plan: Plan, asked: Request, num_chunks: int) -> Iterator[str]:
  """The plan for people: what the chosen way takes, all ways beside each other, and what will be compiled."""
  chosen, size = plan.chosen, memory.in_gib
  mesh = asked.execution.mesh
  yield f"on every one of {mesh.size} devices" if mesh else "on one device"
  yield ""
  rows = [*chosen.arguments.items(), *chosen.temporaries.items(), ("results", chosen.results), ("all", chosen.total)]
  yield markdown.table(("part", "GiB"), ((name, size(number)) for name, number in rows))
  yield ""
  fits = lambda one: "yes" if one.surely_fits(plan.limit) else "perhaps" if one.may_fit(plan.limit) else "no"
  columns = ("--decoding", "between chunks", "temporaries", "all", "off by", "fits")
  cells = lambda one: (one.argument_bytes, one.temporary_bytes, one.total, one.error)
  ways = ([one.decoding, *map(size, cells(one)), fits(one)] for one in plan.estimates)
  yield markdown.table(columns, ways)
  yield ""
  given = "unknown" if plan.limit is None else f"{size(plan.limit)} GiB"
  yield f"a device gives: {given}"
  yield f"choice: --decoding={chosen.decoding}"
  yield ""
  made = programs.of_search(asked.model, asked.search, num_chunks)
  yield markdown.table(("program", "is compiled for"), ((f"jit({one.name})", one.purpose) for one in made))
