"""Published weights: files of torch.save, safetensors, shards and adapters, read up to what would be stored."""

from __future__ import annotations

import functools
import io
import json
import pathlib
import struct
import tempfile
import warnings
import zipfile

import numpy as np

from streamt1_jax.convert import adapters, engine, plan
from streamt1_jax.convert.formats import weight_files
from streamt1_jax.convert.formats.lazy import LazyTensor
from tests.fuzz import changes
from tests.fuzz.changes import Rng, pick
from tests.fuzz.kinds import Kind
from tests.published_files import write_safetensors, write_sharded, write_torch
from tests.published_model import FLAVOURS, MODEL, adapter, tensors

_BLOCK_BYTES = 2**20
_READ_BYTES = 2**22  # Larger tensors are read up to here.


@functools.cache
def _torch() -> bytes:
  weights = {"generator": tensors("backbone"), "step": 3, "note": [1.5, (True, None, "text")]}
  with tempfile.TemporaryDirectory() as folder:
    return write_torch(pathlib.Path(folder) / "file", weights).read_bytes()


@functools.cache
def _safetensors(of: str) -> bytes:
  content = {"backbone": lambda: tensors("backbone"), "adapter": adapter}[of]()
  with tempfile.TemporaryDirectory() as folder:
    return write_safetensors(pathlib.Path(folder) / "file", content).read_bytes()


def _changed_torch(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  """A flip anywhere; or a change of the table of contents; or another pickle or member, with the right checksum."""
  path, content = folder / "weights.pt", _torch()
  how = rng.integers(4)
  if how == 0:
    path.write_bytes(changes.of_bytes(rng, content))
  elif how == 1:
    path.write_bytes(changes.of_bytes(rng, content, low=content.index(b"PK\x01\x02")))
  else:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):  # Names stand twice.
      for name, member in members:
        if how == 2 and name.endswith("data.pkl"):
          member = changes.of_pickle(rng, member)
        elif how == 3 and rng.integers(20) == 0:
          name = pick(rng, (name, name + "x", "archive/data/0\n", "x" * 5000, "../" + name))
          member = changes.of_bytes(rng, member) if member else b"x"
        archive.writestr(name, member)
  return path


def _changed_safetensors(rng: Rng, folder: pathlib.Path, of: str = "backbone") -> pathlib.Path:
  """A flip anywhere, or a changed header with the right length."""
  path, content = folder / "weights.safetensors", _safetensors(of)
  length = int.from_bytes(content[:8], "little")
  if rng.integers(3) == 0:
    path.write_bytes(changes.of_bytes(rng, content, high=pick(rng, (8, length, len(content)))))
    return path
  text = changes.of_json(rng, json.loads(content[8 : 8 + length])).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
  return path


def _changed_index(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  index = write_sharded(folder, tensors("backbone"), 3)
  index.write_text(changes.of_json(rng, json.loads(index.read_text())))
  return pick(rng, (index, folder))


def _changed_adapter(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  """A folder as peft saves it: the weights, its configuration, or both changed."""
  config = {"r": 3, "lora_alpha": 4.5, "use_rslora": False, "rank_pattern": {}, "target_modules": ["q"]}
  how = rng.integers(3)
  (folder / adapters.CONFIG_FILE).write_text(json.dumps(config) if how == 0 else changes.of_json(rng, config))
  if how == 1:
    write_safetensors(folder / "weights.safetensors", _other_shapes(rng))
  elif how == 0:
    _changed_safetensors(rng, folder, "adapter")
  else:
    (folder / "weights.safetensors").write_bytes(_safetensors("adapter"))
  return folder


def _other_shapes(rng: Rng) -> dict[str, np.ndarray]:
  """An adapter whose matrices have another rank, or that are no matrices."""
  shape = pick(rng, ((), (0,), (3,), (0, 4), (3, 0), (1, 1), (2, 3, 4)))
  side = pick(rng, ("lora_A", "lora_B", "lora"))
  return {name: np.zeros(shape, np.float32) if side in name else matrix for name, matrix in adapter().items()}


def _read(path: pathlib.Path) -> None:
  """As `streamt1 convert --backbone` reads it; and every tensor, whether or not the model has it."""
  for value in weight_files.load(path).content.values():
    for tensor in (value, *(value.values() if isinstance(value, dict) else ())):
      if isinstance(tensor, LazyTensor):
        _read_tensor(tensor)
  (part,) = plan.make_plans(MODEL, plan.Sources(backbone=path))
  for _ in engine.stream(part.tensors, part.flavour.rules, part.flavour.abstract_params):
    pass


def _read_tensor(tensor: LazyTensor) -> None:
  count = 0
  if tensor.shape and tensor.dtype.itemsize * max(1, int(np.prod([float(n) for n in tensor.shape[1:]]))) > _READ_BYTES:
    return  # A single row, which only a model with rows as large would read.
  for block in tensor.blocks(_BLOCK_BYTES):
    count += block.nbytes + 1
    if count > _READ_BYTES:
      return


def _read_adapter(path: pathlib.Path) -> None:
  backbone = FLAVOURS["backbone", "Wan"]
  found = adapters.load(path, None, backbone, [flavour for key, flavour in FLAVOURS.items() if key[0] == "backbone"])
  for weight in adapters.merged(tensors("backbone"), found).values():
    np.asarray(weight)


KINDS = {
  "torch": Kind(_changed_torch, _read),
  "safetensors": Kind(_changed_safetensors, _read),
  "index": Kind(_changed_index, _read),
  "adapter": Kind(_changed_adapter, _read_adapter),
}
