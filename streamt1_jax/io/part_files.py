"""The files of a saved model part. `part.json` holds their sizes and checksums, which are checked before reading."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, cast

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import config_json, limits, manifest, paths
from streamt1_jax.messages import shortened

FORMAT_VERSION = 1
PART_FILE = "part.json"
_MAX_LISTED = 3
_HASH_THREADS = 8


class Damaged(ConfigError):
  """Files are not what was written: one is missing, cut off or altered. Trying again does not help."""


def write_part_file(folder: epath.Path, leaves: Mapping[str, Any]) -> None:
  """Writes part.json: what `leaves` are, and size and SHA-256 of every file in `folder`, which holds them."""
  part = {
    "format_version": FORMAT_VERSION,
    "parameters": sum(leaf.size for leaf in leaves.values()),
    "dtype": "+".join(sorted({leaf.dtype.name for leaf in leaves.values()})),
    "files": describe_files(folder),
  }
  manifest.write_json(folder / PART_FILE, part)


def describe_files(folder: epath.Path) -> dict[str, dict[str, int | str]]:
  """Size and SHA-256 of every file below `folder`, by its path from there."""
  return {
    path.relative_to(folder).as_posix(): {"bytes": path.stat().length, "sha256": file_sha256(path)}
    for path in paths.files_below(folder)
  }


def file_sha256(path: epath.Path) -> str:
  """SHA-256 of a file, whose content is read piece by piece."""
  with path.open("rb") as file:
    return hashlib.file_digest(cast(io.BufferedIOBase, file), "sha256").hexdigest()


def verify_files(folder: epath.Path) -> None:
  """Compares the files with part.json. Sizes come first: they show most damage, and nothing has to be read.

  Raises:
    Damaged: a file, which the message names, is missing or has another size or checksum.
    ConfigError: part.json cannot be read.
    OSError: the file system refuses.
  """
  files = read_part_file(folder)["files"]
  for name, expected in files.items():
    path = folder / name
    try:
      size = path.stat().length
    except (FileNotFoundError, NotADirectoryError) as error:
      raise Damaged(f"{folder} is incomplete: {name} is missing") from error
    # A device has no size and no end.
    if not paths.is_regular_file(path):
      raise Damaged(f"{folder} is incomplete: {name} is not a file")
    if size != expected["bytes"]:
      raise Damaged(f"{path} is truncated or altered: {size} bytes, expected {expected['bytes']}")
  # Threads help, because hashing releases the interpreter's lock and one file is read while another is hashed.
  with futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
    checksums = pool.map(file_sha256, [folder / name for name in files])
    for (name, expected), checksum in zip(files.items(), checksums, strict=True):
      if checksum != expected["sha256"]:
        pool.shutdown(wait=False, cancel_futures=True)
        raise Damaged(f"{folder / name} is corrupt: its checksum is not the one recorded in {PART_FILE}")


def read_part_file(folder: epath.Path) -> dict[str, Any]:
  """The contents of part.json. Raises ConfigError: Damaged if `folder` is not a saved part or the file is corrupt."""
  part = read_json_object(folder, PART_FILE, "a saved model part")
  path = folder / PART_FILE
  try:
    require_version(part, path)
  except ConfigError as error:
    # There has been no other version: a byte has changed.
    raise Damaged(str(error)) from error
  for field, field_type in (("parameters", int), ("dtype", str), ("files", dict)):
    if not isinstance(part.get(field), field_type):
      raise Damaged(f"{path} is corrupt: {field} is missing or not a {field_type.__name__}")
  limits.require_few(len(part["files"]), f"{path}: files")
  for name, entry in part["files"].items():
    if not _is_inside(name):
      raise Damaged(f"{path} is corrupt: {shortened(name)} is no file in its folder")
    if not (isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry)):
      raise Damaged(f"{path} is corrupt: files need bytes and sha256")
  return part


def _is_inside(name: str) -> bool:
  """Whether a name from part.json is one that `write_part_file` can have written: of a file in the folder or below."""
  steps = name.split("/")
  return len(name) <= limits.MAX_NAME and "\0" not in name and not {"", ".", ".."} & set(steps)


def read_json_object(folder: epath.Path, name: str, kind: str) -> dict[str, Any]:
  """The JSON object in file `name` of `folder`.

  Args:
    folder: where it is.
    name: of the file.
    kind: what the folder should be, for messages.

  Raises:
    Damaged: there is no such file or it holds something else.
    ConfigError: the file system refuses.
  """
  path = folder / name
  try:
    if not paths.exists(path):
      if not paths.exists(folder):
        raise Damaged(f"{folder} does not exist; expected the folder of {kind}")
      if not folder.is_dir():
        raise Damaged(f"{folder} is a file; expected the folder of {kind}")
      found = sorted(entry.name for entry in folder.iterdir())
      raise Damaged(f"{folder} is not {kind}: it has no {name} (found: {list_some(found) or 'nothing'})")
    if not path.is_dir() and not paths.is_regular_file(path):
      raise Damaged(f"{path} is not a file")  # A pipe would be waited for.
    with path.open("rb") as file:
      content = file.read(config_json.MAX_JSON_BYTES + 1)
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {first_line(error)}") from error
  try:
    document = config_json.parse_strict_json(content, str(path))
  except ConfigError as error:
    raise Damaged(str(error)) from error
  if not isinstance(document, dict):
    raise Damaged(f"{path} must hold a JSON object")
  return document


def require_version(document: Mapping[str, Any], path: epath.Path, expected: int = FORMAT_VERSION) -> None:
  """Raises ConfigError unless `document`, read from `path`, has the format version this program reads."""
  version = document.get("format_version")
  if version != expected or isinstance(version, bool):
    raise ConfigError(f"{path}: format_version is {shortened(version)}; this program reads {expected}")


def list_some(names: Sequence[str], separator: str = ", ") -> str:
  """The first few of `names`, and how many more there are."""
  rest = len(names) - _MAX_LISTED
  return separator.join(names[:_MAX_LISTED]) + (f"{separator}and {rest} more" if rest > 0 else "")


def first_line(error: Exception) -> str:
  """Type and first line of an error, for a message of one line."""
  lines = str(error).splitlines()
  return f"{type(error).__name__}: {lines[0] if lines else ''}"
