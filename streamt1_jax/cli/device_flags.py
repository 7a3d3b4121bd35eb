"""The flags that say how devices are used, for every program that runs a search."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence

import jax
from absl import flags
from jax.sharding import Mesh

from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig
from streamt1_jax.execution import Decoding
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.typing import Implementation

_MESH = flags.DEFINE_string(
  "mesh",
  None,
  "Devices by axis, as in data:2,candidate:4. data: prompts; candidate; model: shards of the weights; seq: tokens of a "
  "chunk. By default candidate first, then data, then model; never seq.",
)
DECODING = flags.DEFINE_enum(
  "decoding",
  None,
  typing.get_args(Decoding),
  "Candidates are decoded together, in turn with less memory, or in turn and winners twice with even less. By default "
  "in turn if frames are large.",
)
ATTENTION = flags.DEFINE_enum(
  "attention",
  None,
  typing.get_args(Implementation),
  "Of the backbone: by XLA, by a kernel for TPUs, by a kernel for NVIDIA GPUs. By default flash on TPUs, else fold.",
)
_CACHE_DIR = common.define_path(
  "compilation_cache_dir", None, "Folder where JAX keeps what it compiled, for the next start of the same program."
)


def use_compilation_cache() -> None:
  """Turns on the cache that the flag asks for; before anything is compiled. Raises ConfigError, naming the flag."""
  if _CACHE_DIR.value is None:
    return
  common.make_folder("compilation_cache_dir", _CACHE_DIR.value)
  jax.config.update("jax_compilation_cache_dir", _CACHE_DIR.value)
  # A start is many small programs: one after the other they take seconds.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def make_mesh(
  model: ModelConfig, search: SearchConfig, num_prompts: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
  """The mesh that the flag asks for, or None for one device; of all devices by default.

  Raises ConfigError, naming the flag.
  """
  several = devices is None and jax.process_count() > 1
  devices = jax.devices() if devices is None else devices
  if _MESH.value is None:
    sizes = device_mesh.default_sizes(len(devices), model, search, num_prompts, every=several)
    return device_mesh.make_mesh(sizes, model, search, devices)
  try:
    sizes = device_mesh.parse_sizes(_MESH.value)
    if several and math.prod(sizes.values()) < len(devices):
      raise ConfigError(f"the devices of several processes must all be used, and there are {len(devices)}")
    return device_mesh.make_mesh(sizes, model, search, devices)
  except ConfigError as error:
    raise ConfigError(f"--mesh={_MESH.value}: {error}") from error
