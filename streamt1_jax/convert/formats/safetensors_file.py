"""Reads safetensors files lazily, one or several with an index.

The library checks the header: every byte must belong to one tensor. The rows are read here, straight from the file. The
library's slices would keep the pages of the whole file in memory (backend "mmap"), or read the whole tensor for every
slice (backend "pread").
"""

from __future__ import annotations

import functools
import math
import os
import pathlib

import ml_dtypes
import numpy as np
import safetensors

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats.lazy import LazyTensor, read_bytes
from streamt1_jax.io import config_json, limits, part_files
from streamt1_jax.messages import shortened

INDEX_SUFFIX = ".safetensors.index.json"
_FORMAT_HEADER_BYTES = 100 * 2**20  # The format's own limit.
_HEADER_BYTES = 16 * 2**20  # The header of a model of 825 tensors has 0.1 MB.
_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}


def is_safetensors(path: pathlib.Path) -> bool:
  """Whether the file begins as one: a length that fits into it, then a JSON object."""
  start = read_bytes(path, 0, min(9, path.stat().st_size)).tobytes()
  return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _FORMAT_HEADER_BYTES


def load(path: pathlib.Path) -> dict[str, LazyTensor]:
  """The tensors of one file by name, in the order of the file.

  Raises:
    ConfigError: the file is truncated, its header is damaged or claims more than `io.limits` allows, or a tensor has a
      dtype that this program does not read.
  """
  text = _read_header(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = file.offset_keys()
  except (safetensors.SafetensorError, OSError) as error:
    raise ConfigError(f"{path} is truncated or corrupt: {part_files.first_line(error)}") from error
  entries = _parse_header(text, path)
  unread = [f"{name} of dtype {dtype}" for name, (dtype, _) in entries.items() if dtype not in _DTYPES]
  if unread:
    raise ConfigError(f"{path} holds {part_files.list_some(unread)}; this program reads {', '.join(_DTYPES)}")
  shapes = {name: entries[name][1] for name in names}
  dtypes = {name: _DTYPES[entries[name][0]] for name in names}
  sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
  # The tensors follow one another without a gap, and the last one ends where the file ends.
  offset = path.stat().st_size - sum(sizes.values())
  tensors = {}
  for name, shape in shapes.items():
    tensors[name] = LazyTensor(shape, dtypes[name], functools.partial(_read_rows, path, offset, shape, dtypes[name]))
    offset += sizes[name]
  return tensors


def _read_header(path: pathlib.Path) -> bytes:
  """The header's text. Raises ConfigError if it is too long, or has brackets for more tensors than a model has."""
  size = path.stat().st_size
  length = int.from_bytes(read_bytes(path, 0, 8).tobytes(), "little")
  if length > _HEADER_BYTES:
    raise ConfigError(f"{path} has a header of {length} bytes; at most {_HEADER_BYTES} are read")
  text = read_bytes(path, 8, min(length, size - 8)).tobytes()
  # A tensor has an object and two lists. Counting is fast; parsing 300,000 entries is not.
  brackets = text.count(b"[") + text.count(b"{")
  if brackets > 3 * limits.MAX_TENSORS:
    raise ConfigError(f"{path} has a header of {brackets} lists and objects; at most {3 * limits.MAX_TENSORS} are read")
  return text


def _parse_header(text: bytes, path: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Dtype and shape of every tensor, where the library keeps the last of two entries of one name."""
  header = config_json.parse_strict_json(text, f"{path}: the header")
  entries = {}
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    where = f"{path}: {limits.require_name(name, str(path))}"
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
      raise ConfigError(f"{where} is corrupt: a tensor needs dtype, shape and data_offsets, got {shortened(entry)}")
    limits.count_numbers(entry["shape"], f"{where}: shape")
    entries[name] = entry["dtype"], tuple(entry["shape"])
  return entries


def load_index(path: pathlib.Path) -> tuple[dict[str, LazyTensor], list[pathlib.Path]]:
  """The tensors of a sharded checkpoint, and its shards.

  Args:
    path: the index, a JSON object whose `weight_map` gives the file of every tensor.

  Raises:
    ConfigError: a shard is missing, truncated or corrupt, or holds other tensors than the index says.
  """
  weight_map = _read_weight_map(path)
  names: dict[str, set[str]] = {}
  for name, file in weight_map.items():
    names.setdefault(file, set()).add(name)
  shards = [path.parent / file for file in sorted(names)]
  # `pathlib` raises where a name is too long for the file system.
  missing = [shard.name for shard in shards if not os.path.isfile(shard)]
  if missing:
    raise ConfigError(
      f"{path.parent} is incomplete: {part_files.list_some(missing)} of {len(shards)} files named by {path.name} "
      f"{'is' if len(missing) == 1 else 'are'} missing"
    )
  tensors: dict[str, LazyTensor] = {}
  for shard in shards:
    found = load(shard)
    differing = sorted(names[shard.name].symmetric_difference(found))
    if differing:
      raise ConfigError(f"{shard} does not hold what {path.name} says: {part_files.list_some(differing)}")
    tensors |= found
  return {name: tensors[name] for name in weight_map}, shards


def _read_weight_map(path: pathlib.Path) -> dict[str, str]:
  index = config_json.read_json(path, str(path))
  weight_map = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise ConfigError(f"{path} is no index of a sharded checkpoint: it has no weight_map")
  limits.require_few(len(weight_map), f"{path}: weight_map")
  for name, file in weight_map.items():
    limits.require_name(name, f"{path}: weight_map")
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise ConfigError(f"{path}: weight_map must name files beside it, got {shortened(file)}")
  return weight_map


def _read_rows(
  path: pathlib.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
  row_bytes = math.prod(shape[1:]) * dtype.itemsize
  raw = read_bytes(path, offset + start * row_bytes, (stop - start) * row_bytes)
  return raw.view(dtype).reshape((stop - start, *shape[1:]) if shape else ())
