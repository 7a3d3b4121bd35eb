"""Writes a model part piece by piece, so that a part larger than memory can be made.

  backbone/
    blocks.ffn_in.kernel/0.0.0, 1.0.0, ...   one parameter: a zarr array of raw little-endian values
    _METADATA                                the tree, as orbax describes it
    part.json                                size and SHA-256 of every file

The part is an orbax PyTree item, so `checkpoint.load_params` reads it like any other. Two choices differ from what
`checkpoint.save_params` writes, because these parts have gigabytes. There is no OCDBT database, which every piece would
rewrite, and no compression, which makes weights no smaller and reading slower. A parameter of more than `CHUNK_BYTES`
is cut along its leading axis. That axis counts the layers of a stacked parameter, so layers are written and read alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files
from streamt1_jax.io.finite import is_finite
from streamt1_jax.io.stored_part import TREE_FILE

CHUNK_BYTES = 64 * 2**20
"""A parameter of more bytes is stored in several files."""

_DICT_KEY = 2  # Orbax's number for a step of a path that is a key of a dict.


class Piece(NamedTuple):
  """Consecutive rows of one parameter.

  Attributes:
    name: "/"-joined path of the parameter.
    rows: `[n, ...]`, the next n along its leading axis, in any dtype that casts to the stored one. A parameter without
      axes comes as one piece without axes.
  """

  name: str
  rows: Shaped[np.ndarray, " ..."] | np.generic


def write_part(
  directory: epath.PathLike,
  leaves: Mapping[str, Any],
  pieces: Iterable[Piece],
  extra_files: Mapping[str, bytes] | None = None,
) -> None:
  """Writes one part, in one process. Its folder appears whole or not at all.

  Memory holds one piece, and one chunk of every parameter that is begun and not complete.

  Args:
    directory: folder of the part, such as `wan/backbone`; it must not exist. Its parents are made.
    leaves: "/"-joined path to anything with `shape` and `dtype`: what is stored.
    pieces: every row of every leaf once. The rows of a leaf are in ascending order; the leaves may take turns.
    extra_files: further files of the folder, name to content.

  Raises:
    ConfigError: `directory` exists; rows are missing, too many or misshapen; a weight is not finite, or too large
      for the stored dtype; the file system refuses. Nothing is left behind.
  """
  target = epath.Path(directory)
  if target.exists():
    raise ConfigError(f"{target} exists; it will not be replaced")
  staging = target.parent / f".{target.name}.partial"
  try:
    staging.rmtree(missing_ok=True)
    staging.mkdir(parents=True)
    _write_leaves(staging, leaves, pieces)
    (staging / TREE_FILE).write_text(json.dumps(_orbax_metadata(leaves)))
    for name, content in (extra_files or {}).items():
      (staging / name).write_bytes(content)
    part_files.write_part_file(staging, leaves)
    staging.rename(target)
  except ConfigError:
    raise
  except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError.
    raise ConfigError(f"cannot write {target}: {part_files.first_line(error)}") from error
  finally:
    staging.rmtree(missing_ok=True)


def chunk_rows(shape: tuple[int, ...], dtype: Any) -> int:
  """Rows of the leading axis that are stored in one file: all of them up to `CHUNK_BYTES`, else as many as fit.

  Zarr stores the last chunk at full size, so all files get the same number. If 14 of 30 layers fit, there are 3 files
  of 10.
  """
  row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
  most = max(1, CHUNK_BYTES // row_bytes)
  return -(-shape[0] // -(-shape[0] // most))


def _write_leaves(folder: epath.Path, leaves: Mapping[str, Any], pieces: Iterable[Piece]) -> None:
  begun: dict[str, _LeafWriter] = {}
  complete = set()
  for name, rows in pieces:
    if name not in leaves or name in complete:
      raise ConfigError(f"{folder}: {name} {'has too many rows' if name in complete else 'is not a parameter'}")
    if name not in begun:
      begun[name] = _LeafWriter(folder, name, leaves[name])
    if begun[name].append(rows):
      complete.add(name)
      del begun[name]
  lacking = [name for name in leaves if name not in complete]
  if lacking:
    raise ConfigError(f"{folder}: rows are missing of {part_files.list_some(lacking)}")


class _LeafWriter:
  """One parameter that is being written. It collects rows until a chunk is full."""

  def __init__(self, folder: epath.Path, name: str, leaf: Any):
    self._name, self._shape, self._dtype = name, tuple(leaf.shape), np.dtype(leaf.dtype)
    rows = self._shape or (1,)
    self._chunk = np.empty((chunk_rows(rows, self._dtype), *rows[1:]), self._dtype)
    self._array = _create(folder / name.replace("/", "."), self._shape, self._dtype, self._chunk.shape)
    self._filled, self._written = 0, 0

  def append(self, rows: np.ndarray | np.generic) -> bool:
    """Takes the next rows. Returns whether the parameter is complete."""
    rows = np.asarray(rows) if self._shape else np.asarray(rows)[None]
    total = self._shape[0] if self._shape else 1
    if rows.shape[1:] != self._chunk.shape[1:] or self._written + self._filled + len(rows) > total:
      raise ConfigError(f"{self._name}: a piece {list(rows.shape)} does not fit into {list(self._shape)}")
    while len(rows):
      space = len(self._chunk) - self._filled
      self._fill(rows[:space])
      rows = rows[space:]
      if self._filled == min(len(self._chunk), total - self._written):
        self._flush()
    return self._written == total

  def _fill(self, rows: np.ndarray) -> None:
    place = self._chunk[self._filled : self._filled + len(rows)]
    with np.errstate(over="ignore"):  # Overflow becomes Inf, and Inf is reported.
      place[...] = rows
    if not is_finite(place):
      reason = "NaN or Inf" if not is_finite(rows) else f"too large for {self._dtype}"
      raise ConfigError(f"the weights hold a value that is {reason}: {self._name}")
    self._filled += len(rows)

  def _flush(self) -> None:
    values = self._chunk[: self._filled]
    if not self._shape:
      _finished(self._array.write(values[0]))
    else:
      _finished(self._array[self._written : self._written + self._filled].write(values))
    self._written, self._filled = self._written + self._filled, 0


def _create(path: epath.Path, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]) -> ts.TensorStore:
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": f"{path.resolve()}/"},
    "metadata": {"chunks": list(chunks[: len(shape)]), "compressor": None, "order": "C", "dimension_separator": "."},
    "store_data_equal_to_fill_value": True,  # Otherwise a parameter of zeros would have no file.
  }
  return _finished(ts.open(spec, create=True, dtype=ts.dtype(dtype), shape=shape))


def _finished(future: ts.Future | ts.WriteFutures) -> Any:
  """What a future of TensorStore gives. Where a signal ends the wait, its work on files still ends first.

  It would make a folder anew that was removed in the meantime.
  """
  try:
    return future.result()
  except KeyboardInterrupt:
    while not future.done():
      time.sleep(0.001)
    raise


def _orbax_metadata(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """What orbax writes beside the arrays of a nested dict (seen in its version 0.12)."""
  return {
    "tree_metadata": {
      str(tuple(name.split("/"))): {
        "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in name.split("/")],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
      }
      for name in leaves
    },
    "use_ocdbt": False,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }
