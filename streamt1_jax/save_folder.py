"""The folder of a saved search: what lies where, which saves there are, and what says whose they are.

`search.json` carries a checksum of its own contents, and every save has a copy of it. So a description that is damaged
or deleted costs nothing as long as one save is there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest, part_files, paths, stored_part
from streamt1_jax.io.named_tuples import fits, named, rebuilt
from streamt1_jax.state import ChunkTrace

FORMAT_VERSION = 2
SEARCH_FILE = "search.json"
STATE, TRACE = "state", "trace"
_DIGITS = 6
# Orbax adds an ending to the name of what it is writing.
_NAME = re.compile(r"(?P<chunks>[0-9]{6,18})(?P<ending>\..*)?", re.DOTALL)


class Description(NamedTuple):
  """The contents of `search.json`.

  Attributes:
    settings: what decides the result, as JSON values.
    resumed_at: number of finished chunks whenever the search went on after a stop.
    tries: fields of the `methods.tries.Try`s so far, in a copy that belongs to a save.
  """

  settings: dict[str, Any]
  resumed_at: list[int]
  tries: Sequence[Sequence[Any]] = ()


def write_description(place: epath.Path, description: Description) -> None:
  """Writes `search.json` into `place`, the folder of the search or of one save."""
  document = {"format_version": FORMAT_VERSION, **description._asdict()}
  manifest.write_json(place / SEARCH_FILE, document, checksum=True)


def read_description(
  directory: epath.PathLike, warn: Callable[[str], None] = lambda message: None
) -> Description | None:
  """What is saved in `directory`, or None if nothing says it.

  Args:
    directory: the folder of the search.
    warn: told, in one line, that `search.json` is missing or damaged and a save's copy of it was taken.

  Raises:
    ConfigError: the file system refuses; or a later version of the program wrote this; or the description is damaged,
      and no save has a copy.
  """
  folder = epath.Path(directory)
  try:
    found, damage = _read(folder), None
  except part_files.Damaged as error:
    found, damage = None, error
  if found is not None:
    return found
  for chunks in saves(folder):
    # Copies differ only in the newest entries of `resumed_at` and of `tries`.
    with contextlib.suppress(part_files.Damaged):
      if copy := _read(save_path(folder, chunks)):
        warn(f"{damage or f'{folder / SEARCH_FILE} is missing'}; the copy in the save after chunk {chunks} is taken")
        return copy
  if damage is not None:
    raise damage
  return None


def _read(place: epath.Path) -> Description | None:
  """The description in `place`, or None without one. Raises Damaged if it is not what was written."""
  path = place / SEARCH_FILE
  with stored_part.readable(place):
    if not paths.exists(path):
      return None
  document = part_files.read_json_object(place, SEARCH_FILE, "a saved search")
  sealed = manifest.CHECKSUM in document
  if not sealed and document.get("format_version") == 1:
    # The first version had no checksum.
    raise ConfigError(
      f"{path}: format_version is 1, whose keys are rotated at the frames of the whole video; this program reads "
      f"{FORMAT_VERSION}. Finish the search with the release that began it, or remove {place}"
    )
  if sealed and not manifest.is_whole(document):
    raise part_files.Damaged(f"{path} is corrupt: its checksum is not that of its contents")
  if not sealed:
    raise part_files.Damaged(f"{path} is corrupt: it has no checksum")
  part_files.require_version(document, path, FORMAT_VERSION)
  settings, resumed_at = document.get("settings"), document.get("resumed_at")
  if not isinstance(settings, dict) or not isinstance(resumed_at, list) or any(type(n) is not int for n in resumed_at):
    raise part_files.Damaged(f"{path} is corrupt: settings or resumed_at is missing")
  return Description(settings, resumed_at, document.get("tries", []))


def read_tries(folder: epath.Path, chunks: int) -> tuple[Sequence[Sequence[Any]], str | None]:
  """The tries before the save after `chunks` chunks; and a warning if they are not known."""
  try:
    found = _read(save_path(folder, chunks))
  except part_files.Damaged as error:
    return [], f"{error}; what was tried before chunk {chunks} is not counted"
  # Saves of searches that try nothing may lack their copy.
  return ([], None) if found is None else (found.tries, None)


def save_path(folder: epath.Path, chunks: int) -> epath.Path:
  """The folder of the save after `chunks` chunks."""
  return folder / _chunk_name(chunks)


def saves(folder: epath.Path) -> list[int]:
  """Finished chunks of the saves that have their names, newest first. Raises ConfigError if that cannot be told."""
  with stored_part.readable(folder):
    if not paths.exists(folder):
      return []
    numbers = (_chunks(path.name) for path in folder.iterdir())
    return sorted((number for number in numbers if number is not None), reverse=True)


def saves_with_state(folder: epath.Path) -> list[int]:
  """Those from which a search can go on."""
  with stored_part.readable(folder):
    return [chunks for chunks in saves(folder) if paths.exists(save_path(folder, chunks) / STATE)]


def named_traces(traces: Sequence[Sequence[ChunkTrace]], first: int) -> dict[str, Shaped[np.ndarray, " ..."]]:
  """What a save stores of every video's chunks, which begin with chunk `first`: arrays by chunk, video and field."""
  return {
    f"{_chunk_name(chunk)}/{video}/{name}": np.asarray(leaf)
    for video, chunks in enumerate(traces)
    for chunk, trace in enumerate(chunks, first)
    for name, leaf in named(trace).items()
  }


