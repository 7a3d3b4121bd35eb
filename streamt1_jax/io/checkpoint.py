"""Model checkpoints: one folder per model, one orbax item per part.

  tiny/
    config.json        format version, the whole ModelConfig, size and dtype of every part, provenance
    tokenizer.model    sentencepiece model of the text encoder; or tokenizer.json, a file of the tokenizers library
    backbone/          one part: an orbax checkpoint, and part.json with size and SHA-256 of its files
    codec/
    text/

Orbax stores no checksums of values, so a flipped byte would load as a wrong weight. Therefore every file is checked
against part.json before any of them is opened.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.io import atomic, config_json, manifest, part_files, paths, stored_part
from streamt1_jax.io.finite import is_finite, refuse
from streamt1_jax.io.quiet import quiet_orbax
from streamt1_jax.io.stored_part import named_leaves, target_dtype
from streamt1_jax.messages import shortened
from streamt1_jax.nn.quantised import QuantisedKernel, is_quantised, quantise

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.json")
"""A checkpoint has one of them, and its name tells what reads it."""
_CHUNK_BYTES = 16 << 20
_COMMIT_MARKER = "commit_success.txt"


def tokenizer_file(folder: epath.PathLike) -> epath.Path:
  """The tokenizer of a checkpoint; without one, the place of `tokenizer.model`.

  Raises ConfigError if there are two, which might differ.
  """
  found = [path for path in (epath.Path(folder) / name for name in TOKENIZER_FILES) if path.exists()]
  if len(found) > 1:
    raise ConfigError(f"{folder} has both {' and '.join(TOKENIZER_FILES)}; remove one")
  return found[0] if found else epath.Path(folder) / TOKENIZER_FILE


@dataclasses.dataclass(frozen=True)
class PartInfo:
  """What `config.json` says about one part.

  Attributes:
    parameters: number of weights.
    dtype: dtype of the stored weights; several names joined by "+" where they differ.
  """

  parameters: int
  dtype: str


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
  """The contents of `config.json`.

  Attributes:
    model: the model's configuration.
    parts: per part (name of its folder) its size and dtype.
    provenance: where the weights came from; any JSON object.
  """

  model: ModelConfig
  parts: dict[str, PartInfo]
  provenance: dict[str, Any]


def save_params(
  directory: epath.PathLike, params: Any, *, dtype: Any = None, files: Mapping[str, bytes] | None = None
) -> None:
  """Writes one part of a model, in the place of an earlier version. If it fails, the earlier version stays.

  With several processes all of them must call this, on a file system they share.

  Args:
    directory: folder of the part, such as `tiny/backbone`; its parents are made.
    params: nested dict of arrays, or an `nnx.State`.
    dtype: dtype in which floating weights are stored; None keeps each as it is.
    files: further files of the folder, name to content.

  Raises:
    ConfigError: `directory` holds something else than a part; a weight is empty or not finite (or too large
      for `dtype`); the file system refuses.
  """
  target = epath.Path(directory)
  _require_replaceable(target)
  leaves = {name: _to_storage(leaf, dtype) for name, leaf in named_leaves(params).items()}
  empty = [name for name, leaf in leaves.items() if leaf.size == 0]
  if not leaves or empty:
    what = f"{part_files.list_some(empty)} has size 0" if empty else "there are no weights"
    raise ConfigError(f"cannot save {target}: {what}")
  check_finite(leaves, f"the weights for {target}")
  staging = target.parent / f".{target.name}.partial"
  try:
    _write_part(target, staging, leaves, files or {})
  except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError.
    raise ConfigError(f"cannot write {target}: {part_files.first_line(error)}") from error
  finally:
    _on_first_process(lambda: staging.rmtree(missing_ok=True))


def load_params(
  directory: epath.PathLike, abstract_params: Any, dtype: Any = None, on_host: Collection[str] = ()
) -> Any:
  """Reads one part of a model.

  Args:
    directory: folder of the part.
    abstract_params: nested dict or `nnx.State` of arrays or `jax.ShapeDtypeStruct`s. A leaf with a sharding
      is restored to it, and each process reads its own shards. One without becomes an uncommitted array on the
      default device. Where it has a `QuantisedKernel`, a plain kernel is stored, and is quantised as it is read.
    dtype: dtype of the floating leaves returned. None gives each the dtype of its abstract leaf.
    on_host: names of weights that stay in host memory, as numpy arrays.

  Returns:
    A tree of jax arrays with exactly the structure of `abstract_params`.

  Raises:
    ConfigError: the folder is missing or not a part; a file is missing, truncated or corrupt; the stored
      leaves differ from `abstract_params` in name, shape or kind; a weight that this process reads is not finite.
  """
  part, params = _load(directory, abstract_params, dtype, on_host)
  part.require_finite()
  return params


def load_arrays(directory: epath.PathLike, abstract_arrays: Any) -> Any:
  """As `load_params`, for arrays that may hold NaN or Inf."""
  return _load(directory, abstract_arrays, None, ())[1]


def _load(
  directory: epath.PathLike, abstract_arrays: Any, dtype: Any, on_host: Collection[str]
) -> tuple[stored_part.StoredPart, Any]:
  wanted, structure = jax.tree.flatten(abstract_arrays, is_leaf=is_quantised)
  stored = jax.tree.unflatten(structure, [_as_stored(leaf) for leaf in wanted])
  part = stored_part.open_part(epath.Path(directory), stored, dtype)
  place = lambda name, leaf: part.read(name) if name in on_host else _place(part, name, leaf)
  arrays = [place(name, leaf) for name, leaf in zip(named_leaves(stored), wanted, strict=True)]
  return part, jax.tree.unflatten(structure, arrays)


def check_finite(params: Any, source: str) -> None:
  """Raises ConfigError, naming `source` and the leaves, if what this process holds of `params` has a NaN or Inf."""
  finite = lambda leaf: all(is_finite(np.asarray(piece)) for piece in _held_here(leaf))
  refuse([name for name, leaf in named_leaves(params).items() if not finite(leaf)], source)


def model_config_to_dict(model: ModelConfig) -> dict[str, Any]:
  """`model` as JSON values, with every field that has its default."""
  return config_json.to_json_value(model)


def model_config_from_dict(data: Any, where: str = "model") -> ModelConfig:
  """The inverse of `model_config_to_dict`. Raises ConfigError, naming the field, if something does not fit."""
  return config_json.from_json_value(ModelConfig, data, where)


def save_config(directory: epath.PathLike, model: ModelConfig, provenance: Mapping[str, Any] | None = None) -> None:
  """Writes `config.json`. Call it after `save_params`, because it lists the parts that are in `directory`.

  Args:
    directory: folder of the model; made if missing.
    model: the model's configuration.
    provenance: where the weights came from; anything `manifest.write_json` takes.

  Raises:
    ConfigError: a part's `part.json` is corrupt, `provenance` is not JSON, the file system refuses.
  """
  folder = epath.Path(directory)
  try:
    parts = {path.name: part_files.read_part_file(path) for path in _part_folders(folder)}
    document = {
      "format_version": part_files.FORMAT_VERSION,
      "preset": model.name,
      "model": model_config_to_dict(model),
      "parts": {name: {"parameters": part["parameters"], "dtype": part["dtype"]} for name, part in parts.items()},
      "provenance": dict(provenance or {}),
    }
    _on_first_process(lambda: manifest.write_json(folder / CONFIG_FILE, document))
  except OSError as error:
    raise ConfigError(f"cannot write {folder / CONFIG_FILE}: {part_files.first_line(error)}") from error


def load_info(directory: epath.PathLike) -> CheckpointInfo:
  """Everything in `config.json`. Raises ConfigError, naming the field, if one is missing or wrong."""
  path = epath.Path(directory) / CONFIG_FILE
  document = part_files.read_json_object(epath.Path(directory), CONFIG_FILE, "a model checkpoint")
  fields = ("format_version", "preset", "model", "parts", "provenance")
  part_files.require_version(document, path)
  if set(document) != set(fields):
    raise ConfigError(f"{path} must have exactly the fields {', '.join(fields)}; got {', '.join(document)}")
  for field in ("parts", "provenance"):
    if not isinstance(document[field], dict):
      raise ConfigError(f"{path}: {field} must be an object")
  model = model_config_from_dict(document["model"], f"{path}: model")
  if document["preset"] != model.name:
    raise ConfigError(f"{path}: preset is {shortened(document['preset'])} but model.name is {shortened(model.name)}")
  parts = {
    name: config_json.from_json_value(PartInfo, part, f"{path}: parts.{name}")
    for name, part in document["parts"].items()
  }
  return CheckpointInfo(model, parts, document["provenance"])


def load_config(directory: epath.PathLike) -> ModelConfig:
  """The model's configuration from `config.json`. Raises ConfigError as `load_info` does."""
  return load_info(directory).model


