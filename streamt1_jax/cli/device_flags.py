"""The flags that say how devices are used. Every command that runs a search has them."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import typing
from collections.abc import Sequence

import jax
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from streamt1_jax.backbone.attention import COMPILED_ON
from streamt1_jax.cli import flag_types
from streamt1_jax.cli.files import make_folder
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, preset
from streamt1_jax.execution import Decoding
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.typing import Device, Implementation


def define(values: flags.FlagValues) -> None:
  """Defines --mesh, --decoding, --attention and --compilation_cache_dir."""
  flag_types.define_string(
    values,
    "mesh",
    None,
    "Devices by axis, as in data:2,candidate:4. data: prompts; candidate; model: shards of the weights; seq: tokens of "
    "a chunk. By default candidate first, then data, then model; never seq.",
  )
  flag_types.define_choice(
    values,
    "decoding",
    None,
    typing.get_args(Decoding),
    "Candidates are decoded together, in turn with less memory, or in turn and winners twice with even less. By "
    "default the first of these that fits the device, and never together if frames are large.",
  )
  flag_types.define_choice(
    values,
    "attention",
    None,
    typing.get_args(Implementation),
    "How the backbone computes attention: XLA's operations (fold), a kernel for TPUs, a kernel for NVIDIA GPUs. By "
    "default flash on TPUs, else fold.",
  )
  define_compilation_cache(values)


def define_compilation_cache(values: flags.FlagValues) -> None:
  """Defines --compilation_cache_dir."""
  flag_types.define_path(
    values,
    "compilation_cache_dir",
    None,
    "Folder where JAX keeps what it compiled, for the next start of the same program; empty for no such folder. By "
    "default JAX_COMPILATION_CACHE_DIR, else streamt1_jax in the user's cache folder.",
    empty=True,
  )


def use_compilation_cache(values: flags.FlagValues) -> None:
  """Turns on the cache that the flag asks for; before anything is compiled. Raises ConfigError, naming the flag."""
  folder = values.compilation_cache_dir
  if folder is None:
    # The environment or the program that calls this command has chosen one.
    if jax.config.values["jax_compilation_cache_dir"] is not None:
      return
    # Process 0 alone writes the cache. On CPUs the others have other keys, so they would still compile while process 0
    # waits for them, and Gloo waits for 30 seconds only.
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
      return
    folder = _user_cache()
    if folder is None:
      return
  elif folder:
    make_folder("compilation_cache_dir", folder)
  if folder:
    # A start is many small programs: one after the other they take seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  if jax.config.values["jax_compilation_cache_dir"] != (folder or None):
    jax.config.update("jax_compilation_cache_dir", folder or None)
    # JAX keeps the cache it opened first.
    compilation_cache.reset_cache()


def _user_cache() -> str | None:
  """The folder of this user's compiled programs, or None and a warning where it cannot be written."""
  try:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "streamt1_jax"
    make_folder("compilation_cache_dir", str(folder), writable=True)
  except (ConfigError, RuntimeError) as error:  # RuntimeError: the user has no home.
    print(f"warning: compiled programs are not kept for the next start: {error}", file=sys.stderr)
    return None
  return str(folder)


def define_dtype(values: flags.FlagValues, choices: Sequence[str], meaning: str) -> None:
  """Defines --dtype; `use_dtype` gives the dtype it means."""
  default = "By default float32 on CPUs, and bfloat16 on TPUs and GPUs."
  flag_types.define_choice(values, "dtype", None, list(choices), f"{meaning} {default}")


def use_dtype(dtype: str | None) -> str:
  """What --dtype means: float32 on CPUs and bfloat16 elsewhere if it is not given.

  float32 means float32: accelerators would round the factors of products, TPUs to bfloat16. From now on they do not.
  """
  on_cpu = jax.default_backend() == "cpu"
  if dtype is None:
    return "float32" if on_cpu else "bfloat16"
  if dtype == "float32" and not on_cpu:
    jax.config.update("jax_default_matmul_precision", "highest")
  return dtype


def warn_if_slow(model: ModelConfig, attention: Implementation | None = None) -> None:
  """Warns where a full-size model meets a CPU, or attention another platform than its own; before weights are read."""
  platform = jax.default_backend()
  if hosts.is_first() and attention is not None and platform not in COMPILED_ON[attention]:
    own = " and ".join(COMPILED_ON[attention])
    print(
      f"warning: --attention={attention} is compiled for {own} alone; on this {platform} it is interpreted, and slow",
      file=sys.stderr,
      flush=True,
    )
  if hosts.is_first() and platform == "cpu" and model.backbone.dim >= preset("wan_1_3b").backbone.dim:
    print(
      f"warning: {model.name} is a full-size model, and this is a CPU: a chunk takes hours; use a GPU or a TPU",
      file=sys.stderr,
      flush=True,
    )


def tell_devices(dtype: str, mesh: Mesh | None = None) -> None:
  """Says on stderr in which dtype which devices compute: those of `mesh`, or one."""
  if hosts.is_first():
    device = jax.devices()[0]
    kind = device.platform if device.device_kind == device.platform else f"{device.device_kind} ({device.platform})"
    devices = f"device: {kind}" if mesh is None else f"devices: {mesh.size} x {kind}"
    print(f"{devices}, {dtype}", file=sys.stderr, flush=True)


def make_mesh(
  values: flags.FlagValues,
  model: ModelConfig,
  search: SearchConfig,
  num_prompts: int = 1,
  devices: Sequence[Device] | None = None,
) -> Mesh | None:
  """The mesh that the flag asks for, or None for one device; of all devices by default.

  Raises ConfigError, naming the flag.
  """
  several = devices is None and jax.process_count() > 1
  devices = jax.devices() if devices is None else devices
  if values.mesh is None:
    sizes = device_mesh.default_sizes(len(devices), model, search, num_prompts, every=several)
    return device_mesh.make_mesh(sizes, model, search, devices)
  try:
    sizes = device_mesh.parse_sizes(values.mesh)
    if several and math.prod(sizes.values()) < len(devices):
      raise ConfigError(f"the devices of several processes must all be used, and there are {len(devices)}")
    return device_mesh.make_mesh(sizes, model, search, devices)
  except ConfigError as error:
    raise ConfigError(f"--mesh={values.mesh}: {error}") from error