def check_traces(folder: epath.Path, chunks: int) -> None:
  """Looks whether the first `chunks` chunks are there, in all saves up to that one, and whole.

  Raises:
    Damaged: a file is missing or not what was written, or a chunk is missing.
    ConfigError: the file system refuses; the chunks have other fields than this program's.
  """
  found: dict[str, dict[str, list[str]]] = {}
  for _, names in _parts(folder, chunks):
    for name in names:
      chunk, video, leaf = (*name.split("/", 2), "", "")[:3]
      found.setdefault(video, {}).setdefault(chunk, []).append(leaf)
  expected = [_chunk_name(chunk) for chunk in range(chunks)]
  if not found or any(sorted(by_chunk) != expected for by_chunk in found.values()):
    raise part_files.Damaged(f"{folder}: the traces of some of the first {chunks} chunks are missing")
  alike = all(fits(ChunkTrace, leaves) for by_chunk in found.values() for leaves in by_chunk.values())
  if not alike or any(not video.isdecimal() for video in found):
    raise ConfigError(f"{folder}: its traces have other fields than this program's")


def iterate_traces(folder: epath.Path, chunks: int) -> Iterator[list[ChunkTrace]]:
  """The first `chunks` chunks in order, of all videos; memory holds one. `check_traces` has looked at them."""
  for part, names in _parts(folder, chunks):
    by_chunk: dict[str, dict[str, list[str]]] = {}
    for name in names:
      chunk, video, leaf = name.split("/", 2)
      by_chunk.setdefault(chunk, {}).setdefault(video, []).append(leaf)
    for chunk, videos in sorted(by_chunk.items()):
      leaves = (
        {leaf: part.read(f"{chunk}/{video}/{leaf}") for leaf in videos[video]} for video in sorted(videos, key=int)
      )
      yield [rebuilt(ChunkTrace, named_leaves) for named_leaves in leaves]


def _parts(folder: epath.Path, chunks: int) -> Iterator[tuple[stored_part.StoredPart, list[str]]]:
  """What the saves up to that one store of their chunks, oldest first, and the names in it."""
  for save in sorted(save for save in saves(folder) if save <= chunks):
    part = stored_part.open_part(save_path(folder, save) / TRACE, None)
    yield part, list(part.stores)


def keep_up_to(folder: epath.Path, chunks: int) -> None:
  """Removes later saves and what is unfinished. Folders of other names are nobody's saves and stay."""
  with contextlib.suppress(OSError):
    for path in folder.iterdir():
      found, number = _NAME.fullmatch(path.name), _chunks(path.name)
      unfinished = found is not None and found["ending"] is not None
      if (unfinished or (number is not None and number > chunks)) and path.is_dir():
        path.rmtree(missing_ok=True)


def discard(folder: epath.Path) -> None:
  """Removes a saved search. Its description goes last, because it says what the rest is."""
  if not folder.exists():
    return
  for path in folder.iterdir():
    if path.is_dir():
      path.rmtree(missing_ok=True)
  folder.rmtree(missing_ok=True)


def _chunks(name: str) -> int | None:
  """Finished chunks of the save of that name, or None if it is not the name of a save."""
  found = _NAME.fullmatch(name)
  return int(found["chunks"]) if found and name == _chunk_name(int(found["chunks"])) else None


def _chunk_name(chunk: int) -> str:
  return f"{chunk:0{_DIGITS}}"