def parts_sha256(directory: epath.PathLike, further: Sequence[str] = ()) -> str:
  """Identifies a model wherever its folder is: checksum of config, tokenizer and the parts' own checksums.

  Args:
    directory: the checkpoint.
    further: parts of its folder that are used, beside backbone, codec and text encoder.
  """
  folder = epath.Path(directory)
  parts = ("backbone", "codec", "text", *further)
  names = [CONFIG_FILE, tokenizer_file(folder).name, *(f"{part}/{part_files.PART_FILE}" for part in parts)]
  return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves by path as the nested dict that orbax stores. Indices of lists become string keys."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _held_here(leaf: Any) -> list[Any]:
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return [shard.data for shard in leaf.addressable_shards]
  return [leaf]


def _to_storage(leaf: Any, dtype: Any) -> Any:
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return leaf.astype(target_dtype(leaf.dtype, dtype))
  # Copies on the host keep device names out of the checkpoint. Overflow becomes Inf, and check_finite reports it.
  array = np.asarray(leaf)
  with np.errstate(over="ignore"):
    return array.astype(target_dtype(array.dtype, dtype))


def _write_part(target: epath.Path, staging: epath.Path, leaves: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
  _on_first_process(lambda: _make_empty(staging))
  # Chunks are whole layers, so that reading a few layers needs no memory for the others.
  chunked = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,))
  save_args = nested({name: chunked if leaf.ndim else ocp.SaveArgs() for name, leaf in leaves.items()})
  with quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(
      paths.absolute(staging / target.name), args=ocp.args.PyTreeSave(nested(leaves), save_args=save_args)
    )

  def publish():
    written = staging / target.name
    marker = written / _COMMIT_MARKER
    if marker.exists():
      marker.write_text("committed\n")  # Orbax writes a path of this machine into it. Only its presence counts.
    for name, content in files.items():
      (written / name).write_bytes(content)
    part_files.write_part_file(written, leaves)
    atomic.replace_folder(target, written, part_files.PART_FILE)

  _on_first_process(publish)


