"""Writes small files in the formats weights are published in, without the libraries that publish them."""

import json
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

_STORAGES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "float64": "Double", "int64": "Long"}
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64"}


def write_torch(path: pathlib.Path, content: Any) -> pathlib.Path:
  """What `torch.save(content)` writes, with numpy arrays in the place of tensors."""
  arrays: list[np.ndarray] = []
  write_archive(path, b"\x80\x02" + _opcodes(content, arrays) + b".", arrays)
  return path


def write_archive(path: pathlib.Path, data: bytes, storages: list[np.ndarray]) -> None:
  """A zip file of the layout of `torch.save`, around any pickle."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    archive.writestr("archive/byteorder", "little")
    for index, array in enumerate(storages):
      archive.writestr(f"archive/data/{index}", array.tobytes())
    archive.writestr("archive/version", "3\n")


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> pathlib.Path:
  header, begin = {"__metadata__": {"format": "pt"}}, 0
  for name, array in tensors.items():
    end = begin + array.nbytes
    header[name] = {"dtype": _SAFETENSORS[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    begin = end
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))
  return path


def write_sharded(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shards: int = 2) -> pathlib.Path:
  """Shards and their index, whose path is returned."""
  folder.mkdir(parents=True, exist_ok=True)
  weight_map = {}
  for shard in range(shards):
    file, names = f"model-{shard + 1:05}-of-{shards:05}.safetensors", list(tensors)[shard::shards]
    write_safetensors(folder / file, {name: tensors[name] for name in names})
    weight_map |= dict.fromkeys(names, file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
  return index


def _opcodes(value: Any, arrays: list[np.ndarray]) -> bytes:
  if isinstance(value, dict):
    items = b"".join(_opcodes(key, arrays) + _opcodes(item, arrays) for key, item in value.items())
    return b"}(" + items + b"u"
  if isinstance(value, np.ndarray):
    return _tensor(value, arrays)
  if isinstance(value, tuple):
    return b"(" + b"".join(_opcodes(item, arrays) for item in value) + b"t"
  if isinstance(value, list):
    return b"](" + b"".join(_opcodes(item, arrays) for item in value) + b"e"
  # Scalars: what the standard library makes of them, without its header and stop.
  return pickle.dumps(value, protocol=2)[2:-1]


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
  key = str(len(arrays))
  arrays.append(np.array(array, order="C"))
  strides = tuple(stride // array.itemsize for stride in arrays[-1].strides)
  storage = b"(" + _opcodes("storage", arrays) + f"ctorch\n{_STORAGES[array.dtype.name]}Storage\n".encode()
  storage += b"".join(_opcodes(item, arrays) for item in (key, "cpu", array.size)) + b"tQ"
  view = b"".join(_opcodes(item, arrays) for item in (0, tuple(array.shape), strides, False))
  hooks = b"ccollections\nOrderedDict\n)R"
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + hooks + b"tR"
