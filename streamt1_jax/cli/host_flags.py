"""The flags that say how several processes find each other. Commands that search on several hosts have them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import flags, logging
from etils import epath

import streamt1_jax
from streamt1_jax.cli import flag_types
from streamt1_jax.cli.command import flag_settings
from streamt1_jax.cli.files import checkpoint_sha256
from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files
from streamt1_jax.parallel import hosts
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.rewards.table import REWARDS

_OWN = ("coordinator_address", "num_processes", "process_id")
_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "streamt1_jax")


def define(values: flags.FlagValues) -> None:
  """Defines the flags that say how processes find each other."""
  flag_types.define_string(
    values,
    "coordinator_address",
    None,
    "host:port of process 0, where several processes have no cluster to tell it: JAX knows TPU pods, Slurm, Open MPI "
    "and Kubernetes. By default JAX_COORDINATOR_ADDRESS.",
  )
  flag_types.define_integer(
    values, "num_processes", None, "Processes of this run; 1 for one that is alone. By default JAX_NUM_PROCESSES.", 1
  )
  flag_types.define_integer(values, "process_id", None, "Which of them this one is. By default JAX_PROCESS_ID.", 0)
  flag_types.define_integer(
    values,
    "heartbeat_timeout_seconds",
    60,
    "Silence after which JAX counts a process as dead and ends the others.",
    5,
  )
  flag_types.define_integer(
    values, "initialization_timeout_seconds", 300, "How long processes wait for each other to start.", 1
  )


def start(values: flags.FlagValues) -> None:
  """Joins the other processes, if there are any, and compares flags. Call it before anything that uses a device.

  Raises:
    ConfigError: an address is impossible, or flags, versions or sources differ; then all processes raise it, and the
      message names what differs.
  """
  coordinator = values.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
  numbers = [_number(values[name].value, f"JAX_{name.upper()}") for name in ("num_processes", "process_id")]
  if values.num_processes == 1:
    # A process may be told to be alone where the environment is that of many.
    numbers[1] = values.process_id
  try:
    hosts.start(
      coordinator,
      *numbers,
      heartbeat_timeout_seconds=values.heartbeat_timeout_seconds,
      initialization_timeout_seconds=values.initialization_timeout_seconds,
    )
  except ConfigError as error:
    raise ConfigError(f"--{', --'.join(_OWN)}: {error}") from error
  if not jax.distributed.is_initialized():
    return
  if not hosts.is_first():
    logging.set_verbosity(logging.ERROR)
  given = {f"--{name}": repr(value) for name, value in flag_settings(values).items() if name not in _OWN}
  versions = {f"the version of {name}": _version(name) or "none" for name in _PACKAGES}
  hosts.require_same(given | versions | {"the SHA-256 of the sources of streamt1_jax": source_sha256()})


def _version(package: str) -> str | None:
  """The version of an installed package; None if it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def source_sha256() -> str:
  """SHA-256 of this package's Python files: between releases its version stays the same."""
  root = pathlib.Path(streamt1_jax.__file__).parent
  files = sorted(root.rglob("*.py"))
  return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def require_same_inputs(checkpoint: epath.Path, prompts: Sequence[str], steering: str = "") -> None:
  """Compares what the processes would read, since their disks may differ.

  Raises:
    ConfigError: weights or prompts differ. All processes raise it.
  """
  if jax.process_count() > 1:
    rewards = [name for name in REWARDS if (checkpoint / REWARDS_FOLDER / name).exists()]
    listed = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    # A message has 500 characters. The beginning of a sum tells as much of a difference as all of it.
    digests = {
      "the SHA-256 of the checkpoint": checkpoint_sha256(checkpoint),
      **{f"the SHA-256 of {name}": _reward_sha256(checkpoint / REWARDS_FOLDER / name) for name in rewards},
      "the SHA-256 of the prompts": listed,
      "the SHA-256 of what steers the video": hashlib.sha256(steering.encode()).hexdigest(),
    }
    counts = {"the list of its rewards": ", ".join(rewards) or "empty", "the number of prompts": str(len(prompts))}
    hosts.require_same(counts | {name: digest[:12] for name, digest in digests.items()})


def _reward_sha256(folder: epath.Path) -> str:
  # The file holds the checksums of all others, texts and tokenizer included.
  path = folder / part_files.PART_FILE
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "unknown"


def _number(given: int | None, variable: str) -> int | None:
  """The flag's value, or that of the environment."""
  text = os.environ.get(variable)
  if given is not None or text is None:
    return given
  if not text.isascii() or not text.isdigit():
    raise ConfigError(f"{variable} must be a number, got {text!r}")
  return int(text)
