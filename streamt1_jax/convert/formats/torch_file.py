"""Reads the files of `torch.save` without PyTorch and without executing them.

  archive/data.pkl      the objects, as a pickle; a tensor is a view (offset, shape, strides) of a storage
  archive/data/0, 1 ..  the storages: raw little-endian numbers, never compressed

Only the table of contents and data.pkl are read at first. A storage is compared with its checksum when the first of its
tensors is read. Source: docs/reference/checkpoints.md.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import pathlib
import struct
import zipfile
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats import safe_pickle
from streamt1_jax.convert.formats.lazy import LazyTensor, read_bytes
from streamt1_jax.io import limits
from streamt1_jax.messages import shortened

MAGIC = b"PK\x03\x04"
_PICKLE_LIMIT = 16 * 2**20  # The data.pkl of a model of 825 tensors has 0.1 MB; with an optimizer's state, 0.4 MB.
_TABLE_LIMIT = 8 * 2**20  # Bytes of the table of contents. A storage takes about 80 of them.
_BLOCK_BYTES = 16 * 2**20
_ENCRYPTED = 0x1
_STORAGE_DTYPES = {
  "torch.DoubleStorage": np.dtype(np.float64),
  "torch.FloatStorage": np.dtype(np.float32),
  "torch.HalfStorage": np.dtype(np.float16),
  "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch.LongStorage": np.dtype(np.int64),
  "torch.IntStorage": np.dtype(np.int32),
  "torch.ShortStorage": np.dtype(np.int16),
  "torch.CharStorage": np.dtype(np.int8),
  "torch.ByteStorage": np.dtype(np.uint8),
  "torch.BoolStorage": np.dtype(np.bool_),
}


def load(path: pathlib.Path) -> Any:
  """The object in a file of `torch.save`: plain containers, with `LazyTensor`s for tensors and parameters.

  Raises:
    ConfigError: the file is not such a zip file, is truncated or corrupt, holds compressed or overlapping members, or
      its pickle refers to anything but tensors and plain containers. The pickle is not executed.
  """
  members = _read_members(path)
  pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ConfigError(f"{path} is a zip file without a data.pkl, not a file of torch.save")
  root = pickles[0].removesuffix("data.pkl")
  order = members.get(f"{root}byteorder")
  if order is not None and order.content() != b"little":
    raise ConfigError(f"{path} holds big-endian numbers; save it on a little-endian machine")
  if members[pickles[0]].size > _PICKLE_LIMIT:
    raise ConfigError(f"{path}: data.pkl has {members[pickles[0]].size} bytes, at most {_PICKLE_LIMIT} are read")
  storages = _Storages(members, root)
  names = {
    # PyTorch fills it afterwards. With arguments it would copy them.
    "collections.OrderedDict": lambda: collections.OrderedDict(),
    "torch.Size": lambda sizes: limits.require_numbers(sizes, f"{path}: data.pkl: a size"),
    "torch._utils._rebuild_tensor_v2": functools.partial(_view, path),
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
  }
  names |= dict.fromkeys(_STORAGE_DTYPES)
  return safe_pickle.loads(members[pickles[0]].content(), names, storages.load, f"{path}: data.pkl")


@dataclasses.dataclass
class _Member:
  """One uncompressed file inside the zip file.

  Attributes:
    path: the zip file.
    name: name inside it.
    offset: its first byte.
    size: its bytes.
    checksum: their CRC-32.
    verified: whether they have been compared with it.
  """

  path: pathlib.Path
  name: str
  offset: int
  size: int
  checksum: int
  verified: bool = False

  def content(self) -> bytes:
    self.verify()
    return read_bytes(self.path, self.offset, self.size).tobytes()

  def verify(self) -> None:
    """Raises ConfigError if the bytes differ from those that were written."""
    if self.verified:
      return
    checksum = 0
    for start in range(0, self.size, _BLOCK_BYTES):
      block = read_bytes(self.path, self.offset + start, min(_BLOCK_BYTES, self.size - start))
      checksum = zlib.crc32(block.data, checksum)
    if checksum != self.checksum:
      raise ConfigError(
        f"{self.path} is corrupt: {self.name} does not have the checksum it was written with. (PyTorch can leave "
        "checksums out: if that was done, load the file there and save it again with set_crc32_options(True))"
      )
    self.verified = True


def _read_members(path: pathlib.Path) -> dict[str, _Member]:
  try:
    size = path.stat().st_size
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
      entries = archive.infolist()
    limits.require_few(len(entries), f"{path}: its table of contents")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
      raise ConfigError(f"{path} is a TorchScript program, not a file of torch.save")
    members = [_locate(path, entry) for entry in entries]
  except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"{path} is a truncated or corrupt zip file: {error}") from error
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
  _refuse_overlaps(path, members, size)
  return {member.name: member for member in members}


class _Bounded(io.FileIO):
  """A file that `zipfile` reads its table of contents from, in one piece: as long as the file says it is."""

  def read(self, size: int | None = -1) -> bytes:
    if size is not None and size > _TABLE_LIMIT:
      raise zipfile.BadZipFile(f"its table of contents has {size} bytes, at most {_TABLE_LIMIT} are read")
    return super().read(size)


def _locate(path: pathlib.Path, entry: zipfile.ZipInfo) -> _Member:
  """Finds a member of the table of contents in the file; its bytes come after a header of its own."""
  compressed = entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
  if compressed or entry.flag_bits & _ENCRYPTED:
    raise ConfigError(
      f"{path}: {entry.filename} is compressed or encrypted ({entry.compress_size} bytes for {entry.file_size}); "
      "torch.save does neither"
    )
  header = read_bytes(path, entry.header_offset, 30).tobytes()
  if header[:4] != MAGIC:
    raise ConfigError(f"{path} is corrupt: {entry.filename} is not where the table of contents says")
  name_length, extra_length = struct.unpack("<HH", header[26:30])
  offset = entry.header_offset + len(header) + name_length + extra_length
  return _Member(path, entry.filename, offset, entry.file_size, entry.CRC)


def _refuse_overlaps(path: pathlib.Path, members: list[_Member], size: int) -> None:
  """Raises ConfigError if members share bytes, which would make a small file look like a large one."""
  end, names = 0, set()
  for member in sorted(members, key=lambda member: member.offset):
    if member.offset < end or member.offset + member.size > size or member.name in names:
      raise ConfigError(f"{path} is corrupt: {member.name} overlaps another member or the end of the file")
    end = member.offset + member.size
    names.add(member.name)


@dataclasses.dataclass(frozen=True)
class _Storage:
  member: _Member
  dtype: np.dtype
  size: int  # Numbers, not bytes.


class _Storages:
  """Resolves the persistent ids of the pickle."""

  def __init__(self, members: dict[str, _Member], root: str):
    self._members, self._root = members, root

  def load(self, persistent_id: Any) -> _Storage:
    if not isinstance(persistent_id, tuple) or len(persistent_id) != 5:
      raise ValueError(f"it refers to a storage as {shortened(persistent_id)}")
    kind, storage_type, key, _, size = persistent_id
    known = isinstance(key, str) and len(key) <= limits.MAX_NAME and f"{self._root}data/{key}" in self._members
    if kind != "storage" or not isinstance(storage_type, safe_pickle.Global) or not known:
      raise ValueError(f"it refers to a storage that does not exist: {shortened(key)}")
    member = self._members[f"{self._root}data/{key}"]
    dtype = _STORAGE_DTYPES[storage_type.name]
    if type(size) is not int or member.size != size * dtype.itemsize:
      raise ValueError(f"{member.name} has {member.size} bytes, expected {shortened(size)} of {dtype}")
    return _Storage(member, dtype, size)


def _view(path: pathlib.Path, storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any) -> LazyTensor:
  """A tensor; stands in for `torch._utils._rebuild_tensor_v2`."""
  if not isinstance(storage, _Storage):
    raise ValueError(f"a tensor is a view of {shortened(storage)}, expected a storage")
  limits.require_view(shape, strides, offset, storage.size, f"{path}: data.pkl: a tensor")

  def read(start: int, stop: int) -> np.ndarray:
    part = (stop - start, *shape[1:]) if shape else ()
    first = offset + (start * strides[0] if shape else 0)
    storage.member.verify()
    itemsize = storage.dtype.itemsize
    count = limits.span(part, strides)
    raw = read_bytes(storage.member.path, storage.member.offset + (first if count else 0) * itemsize, count * itemsize)
    steps = [stride * itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(raw.view(storage.dtype), part, steps, writeable=False)

  return LazyTensor(tuple(shape), storage.dtype, read)