def _place(part: stored_part.StoredPart, name: str, leaf: Any) -> jax.Array | QuantisedKernel:
  """One weight on its devices. Host memory holds what this process needs of it, until the devices have it."""
  sharding, shape = getattr(leaf, "sharding", None), part.stores[name].shape
  if is_quantised(leaf):
    array = _place_quantised(part, name, leaf)
  elif sharding is None:
    array = jax.device_put(part.read(name))
  else:
    # Everything that the local devices need is read once. A read for each would decode the same chunks again.
    box = stored_part.bounding_box(list(sharding.addressable_devices_indices_map(shape).values()), shape)
    values = part.read(name, box)
    array = jax.make_array_from_callback(shape, sharding, lambda index: values[_inside(index or (), box, shape)])
    del values
  jax.block_until_ready(array)
  # JAX drops its references to host memory at a collection. Without one, two weights would be in memory.
  gc.collect(0)
  return array


def _as_stored(leaf: Any) -> Any:
  return jax.ShapeDtypeStruct(leaf.values.shape, jnp.float32) if is_quantised(leaf) else leaf


def _place_quantised(part: stored_part.StoredPart, name: str, leaf: QuantisedKernel) -> QuantisedKernel:
  """A kernel, or a stack of kernels, on its devices. Host memory holds all of it in int8, and one as it is stored."""
  shape = leaf.values.shape
  values = stored_part.aligned_empty(shape, np.dtype(np.int8))
  scale = np.empty(leaf.scale.shape, np.float32)
  for index in np.ndindex(shape[:-2]):
    kernel = part.read(name, tuple(slice(i, i + 1) for i in index)).reshape(shape[-2:])
    one = quantise(kernel)
    values[index], scale[index] = one.values, one.scale

  def put(array: np.ndarray, wanted: Any) -> jax.Array:
    sharding = getattr(wanted, "sharding", None)
    if sharding is None:
      return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return QuantisedKernel(put(values, leaf.values), put(scale, leaf.scale))


def _inside(index: stored_part.Box, box: stored_part.Box, shape: tuple[int, ...]) -> stored_part.Box:
  """`index`, a part of an array of `shape`, as a part of what `box` holds of that array."""
  pieces = (piece.indices(size) for piece, size in zip(index, shape))
  return tuple(slice(low - axis.start, high - axis.start) for (low, high, _), axis in zip(pieces, box))


def _require_replaceable(target: epath.Path) -> None:
  if not target.exists() or (target / part_files.PART_FILE).is_file():
    return
  if not target.is_dir() or any(target.iterdir()):
    raise ConfigError(f"{target} exists and is not a saved model part; it will not be replaced")


def _part_folders(folder: epath.Path) -> list[epath.Path]:
  if not folder.is_dir():
    return []
  return sorted(
    path for path in folder.iterdir() if not path.name.startswith(".") and (path / part_files.PART_FILE).is_file()
  )


def _make_empty(folder: epath.Path) -> None:
  folder.rmtree(missing_ok=True)
  folder.mkdir(parents=True)


def _on_first_process(action) -> None:
  """Runs `action` on process 0 while the others wait for it."""
  if jax.process_index() == 0:
    action()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("streamt1_jax.io.checkpoint")
