"""Random weights in the files that real ones are published in, at any size, written without PyTorch.

Values are normal with mean 0 and standard deviation 0.02: small enough that activations stay finite in any layer.
They repeat after `_PERIOD` values and are exact in bfloat16, so a file of 23 GB costs one pass over the disk, and the
same weights can be written in either dtype.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STANDARD_DEVIATION = 0.02
_PERIOD = 4_194_301  # Prime, so that no row of a matrix repeats another.
_SEED_STEP = 1_000_003
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_TORCH_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}


class Tensor(NamedTuple):
  """A tensor to write.

  Attributes:
    shape: its shape.
    dtype: "float32" or "bfloat16".
    seed: chooses the values.
  """

  shape: tuple[int, ...]
  dtype: str
  seed: int

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * np.dtype(getattr(ml_dtypes, self.dtype, self.dtype)).itemsize

  def pieces(self) -> Iterator[memoryview]:
    """Its bytes, little-endian and in C order."""
    block = _block(self.dtype)
    begin, left = self.seed * _SEED_STEP % _PERIOD, self.size
    while left:
      piece = block[begin : begin + left]
      yield piece.data.cast("B")
      begin, left = 0, left - len(piece)


@functools.cache
def _block(dtype: str) -> np.ndarray:
  values = np.random.default_rng(0).standard_normal(_PERIOD, np.float32) * np.float32(STANDARD_DEVIATION)
  narrow = values.astype(ml_dtypes.bfloat16)
  return narrow.view(np.uint16) if dtype == "bfloat16" else narrow.astype(np.float32)


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
  """One safetensors file: length of the header, header in JSON, values."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in tensors.items():
    begin, end = end, end + tensor.nbytes
    header[name] = {
      "dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]
    }  # fmt: skip
  text = json.dumps(header).encode()
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
      file.writelines(tensor.pieces())


def write_sharded(folder: pathlib.Path, stem: str, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
  """Safetensors files of at most `shard_bytes` (or one tensor), and their index: a folder of diffusers."""
  shards: list[dict[str, Tensor]] = [{}]
  for name, tensor in tensors.items():
    if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
      shards.append({})
    shards[-1][name] = tensor
  folder.mkdir(parents=True)
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
    write_safetensors(folder / file, shard)
    weight_map |= dict.fromkeys(shard, file)
  index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
  (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_torch(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """What `torch.save(content)` writes of nested dicts of tensors and numbers: a zip of a pickle and the values."""
  tensors: list[Tensor] = []
  data = b"\x80\x02" + _opcodes(content, tensors) + b"."
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    archive.writestr("archive/byteorder", "little")
    for key, tensor in enumerate(tensors):
      with archive.open(f"archive/data/{key}", "w", force_zip64=True) as file:
        for piece in tensor.pieces():
          file.write(piece)
    archive.writestr("archive/version", "3\n")


def _opcodes(value: Any, tensors: list[Tensor]) -> bytes:
  """The pickle of `value`, without beginning and end. It is written by hand: `pickle` would import what it names."""
  if isinstance(value, Tensor):
    tensors.append(value)
    return _tensor_opcodes(value, str(len(tensors) - 1))
  if isinstance(value, Mapping):
    items = b"".join(_opcodes(name, tensors) + _opcodes(item, tensors) for name, item in value.items())
    return b"}(" + items + b"u"
  return pickle.dumps(value, protocol=2)[2:-1]


def _tensor_opcodes(tensor: Tensor, key: str) -> bytes:
  """`torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`."""
  plain = lambda value: pickle.dumps(value, protocol=2)[2:-1]
  storage = f"ctorch\n{_TORCH_STORAGES[tensor.dtype]}\n".encode()
  storage = b"(" + plain("storage") + storage + plain(key) + plain("cpu") + plain(tensor.size) + b"tQ"
  view = plain(0) + plain(tuple(tensor.shape)) + plain(_strides(tensor.shape)) + plain(False)
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"ccollections\nOrderedDict\n)RtR"


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
  return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
