"""Several processes, on one machine or many, that search as one.

Every process runs the same program with the same flags. The mesh spans the devices of all of them, so each process
computes its part of every chunk. Afterwards all hold the same decisions, and process 0 alone writes.

  start          joins the other processes
  require_same   compares what each process was told
  first_decides  shares what only one process can look up, such as which results exist
  everyone       shares a value of each process
  to_host        copies arrays that lie on other machines too
  run_together   ends the program with the other processes

`jax.distributed` finds the processes and watches them, and `multihost_utils` carries what they tell each other. When a
process dies JAX aborts the others with exit code 134, and its message has the number of the process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from streamt1_jax.config import ConfigError

BROKEN_OFF = 3
"""Exit code of a process whose computation with the other processes broke off."""

# A process that failed waits this long for the others: if all failed, each ends with its own exit code.
_GRACE_SECONDS = 10.0
# A process that is done waits for the slowest one. If that one dies, its missing heartbeats end the wait.
_PATIENCE_SECONDS = 7 * 24 * 3600


def start(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  heartbeat_timeout_seconds: int,
  initialization_timeout_seconds: int,
) -> None:
  """Joins the other processes; call it before anything that uses a device. A process that is alone returns at once.

  JAX completes what is None on TPU pods, under Slurm and Open MPI, and on Kubernetes.

  Args:
    coordinator: host:port of process 0.
    num_processes: number of all processes; 1 for a process that is alone.
    process_id: number of this process, 0 to `num_processes` - 1.
    heartbeat_timeout_seconds: JAX ends all processes when one of them is silent for so long.
    initialization_timeout_seconds: JAX ends this process when it has waited so long for the others.

  Raises:
    ConfigError: an argument is missing or impossible, or process 0 cannot listen at its address.
  """
  if num_processes == 1:
    if process_id:
      raise ConfigError(f"process_id must be less than num_processes, got process_id={process_id}, num_processes=1")
    return
  host, _, port = (coordinator or "host:1").rpartition(":")
  if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ConfigError(f"coordinator_address must be host:port, got {coordinator!r}")
  told = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
  visible, nodes, tasks = map(os.environ.get, ("JAX_LOCAL_DEVICE_IDS", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS"))
  # JAX would take SIGTERM away from the program, which saves the search when it comes.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **told,
      # Under Slurm JAX would take one device for each task. An empty list keeps all devices of a node with one task.
      local_device_ids=[] if nodes and nodes == tasks and not visible else None,
      cluster_detection_method=None if None in told.values() else "deactivate",
      initialization_timeout=initialization_timeout_seconds,
      heartbeat_timeout_seconds=heartbeat_timeout_seconds,
      shutdown_timeout_seconds=_PATIENCE_SECONDS,
    )
  except Exception as error:  # The service that knows the cluster raises its own types.
    # JAX finds no cluster, or does not look for one: a notebook has used its devices already. Its words alone tell.
    alone = any(words in str(error) for words in ("coordinator_address should be defined", "must be called before"))
    if alone and not any(value is not None for value in told.values()):
      return
    given = {name: value for name, value in (told | {"JAX_LOCAL_DEVICE_IDS": visible}).items() if value is not None}
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    raise ConfigError(f"cannot join the other processes ({text}): {str(error).splitlines()[0]}") from error


def is_first() -> bool:
  """Whether this process writes files and talks to the user."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def everyone(value: Any) -> list[Any]:
  """The JSON value of each process, by process. All must call this in the same order; it waits for the last one."""
  if not jax.distributed.is_initialized():
    return [value]
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray([content.size], np.int32))[:, 0]
  # JAX compiles a program for every length, so there are few of them.
  padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
  padded[: content.size] = content
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first_decides(decide: Callable[[], Any]) -> Any:
  """The JSON value that `decide` returns on process 0, on all processes; they must call this in the same order.

  If it raises ConfigError there, all processes raise it.
  """
  if not jax.distributed.is_initialized():
    return decide()
  decision = {}
  if is_first():
    try:
      decision = {"value": decide()}
    except ConfigError as error:
      decision = {"error": str(error)}
  decision = everyone(decision)[0]
  if "error" in decision:
    raise ConfigError(decision["error"])
  return decision["value"]


def require_same(values: Mapping[str, str]) -> None:
  """Compares named texts between all processes, which must call this in the same order.

  Raises:
    ConfigError: texts differ. All processes raise it, with what differs and which process has what.
  """
  if difference := describe_difference(everyone(dict(values))):
    raise ConfigError(difference)


def describe_difference(values: Sequence[Mapping[str, str]]) -> str:
  """Says which of the named texts of the processes differ, and which process has what; empty if none do."""
  differences = []
  for name in dict.fromkeys(name for texts in values for name in texts):
    holders: dict[str, list[str]] = {}
    for process, texts in enumerate(values):
      holders.setdefault(texts.get(name, "unknown"), []).append(str(process))
    if len(holders) > 1:
      parts = (f"{text} on process {', '.join(processes)}" for text, processes in holders.items())
      differences.append(f"{name} is {' and '.join(parts)}")
  return "; ".join(differences)


def to_host(tree: Any) -> Any:
  """A tree of arrays as numpy arrays. If some lie on several processes, all must call this in the same order."""
  is_apart = lambda x: isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
  gather = lambda x: multihost_utils.process_allgather(x, tiled=True) if is_apart(x) else x
  return jax.device_get(jax.tree.map(gather, tree))


def run_together(body: Callable[[], int]) -> int:
  """Runs `body`, which may call `start`, and ends with the other processes.

  Args:
    body: returns an exit code, after it has printed why that is not 0.

  Returns:
    The exit code. If it is not 0 and there are other processes, this one ends here: its devices may wait for theirs.
  """
  try:
    code = body()
  except Exception as error:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    code = 1
    # On CPUs JAX also raises ValueError, with the words of the library that connects the processes.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
      code, reason = BROKEN_OFF, str(error).splitlines()[0]
      print(f"error: a computation of all processes broke off; one may have ended: {reason}", file=sys.stderr)
  if jax.distributed.is_initialized():
    _leave(code)
  return code


def _leave(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  if code:
    # The others may never come. JAX ends them when it hears no more from this process.
    timer = threading.Timer(_GRACE_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()
  jax.distributed.shutdown()
  if code:
    os._exit(code)
