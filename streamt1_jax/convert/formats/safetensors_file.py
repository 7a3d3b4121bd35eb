"""Reads safetensors files lazily, one or several with an index.

The library checks the header: every byte must belong to one tensor. The rows are read here, straight from the file. The
library's slices would keep the pages of the whole file in memory (backend "mmap"), or read the whole tensor for every
slice (backend "pread").
"""

from __future__ import annotations

import functools
import math
import pathlib

import ml_dtypes
import numpy as np
import safetensors

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats.lazy import LazyTensor, read_bytes
from streamt1_jax.io import config_json, part_files

INDEX_SUFFIX = ".safetensors.index.json"
_HEADER_LIMIT = 100 * 2**20  # The format's own limit.
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
  return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _HEADER_LIMIT


def load(path: pathlib.Path) -> dict[str, LazyTensor]:
  """The tensors of one file by name, in the order of the file.

  Raises:
    ConfigError: the file is truncated, its header is damaged, or a tensor has a dtype that this program does not read.
  """
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      views = {name: file.get_slice(name) for name in file.offset_keys()}
      dtypes = {name: view.get_dtype() for name, view in views.items()}
      shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
  except (safetensors.SafetensorError, OSError) as error:
    raise ConfigError(f"{path} is truncated or corrupt: {part_files.first_line(error)}") from error
  unread = [f"{name} of dtype {dtype}" for name, dtype in dtypes.items() if dtype not in _DTYPES]
  if unread:
    raise ConfigError(f"{path} holds {part_files.list_some(unread)}; this program reads {', '.join(_DTYPES)}")
  sizes = {name: math.prod(shape) * _DTYPES[dtypes[name]].itemsize for name, shape in shapes.items()}
  # The tensors follow one another without a gap, and the last one ends where the file ends.
  offset = path.stat().st_size - sum(sizes.values())
  tensors = {}
  for name, shape in shapes.items():
    dtype = _DTYPES[dtypes[name]]
    tensors[name] = LazyTensor(shape, dtype, functools.partial(_read_rows, path, offset, shape, dtype))
    offset += sizes[name]
  return tensors


def load_index(path: pathlib.Path) -> tuple[dict[str, LazyTensor], list[pathlib.Path]]:
  """The tensors of a sharded checkpoint, and its shards.

  Args:
    path: the index, a JSON object whose `weight_map` gives the file of every tensor.

  Raises:
    ConfigError: a shard is missing, truncated or corrupt, or holds other tensors than the index says.
  """
  weight_map = _read_weight_map(path)
  shards = [path.parent / name for name in sorted(set(weight_map.values()))]
  missing = [shard.name for shard in shards if not shard.is_file()]
  if missing:
    raise ConfigError(
      f"{path.parent} is incomplete: {part_files.list_some(missing)} of {len(shards)} files named by {path.name} "
      f"{'is' if len(missing) == 1 else 'are'} missing"
    )
  tensors: dict[str, LazyTensor] = {}
  for shard in shards:
    found = load(shard)
    expected = {name for name, file in weight_map.items() if file == shard.name}
    differing = sorted(expected.symmetric_difference(found))
    if differing:
      raise ConfigError(f"{shard} does not hold what {path.name} says: {part_files.list_some(differing)}")
    tensors |= found
  return {name: tensors[name] for name in weight_map}, shards


def _read_weight_map(path: pathlib.Path) -> dict[str, str]:
  try:
    index = config_json.parse_strict_json(path.read_text(), str(path))
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} cannot be read: {part_files.first_line(error)}") from error
  weight_map = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise ConfigError(f"{path} is no index of a sharded checkpoint: it has no weight_map")
  for file in weight_map.values():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise ConfigError(f"{path}: weight_map must name files beside it, got {file!r}")
  return weight_map


def _read_rows(
  path: pathlib.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
  row_bytes = math.prod(shape[1:]) * dtype.itemsize
  raw = read_bytes(path, offset + start * row_bytes, (stop - start) * row_bytes)
  return raw.view(dtype).reshape((stop - start, *shape[1:]) if shape else ())
