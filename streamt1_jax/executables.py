"""Compiled chunk steps that outlive their process: a preempted machine starts without tracing or compiling them.

  folder/tiny-first-0123456789abcdef.step     what the executable was made for, as a line of JSON, then the executable

A file is used only if everything agrees: the program (model, search, rewards, execution, shapes and shardings of all
arguments) and what compiled it (versions, this package's source, devices, flags of the compiler). Otherwise it is
refused with the reason, the step is compiled, and the new one takes its place: whoever lost a machine wants the search
to go on, and an executable is nothing that cannot be made again.

Loading an executable runs it: use folders that only you can write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig
from streamt1_jax.generator import Models
from streamt1_jax.io import atomic, part_files
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.typing import Params

_SUFFIX = ".step"
_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "streamt1_jax")
_COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_COMPILER_SETTINGS = (
  "jax_default_matmul_precision",
  "jax_disable_most_optimizations",
  "jax_enable_x64",
  "jax_numpy_rank_promotion",
  "jax_threefry_partitionable",
)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSteps:
  """A `drivers.CompiledStep` that keeps what it compiles in a folder.

  Attributes:
    folder: where; it must exist.
    report: told, in one line, why a step is compiled and not loaded.
  """

  folder: epath.Path
  report: Callable[[str], None]
  _ready: dict[Any, jax.stages.Compiled] = dataclasses.field(default_factory=dict)

  def __call__(
    self,
    params: Params,
    state: SearchState,
    condition: Condition,
    models: Models,
    search: SearchConfig,
    *,
    first: bool,
    record: bool = False,
  ) -> tuple[SearchState, ChunkTrace]:
    arguments = params, state, condition
    key = models, search, first, record, tuple(x.shape for x in jax.tree.leaves(arguments))
    if key not in self._ready:
      lower = functools.partial(drivers.jitted_chunk_step.lower, *arguments, models, search, first=first, record=record)
      self._ready[key] = self._load_or_compile(lower, arguments, models, search, first, record)
    return self._ready[key](*arguments)

  def _load_or_compile(self, lower, arguments, models: Models, search: SearchConfig, first: bool, record: bool):
    program = program_identity(models, search, first=first, record=record) | {"arguments": _shapes(arguments)}
    # As a file gives it back: lists for tuples.
    identity = json.loads(json.dumps({"compiler": compiler_identity(), "program": program}))
    path = self.folder / f"{_stem(models, first)}-{_digest(identity['program'])[:16]}{_SUFFIX}"
    try:
      return _load(path, identity, models.execution.mesh)
    except FileNotFoundError:
      self.report(
        f"{self.folder} has no {path.name}: {self._nearest(identity, models, first)}; it is compiled and kept"
      )
    except _Refused as refusal:
      self.report(f"{path} is not used: {refusal}; the step is compiled and replaces it")
    compiled = lower().compile()
    try:
      _save(path, identity, compiled)
    except Exception as error:
      # A full disk, an object store's own errors, or a runtime that cannot: CPUs write no program that has run. The
      # search goes on all the same.
      self.report(f"{path} is not kept: {part_files.first_line(error)}")
    return compiled

  def _nearest(self, identity: Mapping[str, Any], models: Models, first: bool) -> str:
    """What tells the step that is needed from the most similar one that is there."""
    reasons = []
    # One that cannot be read is none.
    with contextlib.suppress(Exception):
      for path in self.folder.glob(f"{_stem(models, first)}-*{_SUFFIX}"):
        with contextlib.suppress(Exception):
          reasons.append(list(_differences(_read_identity(path), identity)))
    if not reasons:
      return "there is none of this model on so many devices"
    return f"the nearest one differs, {_text(min(reasons, key=len))}"


class _Refused(Exception):
  """An executable that is not the one that is needed; the message is the reason."""


def compiler_identity() -> dict[str, Any]:
  """What decides how a program is compiled, besides the program itself; JSON values."""
  device = jax.devices()[0]
  return {
    "versions": {name: version(name) for name in _PACKAGES},
    "source": source_digest(),
    "platform": {"name": device.platform, "version": device.client.platform_version},
    "device_kind": device.device_kind,
    "devices": jax.device_count(),
    "process": [jax.process_index(), jax.process_count()],
    "host": _processor() if device.platform == "cpu" else None,
    "environment": {name: os.environ.get(name, "") for name in _COMPILER_VARIABLES},
    "settings": {name: jax.config.values[name] for name in _COMPILER_SETTINGS},
  }


def program_identity(models: Models, search: SearchConfig, *, first: bool, record: bool) -> dict[str, Any]:
  """A chunk step without its arguments; JSON values."""
  static = {field.name: _plain(getattr(models, field.name)) for field in dataclasses.fields(models)}
  return static | {"search": _plain(search), "first": first, "record": record}


def _plain(value: Any) -> Any:
  if isinstance(value, Mesh):
    return {"axes": dict(value.shape), "devices": [device.id for device in value.devices.flat]}
  if dataclasses.is_dataclass(value):
    fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"type": type(value).__name__} | fields
  if isinstance(value, (tuple, list)):
    return [_plain(item) for item in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  # Graph definitions and functions follow from the configuration and the source.
  return type(value).__name__


def _shapes(arguments: Any) -> dict[str, str]:
  describe = lambda x: f"{x.dtype}{list(x.shape)} {_layout(x.sharding)}"
  leaves, _ = jax.tree_util.tree_flatten_with_path(arguments)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf) for path, leaf in leaves}


def _layout(sharding: jax.sharding.Sharding) -> str:
  """Axes of the mesh per axis of the array. A state that was saved and restored says the same in other words."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return "whole"
  axes = [(axis,) if isinstance(axis, str) else axis or () for axis in sharding.spec]
  divided = ["+".join(name for name in names if sharding.mesh.shape[name] > 1) for names in axes]
  return ",".join(divided).rstrip(",") or "whole"


