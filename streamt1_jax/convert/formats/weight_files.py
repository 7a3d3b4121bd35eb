"""Opens whatever weights are published as: the format is read from the content, never from the name."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats import safetensors_file, torch_file
from streamt1_jax.convert.formats.lazy import read_bytes
from streamt1_jax.io import part_files

_SHARD = re.compile(r"(?P<stem>.+)-\d+-of-\d+\.safetensors")
_FOREIGN = (  # How files begin that are often given by mistake, and what they are.
  (b"version https://git-lfs", "a pointer of git-lfs, not the file it stands for; fetch it with `git lfs pull`"),
  (b"<", "a web page, not weights; download the file itself"),
  (b"\x80\x02", "in the format of PyTorch before 1.6; load it there and save it again with torch.save"),
  (b"\x1f\x8b", "compressed with gzip; unpack it first"),
)


class WeightFile(NamedTuple):
  """What a path held.

  Attributes:
    path: as the user gave it.
    content: nested dicts with `LazyTensor`s as leaves.
    files: the files that were opened, each to be named in the provenance.
  """

  path: pathlib.Path
  content: Mapping[str, Any]
  files: list[pathlib.Path]


def load(path: pathlib.Path) -> WeightFile:
  """Opens weights; tensors are read later.

  Args:
    path: a file of `torch.save`, a safetensors file, the index of several, or a folder with one of these.

  Raises:
    ConfigError: nothing of this kind is at `path`, or it is damaged.
  """
  if path.is_dir():
    return load(_only_weights(path))._replace(path=path)
  if not path.is_file():
    raise ConfigError(f"{path} does not exist")
  if path.name.endswith(".json"):
    content, shards = safetensors_file.load_index(path)
    return WeightFile(path, content, [path, *shards])
  return WeightFile(path, _load_file(path), [path])


def _load_file(path: pathlib.Path) -> Mapping[str, Any]:
  size = path.stat().st_size
  start = read_bytes(path, 0, min(512, size)).tobytes()
  if start.startswith(torch_file.MAGIC):
    content = torch_file.load(path)
    if not isinstance(content, Mapping):
      raise ConfigError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    return content
  if safetensors_file.is_safetensors(path):
    return safetensors_file.load(path)
  if start[257:262] == b"ustar":
    raise ConfigError(f"{path} is a tar file; unpack it, or save it again with a PyTorch of 1.6 or later")
  for beginning, meaning in _FOREIGN:
    if start.startswith(beginning):
      raise ConfigError(f"{path} is {meaning}")
  raise ConfigError(f"{path} ({size} bytes) is neither a file of torch.save nor safetensors")


def shard_advice(path: pathlib.Path) -> str:
  """Advice for a file that lacks tensors: which index to give if it is one of several shards. Empty otherwise."""
  match = _SHARD.fullmatch(path.name)
  return f" (it is one of several shards; give {match['stem']}{safetensors_file.INDEX_SUFFIX})" if match else ""


def _only_weights(folder: pathlib.Path) -> pathlib.Path:
  """The index in `folder`, or its only safetensors file."""
  indices = sorted(folder.glob(f"*{safetensors_file.INDEX_SUFFIX}"))
  files = sorted(folder.glob("*.safetensors"))
  if len(indices) == 1:
    return indices[0]
  if not indices and len(files) == 1:
    return files[0]
  found = [path.name for path in (indices or files)]
  raise ConfigError(
    f"{folder} must hold one *{safetensors_file.INDEX_SUFFIX} or one *.safetensors; "
    f"found {part_files.list_some(found) or 'none'}"
  )
