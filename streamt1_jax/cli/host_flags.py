"""The flags that say how several processes find each other, for every program that searches on more than one host."""

from __future__ import annotations

import hashlib
import logging as std_logging
import os
import sys
from collections.abc import Sequence

import jax
from absl import flags, logging
from etils import epath

from streamt1_jax import executables
from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files
from streamt1_jax.parallel import hosts
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.rewards.table import REWARDS

_COORDINATOR = flags.DEFINE_string(
  "coordinator_address",
  None,
  "host:port of process 0, where several processes have no cluster to tell it: JAX knows TPU pods, Slurm, Open MPI and "
  "Kubernetes. By default JAX_COORDINATOR_ADDRESS.",
)
_NUM_PROCESSES = common.define_integer(
  "num_processes", None, "Processes of this run; 1 for one that is alone. By default JAX_NUM_PROCESSES.", 1
)
_PROCESS_ID = common.define_integer("process_id", None, "Which of them this one is. By default JAX_PROCESS_ID.", 0)
_HEARTBEAT_TIMEOUT = common.define_integer(
  "heartbeat_timeout_seconds", 60, "Silence after which a process counts as dead and the others stop.", 5
)
_INITIALIZATION_TIMEOUT = common.define_integer(
  "initialization_timeout_seconds", 300, "How long processes wait for each other to start.", 1
)
_OWN = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "streamt1_jax")


def start(program: str) -> None:
  """Joins the other processes, if there are any, and compares flags; before anything that uses a device.

  Args:
    program: name of the module whose flags count.

  Raises:
    ConfigError: an address cannot be, or flags, versions or sources differ, then on all processes; the message names
      them.
  """
  own = [flag.name for flag in _OWN]
  timeout = _INITIALIZATION_TIMEOUT.value
  coordinator = _COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS")
  numbers = (_number(_NUM_PROCESSES, "JAX_NUM_PROCESSES"), _number(_PROCESS_ID, "JAX_PROCESS_ID"))
  try:
    address = hosts.find(coordinator, *numbers, timeout)
    if address is None:
      return
    # It tells what it is about to do.
    std_logging.getLogger("jax._src.distributed").setLevel(std_logging.WARNING)
    hosts.start(address, heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT.value, initialization_timeout_seconds=timeout)
  except ConfigError as error:
    raise ConfigError(f"--{', --'.join(own)}: {error}") from error
  if not hosts.is_first():
    logging.set_verbosity(logging.ERROR)
  key_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[program])
  given = {f"--{flag.name}": repr(flag.value) for flag in key_flags if flag.name not in own}
  versions = {f"the version of {name}": executables.version(name) or "none" for name in _PACKAGES}
  hosts.require_same(given | versions | {"the SHA-256 of the sources of streamt1_jax": executables.source_digest()})


def require_same_inputs(checkpoint: epath.Path, prompts: Sequence[str]) -> None:
  """Raises ConfigError, on all processes, if they would read different weights or prompts: disks may differ."""
  if jax.process_count() > 1:
    rewards = [name for name in REWARDS if (checkpoint / REWARDS_FOLDER / name).exists()]
    listed = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    hosts.require_same(
      {
        "the SHA-256 of the checkpoint": common.checkpoint_sha256(checkpoint),
        "the list of its rewards": ", ".join(rewards) or "empty",
        **{f"the SHA-256 of {name}": _reward_sha256(checkpoint / REWARDS_FOLDER / name) for name in rewards},
        "the number of prompts": str(len(prompts)),
        "the SHA-256 of the prompts": listed,
      }
    )


def _reward_sha256(folder: epath.Path) -> str:
  # Its texts and its tokenizer are among the files whose checksums this has.
  path = folder / part_files.PART_FILE
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "unknown"


def _number(flag: flags.FlagHolder, variable: str) -> int | None:
  """The flag's value, or that of the environment."""
  text = os.environ.get(variable)
  if flag.value is not None or text is None:
    return flag.value
  if not text.isascii() or not text.isdigit():
    raise ConfigError(f"{variable} must be a number, got {text!r}")
  return int(text)
