"""A saved model part on disk, read one weight at a time.

  part = open_part("wan/text", abstract_params, jnp.bfloat16)
  part.read("blocks/ffn/down/kernel", (slice(3, 4),))     one layer: 84 MB of 2 GB

UMT5-XXL is larger than the memory of many machines. So nothing here ever holds more than the weight that is asked for
and one slab of chunks. Orbax wrote the part; TensorStore, which orbax is built on, reads it. It converts values
chunk by chunk: a weight stored in float32 never exists whole in float32 when bfloat16 is wanted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Int, Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.io import config_json, limits, part_files, paths
from streamt1_jax.io.finite import is_finite, refuse

Box = tuple[slice, ...]

TREE_FILE = "_METADATA"
"""Orbax's description of the tree: names of the weights and how they are nested (seen in its version 0.12)."""
_OCDBT_MANIFEST = "manifest.ocdbt"
# Chunks that are read and converted at a time. Larger slabs read no faster, and memory peaks at a weight and two slabs.
_SLAB_BYTES = 16 << 20
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class StoredPart:
  """An open part whose files, names and shapes have been checked.

  Attributes:
    source: its folder.
    stores: per weight, the values converted to the dtype asked for.
    not_finite: names of the weights in which a NaN or Inf was read.
  """

  source: epath.Path
  stores: Mapping[str, ts.TensorStore]
  not_finite: set[str] = dataclasses.field(default_factory=set)

  def read(self, name: str, box: Box = ()) -> Shaped[np.ndarray, " ..."]:
    """One weight, or the part of it in `box`.

    Args:
      name: of the weight.
      box: a slice with step 1 for each leading axis; the axes that it does not name are read whole.

    Raises:
      ConfigError: the files cannot be read.
    """
    store = self.stores[name]
    with readable(self.source):
      if not store.rank:
        return self._noted(name, store.read().result())
      store = store[box][ts.d[:].translate_to[0]]
      values = aligned_empty(store.shape, store.dtype.numpy_dtype)
      for slab in _slabs(store):
        ts.array(values[slab]).write(store[slab][ts.d[0].translate_to[0]]).result()
        self._noted(name, values[slab])
    return values

  def read_rows(self, name: str, rows: Int[np.ndarray, " R"]) -> Shaped[np.ndarray, "R ..."]:
    """Rows `[len(rows), ...]` of one weight. Chunks that hold none of these rows are not read.

    Args:
      name: of the weight.
      rows: int `[R]`, ascending, along its first axis.

    Raises:
      ConfigError: the files cannot be read.
    """
    store = self.stores[name]
    values = np.empty((len(rows), *store.shape[1:]), store.dtype.numpy_dtype)
    with readable(self.source):
      for slab in _slabs(store):
        first, last = np.searchsorted(rows, (slab.start, slab.stop))
        if last > first:
          values[first:last] = self._noted(name, store[rows[first:last]].read().result())
    return values

  def require_finite(self) -> None:
    """Raises ConfigError, naming the weights, if a NaN or Inf was among what has been read."""
    refuse([name for name in self.stores if name in self.not_finite], str(self.source))

  def _noted(self, name: str, values: np.ndarray) -> np.ndarray:
    if not is_finite(values):
      self.not_finite.add(name)
    return values


def open_part(directory: epath.PathLike, abstract_params: Any, dtype: Any = None) -> StoredPart:
  """Checks a part and opens it.

  Args:
    directory: folder of the part, in either of orbax's layouts (one OCDBT database, or a folder for every weight).
    abstract_params: nested dict or `nnx.State` of arrays or `jax.ShapeDtypeStruct`s. None opens all that is stored.
    dtype: dtype in which floating weights are read. None gives each weight the dtype of its leaf in `abstract_params`.

  Raises:
    Damaged: the folder is missing or not a part; a file is missing, truncated or corrupt.
    ConfigError: the file system refuses; the stored weights differ from `abstract_params` in name, shape or kind.
  """
  source = epath.Path(directory)
  with readable(source):
    part_files.verify_files(source)
    kvstore = _kvstore(source)
    opened = {name: ts.open(_spec(kvstore, name), open=True, read=True) for name in _stored_names(source)}
    stores = {name: store.result() for name, store in opened.items()}
    for name, store in stores.items():
      limits.count_numbers(store.shape, f"{source}: {name}: shape")
    stored = {name: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype) for name, store in stores.items()}
    wanted = stored if abstract_params is None else named_leaves(abstract_params)
    _require_same_leaves(source, stored, wanted)
  return StoredPart(
    source, {name: _converted(stores[name], target_dtype(leaf.dtype, dtype)) for name, leaf in wanted.items()}
  )


