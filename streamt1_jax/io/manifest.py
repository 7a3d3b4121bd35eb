"""What a run was: versions, devices, peak memory, seconds per phase, compilations. It is written as strict JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic

CHECKSUM = "sha256_of_the_rest"
"""The field of a JSON object that holds the SHA-256 of its other fields, sorted by name and written without layout."""
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "streamt1_jax")


def write_json(path: epath.PathLike, data: Any, *, checksum: bool = False) -> None:
  """Writes `data` as strict JSON; a reader sees the old file or the new one, never half of one.

  Args:
    path: the file; its parent folders are made.
    data: nested mappings with string keys, lists, tuples, strings, numbers, bools, None, dataclasses, paths,
      numpy or jax arrays. NaN and infinities, which JSON cannot hold, become null.
    checksum: whether `data`, a mapping then, gets the field `CHECKSUM`, by which `is_whole` tells damage.

  Raises:
    ConfigError: `data` holds something else; nothing is written.
    OSError: the file system refuses; an earlier file stays.
  """
  plain = _plain(data, "data")
  if checksum:
    plain[CHECKSUM] = _sha256(plain)
  text = json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
  atomic.replace_bytes(path, text.encode())


def to_json_line(data: Any) -> str:
  """`data` as strict JSON on one line; see `write_json`."""
  return json.dumps(_plain(data, "data"), allow_nan=False, ensure_ascii=False)


def is_whole(document: Mapping[str, Any]) -> bool:
  """Whether the JSON object has a checksum, and that of its other fields."""
  return document.get(CHECKSUM) == _sha256({name: value for name, value in document.items() if name != CHECKSUM})


def _sha256(document: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {_key(name, where): _plain(item, f"{where}.{name}") for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
  if isinstance(value, (jax.Array, np.ndarray, np.generic)):
    return _plain(_array_to_list(np.asarray(value)), where)
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise ConfigError(f"{where} cannot be written as JSON: it is a {type(value).__name__}")


def _array_to_list(array: np.ndarray) -> Any:
  # Scalars of ml_dtypes (bfloat16) are no Python numbers. float64 holds every narrower float exactly.
  is_float = jax.numpy.issubdtype(array.dtype, np.floating)
  return (array.astype(np.float64) if is_float else array).tolist()


def _key(name: Any, where: str) -> str:
  if not isinstance(name, str):
    raise ConfigError(f"{where} cannot be written as JSON: its key {name!r} is not a string")
  return name


def environment() -> dict[str, Any]:
  """Versions and devices of this process.

  Returns:
    `versions` (name to version of the packages that decide the numbers), `platform` ("cpu", "gpu" or "tpu"),
    `device_kind`, `device_count` and `process_count` (of the whole run), `machine` (system and architecture).
  """
  versions = {"python": platform.python_version()}
  versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
  device = jax.devices()[0]
  return {
    "versions": versions,
    "platform": device.platform,
    "device_kind": device.device_kind,
    "device_count": jax.device_count(),
    "process_count": jax.process_count(),
    "machine": f"{platform.system()} {platform.machine()}",
  }


def peak_rss_bytes() -> int:
  """Largest resident memory this process has had, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes.


def peak_device_bytes() -> int | None:
  """Largest memory in use so far on one local device, in bytes. None if the backend keeps no count."""
  statistics = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [entry["peak_bytes_in_use"] for entry in statistics if "peak_bytes_in_use" in entry]
  return max(peaks, default=None)


class PhaseTimer:
  """Wall-clock seconds per named phase.

  JAX returns before the device is done, so a phase with device work must end with `jax.block_until_ready`.

  Attributes:
    seconds: phase to seconds, in the order in which phases were first entered. Entering one again adds to its seconds.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Times the body, also if it raises."""
    self.seconds.setdefault(name, 0.0)
    start = time.perf_counter()
    try:
      yield
    finally:
      self.seconds[name] += time.perf_counter() - start


class CompileCounter:
  """Counts the XLA programs that the process builds while this is open, also those of operations outside `jit`.

  A program from the persistent compilation cache counts as well, because this process did not have it yet.

    with CompileCounter() as compiles:
      first_chunk()
      before = compiles.count
      second_chunk()
      assert compiles.count == before

  Attributes:
    count: programs built so far.
    seconds: time spent building them.
  """

  def __init__(self):
    self.count = 0
    self.seconds = 0.0

  def __enter__(self) -> CompileCounter:
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *exception) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **unused) -> None:
    if event == COMPILE_EVENT:
      self.count += 1
      self.seconds += duration_secs
