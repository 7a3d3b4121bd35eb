"""The stages of a check at full size: files as they are published, what becomes of them, and the checks of that.

  source ── written ── converted, in a process of its own ── deleted      for every file
                            └─ parts of the checkpoint ── checks          each in a process of its own

Two flavours that hold the same weights must become the same part.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.io import part_files
from streamt1_jax.measuring import published_sources, stages
from streamt1_jax.measuring.full_size_checks import CHECKS
from streamt1_jax.measuring.published_sources import Source

CHECKPOINT = "checkpoint"
"""Folder of the parts that are checked, inside the folder of all files."""
_PARTS = {"backbone", "codec", "text"}


class Work(NamedTuple):
  """Where files are converted, and as what.

  Attributes:
    folder: of all files.
    model: name of the preset that gives the sizes.
    dtype: name of the dtype of converted weights.
  """

  folder: pathlib.Path
  model: str
  dtype: str


def choose_sources(names: Sequence[str] | None, model: ModelConfig) -> list[Source]:
  """The sources of these names, in the order of `published_sources.sources`; all if there are no names.

  Raises ConfigError, naming the flag --sources, for an unknown name.
  """
  known = published_sources.sources(model)
  unknown = sorted(set(names or ()) - {source.name for source in known})
  if unknown:
    raise ConfigError(f"--sources: {unknown[0]!r} is not one of {', '.join(source.name for source in known)}")
  return [source for source in known if not names or source.name in names]


def is_complete(chosen: Sequence[Source]) -> bool:
  """Whether the checkpoint that these sources become has all that is checked."""
  return {source.part for source in chosen if source.final} == _PARTS


def prepare(folder: pathlib.Path, model: ModelConfig) -> None:
  """Makes `folder`. Raises ConfigError, naming the flag --work_dir, unless the work can be done in it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
      raise ConfigError(f"--work_dir={folder} is not empty")
  except OSError as error:
    raise ConfigError(f"--work_dir={folder} cannot be used: {error.strerror}") from error
  needed, free = published_sources.bytes_at_worst(model), shutil.disk_usage(folder).free
  if free < needed:
    raise ConfigError(f"--work_dir={folder} has {free / 1e9:.0f} GB free, the check needs {needed / 1e9:.0f}")


def clear(folder: pathlib.Path) -> None:
  """Deletes all that is in `folder`."""
  for entry in folder.iterdir():
    _delete(entry)


def convert_all(work: Work, chosen: Sequence[Source]) -> Iterator[dict[str, Any]]:
  """Yields the result of every conversion, as JSON values.

  Each is that of `stages.measure`, with "written_bytes" and "write_seconds" of the source, and "weights_sha256" of the
  files with weights. Raises ConfigError if a file cannot be written, a conversion fails, or flavours that hold the same
  weights become different parts.
  """
  seen: dict[tuple[str, bool], tuple[str, dict[str, str]]] = {}
  for source in chosen:
    output = work.folder / (CHECKPOINT if source.final else f"{source.name}_converted")
    result = _convert(work, source, output)
    checksums = _weight_checksums(output / source.part)
    yield result | {"weights_sha256": hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()}
    first, expected = seen.setdefault((source.part, source.with_adapter), (source.name, checksums))
    if checksums != expected:
      raise ConfigError(f"{source.name} and {first} hold the same weights, but became different {source.part} parts")
    if not source.final:
      shutil.rmtree(output)


def run_checks(program: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Yields the result of every check of the converted checkpoint, as JSON values; see `stages.measure`.

  Args:
    program: arguments of the Python interpreter that, with `--check=NAME`, run the check of that name and print its
      result in JSON.

  Raises:
    ConfigError: a check failed.
  """
  for check in CHECKS:
    yield stages.measure(check.replace("_", " "), [*program, f"--check={check}"])


def _convert(work: Work, source: Source, output: pathlib.Path) -> dict[str, Any]:
  """Writes a source, converts it into the folder `output`, and deletes it."""
  start, path = time.perf_counter(), work.folder / source.name
  try:
    source.write(path)
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
  written = {"written_bytes": stages.disk_bytes(path), "write_seconds": time.perf_counter() - start}
  arguments = [argument.format(path=path) for argument in source.arguments]
  command = ["-m", "streamt1_jax", "convert", f"--model={work.model}", f"--output={output}", *arguments]
  result = stages.measure(f"convert {source.name}", [*command, f"--dtype={work.dtype}"], output / source.part)
  _delete(path)
  return result | written


def _delete(path: pathlib.Path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def _weight_checksums(part: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file with weights in a converted part."""
  files = part_files.read_part_file(epath.Path(part))["files"]
  return {name: entry["sha256"] for name, entry in files.items() if "/" in name}