def _stem(models: Models, first: bool) -> str:
  mesh = models.execution.mesh
  sizes = "x".join(str(size) for size in mesh.shape.values()) if mesh else "1"
  process = f"-process{jax.process_index()}" if jax.process_count() > 1 else ""
  return f"{models.generator.config.name}-{sizes}-{'first' if first else 'later'}{process}"


def _digest(identity: Any) -> str:
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def version(package: str) -> str | None:
  """Of an installed package; None if it is not."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


@functools.cache
def source_digest() -> str:
  """SHA-256 of this package's Python files: between releases its version stays the same."""
  root = pathlib.Path(__file__).parent
  files = sorted(root.rglob("*.py"))
  return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


@functools.cache
def _processor() -> str:
  """Features of this processor: code for a newer one would end with an illegal instruction."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return os.uname().machine
  features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  return hashlib.sha256(features.encode()).hexdigest()


def _save(path: epath.Path, identity: Mapping[str, Any], compiled: jax.stages.Compiled) -> None:
  payload = pickle.dumps(serialize_executable.serialize(compiled))
  header = {"sha256": hashlib.sha256(payload).hexdigest(), "identity": identity}
  atomic.replace_bytes(path, json.dumps(header).encode() + b"\n" + payload)


def _read_identity(path: epath.Path) -> dict[str, Any]:
  """What an executable was made for, which is not read itself: neighbours are many and large."""
  with path.open("rb") as file:
    return json.loads(file.readline())["identity"]


def _read(path: epath.Path) -> tuple[dict[str, Any], bytes]:
  """Identity and executable in a file. Raises _Refused, or FileNotFoundError if there is none."""
  try:
    header, _, payload = path.read_bytes().partition(b"\n")
  except FileNotFoundError:
    raise
  except Exception as error:  # Another user's file, or an object store's own errors.
    raise _Refused(f"it cannot be read: {part_files.first_line(error)}") from error
  try:
    header = json.loads(header)
    if header["sha256"] == hashlib.sha256(payload).hexdigest():
      return header["identity"], payload
  except (ValueError, KeyError, TypeError):
    pass
  raise _Refused("it is damaged")


def _load(path: epath.Path, identity: Mapping[str, Any], mesh: Mesh | None) -> jax.stages.Compiled:
  """Raises as `_read`."""
  found, payload = _read(path)
  differences = list(_differences(found, identity))
  if differences:
    raise _Refused(_text(differences))
  devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
  try:
    return serialize_executable.deserialize_and_load(*pickle.loads(payload), execution_devices=devices)
  except Exception as error:  # The runtime's own errors, of many types.
    raise _Refused(f"the runtime refuses it: {part_files.first_line(error)}") from error


def _differences(found: Any, needed: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
  """Places where two trees of JSON values differ."""
  if isinstance(found, dict) and isinstance(needed, dict):
    for name in found | needed:
      yield from _differences(found.get(name), needed.get(name), f"{where}.{name}" if where else name)
  elif found != needed:
    yield where, found, needed


def _text(differences: list[tuple[str, Any, Any]]) -> str:
  where, found, needed = differences[0]
  more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
  return f"{where} was {found} and is {needed}{more}"