def target_dtype(leaf_dtype: Any, dtype: Any) -> np.dtype:
  """`dtype`, if there is one and `leaf_dtype` is floating, else `leaf_dtype`."""
  return jnp.dtype(leaf_dtype if dtype is None or not jnp.issubdtype(leaf_dtype, jnp.floating) else dtype)


@contextlib.contextmanager
def readable(source: epath.Path) -> Iterator[None]:
  """Turns whatever goes wrong while the files of `source` are read into a ConfigError of one line."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:  # Orbax and TensorStore raise many types for one thing: unreadable files.
    raise ConfigError(f"{source} cannot be read: {part_files.first_line(error)}") from error


def named_leaves(params: Any) -> dict[str, Any]:
  """Leaves by "/"-joined path. The trailing `.value` of an nnx variable is not part of a name."""
  paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    jax.tree_util.keystr(
      tuple(key for key in path if not isinstance(key, jax.tree_util.GetAttrKey)), simple=True, separator="/"
    ): leaf
    for path, leaf in paths_and_leaves
  }


def _stored_names(source: epath.Path) -> list[str]:
  """Names of the weights, from the file in which orbax describes the tree.

  Orbax's own reader opens every weight, as we do afterwards. Where one is damaged, its threads print tracebacks.
  """
  tree = config_json.read_json(source / TREE_FILE, str(source / TREE_FILE))["tree_metadata"]
  limits.require_few(len(tree), f"{source / TREE_FILE}: tree_metadata")
  # What orbax does not restore are empty dicts.
  leaves = [entry["key_metadata"] for entry in tree.values() if not entry["value_metadata"]["skip_deserialize"]]
  return [limits.require_name("/".join(str(step["key"]) for step in path), str(source)) for path in leaves]


def _require_same_leaves(source: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  problems = [f"{name} is missing" for name in wanted if name not in stored]
  problems += [f"{name} is not in the model" for name in stored if name not in wanted]
  for name in (name for name in wanted if name in stored):
    found, expected = stored[name], wanted[name]
    if tuple(found.shape) != tuple(expected.shape):
      problems.append(f"{name} is {list(found.shape)}, the model has {list(expected.shape)}")
    elif jnp.issubdtype(found.dtype, jnp.floating) != jnp.issubdtype(expected.dtype, jnp.floating):
      problems.append(f"{name} is {found.dtype}, the model has {expected.dtype}")
  if problems:
    raise ConfigError(f"{source} does not fit the model: {part_files.list_some(problems, separator='; ')}")


def _kvstore(source: epath.Path) -> Any:
  """TensorStore's description of the folder: an OCDBT database, or plain files."""
  folder = f"{paths.absolute(source)}/"
  base = folder if paths.is_object_store(source) else {"driver": "file", "path": folder}
  return {"driver": "ocdbt", "base": base} if (source / _OCDBT_MANIFEST).is_file() else base


def _spec(kvstore: Any, name: str) -> dict[str, Any]:
  return {"driver": "zarr", "kvstore": kvstore, "path": f"{name.replace('/', '.')}/"}


def _converted(store: ts.TensorStore, dtype: Any) -> ts.TensorStore:
  return store if store.dtype == ts.dtype(dtype) else ts.cast(store, dtype)


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> Shaped[np.ndarray, " ..."]:
  """An array that JAX on the CPU takes over as it is. JAX copies an array of another alignment."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  offset = -memory.ctypes.data % _ALIGNMENT
  return memory[offset : offset + size].view(dtype).reshape(shape)


def _slabs(store: ts.TensorStore) -> Iterator[slice]:
  """Ranges of the first axis of about `_SLAB_BYTES` each, cut between chunks."""
  chunk = store.chunk_layout.read_chunk_template
  offset, chunk_rows = (chunk.origin[0], chunk.shape[0]) if chunk[0].finite else (0, 1)
  row_bytes = store.dtype.numpy_dtype.itemsize * math.prod(store.shape[1:])
  rows = max(1, _SLAB_BYTES // (row_bytes * chunk_rows)) * chunk_rows
  cuts = [0, *range(rows - -offset % chunk_rows, store.shape[0], rows)]
  for low, high in zip(cuts, [*cuts[1:], store.shape[0]]):
    yield slice(low, high)


def bounding_box(indices: Sequence[Box], shape: Sequence[int]) -> Box:
  """Smallest box that holds all of `indices`, each one slice per axis of an array of `shape`."""
  bounds = [[part.indices(size)[:2] for part, size in zip(index, shape)] for index in indices]
  return tuple(slice(min(low for low, _ in axis), max(high for _, high in axis)) for axis in zip(*bounds))
