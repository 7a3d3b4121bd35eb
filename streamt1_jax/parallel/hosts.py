"""Several processes, on one machine or many, that search as one.

All run the same program on the same flags. The mesh spans the devices of all of them, so each computes its part of
every chunk; each then holds the same decisions, and process 0 alone writes. What is left to arrange:

  start         who belongs together
  require_same  nobody was told anything else
  first_decides what only one of them can look up, such as which results exist
  to_host       arrays that lie on other machines too
  run_together  they end together: with one line that names who died or failed, and within a bounded time

JAX has a store of keys and values at the coordinator, in process 0. There every process says once a second that it
lives, or how it ended, and reads what the others say. JAX's own way to end the others of a dead process is an abort,
exit code 134, which names nobody; it stays as the last resort, at more than twice the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from streamt1_jax.config import ConfigError
from streamt1_jax.parallel.relay import Relay

DIED = 3
"""Exit code of a process that stops because another one died."""

_PREFIX = "streamt1_jax"
_PULSE_SECONDS = 1.0
# After another process failed: time to end by oneself, for a failure of all is one of each.
_GRACE_SECONDS = 10.0
# Who is silent this long while a collective breaks off has died.
_SUSPICIOUS_SECONDS = 5.0
_FOREVER_MS = 7 * 24 * 3600 * 1000


class Address(NamedTuple):
  """Where a process belongs.

  Attributes:
    coordinator: host:port of process 0.
    num_processes: all of the run.
    process_id: this one, 0 to `num_processes` - 1.
    local_device_ids: devices of this machine that it uses; None for all.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: list[int] | None = None


def find(
  coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_seconds: int
) -> Address | None:
  """Completes an address from the cluster: TPU pods, Slurm, Open MPI and Kubernetes are known to JAX.

  Args:
    coordinator: host:port of process 0, if the caller knows it.
    num_processes: likewise.
    process_id: likewise.
    timeout_seconds: how long a name may take to be found.

  Returns:
    The address, or None for a process that is alone.

  Raises:
    ConfigError: something is missing, or cannot be.
  """
  if num_processes == 1:
    return None
  devices = _local_devices()
  found = (coordinator, num_processes, process_id, devices)
  try:
    # Where all is said, JAX would still take one device per process under Slurm.
    if None in found[:3]:
      found = clusters.ClusterEnv.auto_detect_unset_distributed_params(*found, None, timeout_seconds)
  except Exception as error:  # Whatever a metadata server, or none, leads to.
    raise ConfigError(f"the cluster does not tell its processes: {error}; num_processes=1 asks for none") from error
  address = Address(*found)
  if devices is None and os.environ.get("SLURM_STEP_NUM_NODES") == str(address.num_processes):
    # One task per node drives all of its devices.
    address = address._replace(local_device_ids=None)
  if address[:3] == (None, None, None) or address.num_processes == 1:
    return None
  for name, value in zip(("coordinator_address", "num_processes", "process_id"), address[:3]):
    if value is None:
      raise ConfigError(f"{name} is missing, and no cluster tells it; several processes need all three")
  host, _, port = address.coordinator.rpartition(":")
  if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ConfigError(f"coordinator_address must be host:port, got {address.coordinator!r}")
  if not 0 <= address.process_id < address.num_processes:
    raise ConfigError(f"process_id must be in 0..{address.num_processes - 1}, got {address.process_id}")
  return address


def _local_devices() -> list[int] | None:
  """Devices of this machine that the environment gives to this process."""
  text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
  if not text:
    return None
  numbers = [number.strip() for number in text.split(",")]
  if not all(number.isascii() and number.isdigit() for number in numbers):
    raise ConfigError(f"JAX_LOCAL_DEVICE_IDS must be numbers, as 0,1, got {text!r}")
  return [int(number) for number in numbers]


def start(address: Address, *, heartbeat_timeout_seconds: int, initialization_timeout_seconds: int) -> None:
  """Joins the other processes; before anything that uses a device.

  Args:
    address: from `find`.
    heartbeat_timeout_seconds: silence after which a process counts as dead.
    initialization_timeout_seconds: how long to wait for the others; then this process exits with code 3.

  Raises:
    ConfigError: process 0 cannot listen at its address.
  """
  global _member
  member = _Member(address, heartbeat_timeout_seconds)
  # JAX aborts if the others do not come, so its own time must be longer.
  waiting = threading.Timer(initialization_timeout_seconds, member.leave, (DIED, _nobody_came(address)))
  waiting.daemon = True
  waiting.start()
  # JAX would take SIGTERM away from the program.
  jax.config.update("jax_enable_preemption_service", False)
  first = address.process_id == 0
  relay = None if first else Relay(address.coordinator, heartbeat_timeout_seconds, member.coordinator_is_gone)
  try:
    jax.distributed.initialize(
      address.coordinator if first else relay.address,
      address.num_processes,
      address.process_id,
      local_device_ids=address.local_device_ids,
      cluster_detection_method="deactivate",
      initialization_timeout=2 * initialization_timeout_seconds,
      heartbeat_timeout_seconds=2 * (heartbeat_timeout_seconds + int(_GRACE_SECONDS)),
    )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(f"coordinator_address {address.coordinator}: {str(error).splitlines()[0]}") from error
  finally:
    waiting.cancel()
  member.watch()
  _member = member


def _nobody_came(address: Address) -> str:
  return (
    f"process {address.process_id} has waited too long: not all {address.num_processes} processes came to "
    f"{address.coordinator}"
  )


def is_first() -> bool:
  """Whether this process writes files and talks to the user."""
  return _member is None or _member.address.process_id == 0


def require_same(values: Mapping[str, str]) -> None:
  """Compares named texts between all processes, which must call this in the same order.

  Raises ConfigError, the same on all, naming what differs and which process has what.
  """
  if difference := _describe_difference(everyone(dict(values))):
    raise ConfigError(difference)


def everyone(value: Any) -> list[Any]:
  """What each process gave, by process: JSON values. All must call this, in the same order; it waits for the last."""
  return [value] if _member is None else _member.everyone(value)


def first_decides(decide: Callable[[], Any]) -> Any:
  """What `decide` returns on process 0, for all processes; they must call this in the same order.

  The result must be JSON; a ConfigError is raised on all.
  """
  return decide() if _member is None else _member.first_decides(decide)


def to_host(tree: Any) -> Any:
  """A tree of arrays as numpy arrays. Where they lie on several processes all must call this, in the same order."""
  leaves, structure = jax.tree.flatten(tree)
  apart = {
    index: leaf
    for index, leaf in enumerate(leaves)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
  }
  if apart:
    mesh = next(iter(apart.values())).sharding.mesh
    for index, leaf in _replicator(mesh)(apart).items():
      leaves[index] = leaf
  return jax.device_get(jax.tree.unflatten(structure, leaves))


@functools.cache
def _replicator(mesh: Mesh) -> Callable[[Any], Any]:
  return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))


def announce(code: int, message: str) -> None:
  """Tells the other processes how this one will end. From then on no failure of theirs ends it."""
  if _member is not None:
    _member.announce(code, message)


def run_together(body: Callable[[], int]) -> int:
  """Runs what may call `start`, and ends with the other processes.

  Args:
    body: returns an exit code; a failure it has announced.

  Returns:
    The exit code. Does not return where it is not 0 and there are others, or where another process died or failed: the
    process ends, for a device may wait for the others forever.
  """
  try:
    code = body()
  except Exception as error:
    if _member is None:
      raise
    _member.wait_for_cause(error)
    traceback.print_exc()
    announce(1, f"{type(error).__name__}: {error}")
    code = 1
  if _member is not None:
    _member.end(code)
  return code


@dataclasses.dataclass
class _Pulse:
  """What a process says of itself.

  Attributes:
    host: name of its machine.
    beats: grows while it lives.
    code: exit code once it ends; 0 where all its work is done.
    message: why.
    death: what it says of another process that died, or that cannot be reached.
  """

  host: str
  beats: int = 0
  code: int | None = None
  message: str = ""
  death: str = ""


