"""Reads safetensors files lazily, one or several with an index.

Our own reader of a format of one page, because the numpy side of the `safetensors` package knows neither bfloat16 nor
single rows of a tensor: eight bytes with the length of a JSON header, the header, then raw little-endian numbers.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

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
  """The tensors of one file by name. Raises ConfigError if it is truncated or its header is corrupt."""
  size = path.stat().st_size
  length = int.from_bytes(read_bytes(path, 0, 8).tobytes(), "little")
  if length > min(_HEADER_LIMIT, size - 8):
    raise ConfigError(f"{path} is truncated or corrupt: its header would have {length} bytes")
  where = f"{path}: its header"
  try:
    text = read_bytes(path, 8, length).tobytes().decode()
  except UnicodeDecodeError as error:
    raise ConfigError(f"{where} is corrupt: {error.reason}") from error
  header = config_json.parse_strict_json(text, where)
  if not isinstance(header, dict):
    raise ConfigError(f"{where} is corrupt: it must be a JSON object")
  header.pop("__metadata__", None)
  start = 8 + length
  entries = {name: _parse_entry(entry, f"{path}: {name}") for name, entry in header.items()}
  _require_seamless(path, entries, size - start)
  return {name: _lazy(path, start + begin, shape, dtype) for name, (dtype, shape, begin, _) in entries.items()}


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


def _parse_entry(entry: Any, where: str) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """Dtype, shape, first byte and end of one tensor."""
  try:
    name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers_are_good = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
  except (TypeError, KeyError, ValueError) as error:
    raise ConfigError(f"{where} is corrupt: it needs dtype, shape and data_offsets") from error
  if name not in _DTYPES:
    raise ConfigError(f"{where} has dtype {name!r}; this program reads {', '.join(_DTYPES)}")
  if not numbers_are_good or end - begin != math.prod(shape) * _DTYPES[name].itemsize:
    raise ConfigError(f"{where} is corrupt: shape {list(shape)} of {name} in bytes {begin} to {end}")
  return _DTYPES[name], shape, begin, end


def _require_seamless(path: pathlib.Path, entries: dict[str, tuple], size: int) -> None:
  """Every byte belongs to one tensor: the format's rule, and what shows that a file is complete."""
  end_so_far = 0
  for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
    if begin != end_so_far:
      raise ConfigError(f"{path} is corrupt: {name} begins at byte {begin}, the tensor before ends at {end_so_far}")
    end_so_far = end
  if end_so_far != size:
    raise ConfigError(f"{path} is truncated or corrupt: {size} bytes of tensors, expected {end_so_far}")


def _lazy(path: pathlib.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> LazyTensor:
  row_bytes = math.prod(shape[1:]) * dtype.itemsize

  def read(start: int, stop: int) -> np.ndarray:
    raw = read_bytes(path, offset + start * row_bytes, (stop - start) * row_bytes)
    return raw.view(dtype).reshape((stop - start, *shape[1:]) if shape else ())

  return LazyTensor(shape, dtype, read)