class _Member:
  """This process among the others."""

  def __init__(self, address: Address, timeout_seconds: float):
    self.address, self._timeout_seconds = address, timeout_seconds
    self._pulse = _Pulse(socket.gethostname())
    self._others: dict[int, _Pulse] = {}
    self._heard = dict.fromkeys(range(address.num_processes), time.monotonic())
    self._failed_since: float | None = None
    self._suspicious = self._closing = False
    self._calls = 0
    self._leaving = threading.Lock()

  def watch(self) -> None:
    self._client = distributed.global_state.client
    now = time.monotonic()
    self._heard = dict.fromkeys(self._heard, now)
    self._beat()
    threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self) -> None:
    while not self._closing:
      try:
        self._beat()
        self._listen()
      except (RuntimeError, ValueError):  # JAX raises both where the coordinator does not answer.
        pass
      self._judge()
      time.sleep(_PULSE_SECONDS)

  def _beat(self) -> None:
    self._pulse.beats += 1
    text = json.dumps(dataclasses.asdict(self._pulse))
    self._client.key_value_set(f"{_PREFIX}/pulse/{self.address.process_id}", text, allow_overwrite=True)

  def _listen(self) -> None:
    now = time.monotonic()
    for key, text in self._client.key_value_dir_get(f"{_PREFIX}/pulse/"):
      process, pulse = int(key.rpartition("/")[2]), _Pulse(**json.loads(text))
      if pulse != self._others.get(process):
        self._heard[process] = now
      self._others[process] = pulse

  def _judge(self) -> None:
    """Ends this process if another one failed or died."""
    now, own = time.monotonic(), self.address.process_id
    failed = [process for process, pulse in self._others.items() if process != own and pulse.code]
    # Who has announced its own end may still be writing the account of it.
    if failed and not self._pulse.code:
      self._failed_since = self._failed_since or now
      if self._suspicious or self._others[failed[0]].death or now - self._failed_since > _GRACE_SECONDS:
        self._follow(failed[0])
    limit = _SUSPICIOUS_SECONDS if self._suspicious else self._timeout_seconds
    # Where several seem silent, on busy machines say, the one that died has been so the longest.
    for process, heard in sorted(self._heard.items(), key=lambda item: item[1]):
      ended = process in self._others and self._others[process].code is not None
      if process != own and not ended and now - heard > limit:
        self._pulse.death = f"{self._name(process)} died or cannot be reached: silent for {now - heard:.0f} s"
        self.leave(DIED, self._pulse.death)

  def _follow(self, process: int) -> None:
    """Ends as a process that failed; what is no code of ours becomes one."""
    pulse = self._others[process]
    message = pulse.death or f"{self._name(process)}: {pulse.message}"
    self.leave(DIED if pulse.code == 1 else pulse.code, message)

  def _name(self, process: int) -> str:
    return f"process {process}" + (f" on {self._others[process].host}" if process in self._others else "")

  def coordinator_is_gone(self) -> None:
    if self._closing:
      return
    if 0 in self._others and self._others[0].code:
      self._follow(0)
    self.leave(DIED, f"{self._name(0)} died or cannot be reached: its connection at {self.address.coordinator} is lost")

  def leave(self, code: int, message: str) -> None:
    """Ends this process from any thread."""
    with self._leaving:  # Never released: the first to come ends all.
      # Process 0 may be in the middle of its progress bar.
      print(f"{'' if self.address.process_id else chr(10)}error: {message}", file=sys.stderr, flush=True)
      if self.address.process_id == 0 and self._pulse.death:
        # With process 0 goes the place where all read: let them hear first who it was that died.
        self._pulse.code = code
        with contextlib.suppress(RuntimeError, ValueError):
          self._beat()
          time.sleep(3 * _PULSE_SECONDS)
      os._exit(code)

  def wait_for_cause(self, error: Exception) -> None:
    """Gives the watch time to name who died, if that is why a collective failed; else returns."""
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
      self._suspicious = True
      time.sleep(_SUSPICIOUS_SECONDS + _GRACE_SECONDS + 2 * _PULSE_SECONDS)

  def announce(self, code: int, message: str) -> None:
    self._pulse.code, self._pulse.message = code, message

  def end(self, code: int) -> None:
    """Ends with the others: waits for all their work, or after a failure for their last words."""
    self._pulse.code = code
    if code:
      self._closing = True
      deadline = threading.Timer(_GRACE_SECONDS + 5 * _PULSE_SECONDS, os._exit, (code,))
      deadline.start()
    self._beat()
    # A process that failed may go, but process 0, at which all others read and write.
    while self._num_ended() < self.address.num_processes and not (code and self.address.process_id):
      time.sleep(_PULSE_SECONDS / 10)
      self._listen()
    if code:
      with self._leaving:
        sys.stdout.flush()
        os._exit(code)
    self._closing = True
    jax.distributed.shutdown()

  def _num_ended(self) -> int:
    return sum(pulse.code is not None for pulse in self._others.values())

  def everyone(self, value: Any) -> list[Any]:
    self._calls += 1
    folder = f"{_PREFIX}/call/{self._calls}"
    self._client.key_value_set(f"{folder}/{self.address.process_id}", json.dumps(value))
    if self.address.process_id == 0:
      values = [json.loads(self._wait(f"{folder}/{process}")) for process in range(self.address.num_processes)]
      self._client.key_value_set(f"{folder}/all", json.dumps(values))
      # Whoever takes part in this call has come back from the one before.
      self._client.key_value_delete(f"{_PREFIX}/call/{self._calls - 1}/")
    return json.loads(self._wait(f"{folder}/all"))

  def _wait(self, key: str) -> str:
    """The value of a key when it has one. That takes as long as it takes: if somebody dies the watch ends this."""
    return self._client.blocking_key_value_get(key, _FOREVER_MS)

  def first_decides(self, decide: Callable[[], Any]) -> Any:
    self._calls += 1
    key = f"{_PREFIX}/call/{self._calls}/decision"
    if self.address.process_id == 0:
      try:
        decision = {"value": decide()}
      except ConfigError as error:
        decision = {"error": str(error)}
      self._client.key_value_set(key, json.dumps(decision))
    decision = json.loads(self._wait(key))
    if "error" in decision:
      raise ConfigError(decision["error"])
    return decision["value"]


def _describe_difference(values: Sequence[Mapping[str, str]]) -> str:
  """Names whose texts differ between processes, each with who has what."""
  differences = []
  for name in dict.fromkeys(name for of_process in values for name in of_process):
    texts: dict[str, list[int]] = {}
    for process, of_process in enumerate(values):
      texts.setdefault(of_process.get(name, "unknown"), []).append(process)
    if len(texts) > 1:
      parts = [f"{text} on process {', '.join(map(str, processes))}" for text, processes in texts.items()]
      differences.append(f"{name} is {' and '.join(parts)}")
  return "; ".join(differences)


_member: _Member | None = None
