"""Result folders: named after the prompt, there whole or not at all, never replaced by accident."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from jaxtyping import Float32

from streamt1_jax.cli.command import RunFailed
from streamt1_jax.cli.files import FULL_DISK
from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, part_files, paths
from streamt1_jax.io.result_files import CONTACT_SHEET, FAILURE, LATENTS, MANIFEST, PICTURES, REPORT, TRACE, VIDEO
from streamt1_jax.io.timeline import ChunkClock
from streamt1_jax.messages import shortened

_LATENTS, _MODEL = "latents", "model_sha256"
_SLUG_LENGTH = 48
_LOGGER = logging.getLogger(__name__)


def result_folder(output_dir: epath.PathLike, prompt: str, further: str = "", sample: int = 0) -> epath.Path:
  """Where the result of `prompt` belongs: a readable name, and different for different prompts and samples.

  So it is for different texts `further`, which says what else two videos of one prompt may differ in.
  """
  slug = re.sub("[^a-z0-9]+", "-", prompt.lower())[:_SLUG_LENGTH].strip("-") or "prompt"
  name = f"{slug}-{hashlib.sha256((prompt + further).encode()).hexdigest()[:8]}"
  return epath.Path(output_dir) / (f"{name}-{sample}" if sample else name)


def is_finished(folder: epath.Path, settings: Mapping[str, Any], *, overwrite: bool) -> bool:
  """Whether `folder` already has the result of `settings`, so that there is nothing to do.

  Args:
    folder: of one result; it may be missing.
    settings: everything that decides the result, as JSON values; its manifest has them as "settings".
    overwrite: an earlier result does not count.

  Raises:
    ConfigError: the folder holds another result (unless `overwrite`), or something that is not a result.
  """
  if not folder.exists() or (folder / FAILURE).is_file() or _is_half_published(folder):
    return False
  document = part_files.read_json_object(folder, MANIFEST, "an earlier result")
  if overwrite:
    return False
  require_same(f"{folder} was made", document.get("settings", {}), settings, "use --overwrite or another --output_dir")
  _warn_of_changes(folder, document.get("files"))
  return True


def _warn_of_changes(folder: epath.Path, listed: Any) -> None:
  """Warns of files that are not what the manifest says was written. An older one lists no files."""
  # An object is written whole, and to hash it is to download it.
  if paths.is_object_store(folder) or not isinstance(listed, dict):
    return
  for name, found in part_files.describe_files(folder).items():
    if listed.get(name, found) != found:
      _LOGGER.warning(f"{folder / name} is not what was written; --overwrite makes it again")


def require_same(what: str, stored: Any, settings: Mapping[str, Any], remedy: str) -> None:
  """Raises ConfigError, "`what` with NAME VALUE, not VALUE; `remedy`", at the first of `settings` stored otherwise."""
  if not isinstance(stored, Mapping):
    raise ConfigError(f"{what} with settings that are {shortened(stored)}; {remedy}")
  for name, value in settings.items():
    if stored.get(name) != value:
      raise ConfigError(f"{what} with {name} {stored.get(name)}, not {value}; {remedy}")


def _is_half_published(folder: epath.Path) -> bool:
  """Whether a run was killed while it replaced `folder` file by file, as object stores need it."""
  if not paths.is_object_store(folder) or (folder / MANIFEST).is_file():
    return False
  return {path.name for path in folder.iterdir()} <= {VIDEO, CONTACT_SHEET, TRACE, LATENTS, PICTURES, REPORT}


def check_place(target: epath.Path) -> None:
  """Raises ConfigError if the folder of a result cannot be made; nothing is left of the attempt."""
  if paths.is_object_store(target):
    return
  missing = [folder for folder in (target, *target.parents) if not folder.exists()]
  made = []
  try:
    with _refusals_named(target):
      for folder in reversed(missing):
        folder.mkdir()
        made.append(folder)
  finally:
    for folder in reversed(made):
      folder.rmdir()


@contextlib.contextmanager
def staged_folder(target: epath.Path, *, keep_on: Callable[[Exception], bool]) -> Iterator[epath.Path]:
  """Gives an empty folder to fill, which then takes the place of `target`: whole or not at all.

  Args:
    target: the folder of the result; an earlier one is replaced.
    keep_on: whether an error leaves what is in the folder; it is raised on.

  Raises:
    ConfigError: the file system refuses the folder or a file in it; an earlier result stays.
    RunFailed: the disk is full; likewise.
  """
  staging = target.parent / f".{target.name}.partial"
  try:
    with _refusals_named(target):
      staging.rmtree(missing_ok=True)
      staging.mkdir(parents=True)
    try:
      with _refusals_named(target, below=staging):
        yield staging
    except Exception as error:
      if keep_on(error):
        with _refusals_named(target):
          atomic.replace_folder(target, staging, FAILURE)
      raise
    with _refusals_named(target):
      atomic.replace_folder(target, staging, MANIFEST)
  finally:
    with contextlib.suppress(OSError):
      staging.rmtree(missing_ok=True)


@contextlib.contextmanager
def _refusals_named(target: epath.Path, below: epath.Path | None = None) -> Iterator[None]:
  """Names `target` in an OSError of the body; if `below` is given, only in those of files in that folder."""
  try:
    yield
  except OSError as error:
    if below is not None and not _is_of(error, below):
      raise
    kind = RunFailed if error.errno in FULL_DISK else ConfigError
    raise kind(f"cannot write {target}: {error.strerror or error}") from error


def _is_of(error: OSError, folder: epath.Path) -> bool:
  """Whether an error came from files in `folder`."""
  if error.filename is None:
    # A write to a file that is open does not say to which, and object stores say nothing at all.
    return error.errno in FULL_DISK or paths.is_object_store(folder)
  return epath.Path(str(error.filename)).is_relative_to(folder)


def describe_segments(segments: Sequence[tuple[int, str]], num_frames: int, clock: ChunkClock) -> list[dict[str, Any]]:
  """Parts of a video under one prompt each: first `chunk`, `start` and `end` in seconds, and `frames` [from, to)."""
  starts = [round(clock.seconds(chunk) * clock.fps) for chunk, _ in segments]
  ends = [*starts[1:], num_frames]
  return [
    {"chunk": chunk, "start": start / clock.fps, "end": end / clock.fps, "frames": [start, end], "prompt": prompt}
    for (chunk, prompt), start, end in zip(segments, starts, ends, strict=True)
  ]


def read_latents(folder: epath.Path, model_sha256: str) -> Float32[np.ndarray, "num_latent_frames C H W"]:
  """The latents of a result: float32 `[latent frames, C, H, W]`.

  Raises ConfigError, naming the file, if it is not whole, or the latents are of another model than `model_sha256`.
  """
  path = folder / LATENTS
  try:
    content = path.read_bytes()
    # The library refuses a header that is nested so deep that Python's reader of JSON would fail.
    latents = safetensors.numpy.load(content)[_LATENTS]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    made_by = header["__metadata__"][_MODEL]
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
  except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
    raise ConfigError(f"{path} is damaged, or no file of latents: {part_files.first_line(error)}") from error
  if made_by != model_sha256:
    raise ConfigError(f"{path} was made by another model ({made_by:.12} instead of {model_sha256:.12})")
  return latents


def latents_header(shape: Sequence[int], model_sha256: str) -> bytes:
  """How a file of latents, float32 of this shape, begins; their values follow. `model_sha256` is what made them."""
  size = 4 * math.prod(shape)
  header = {
    "__metadata__": {_MODEL: model_sha256},
    _LATENTS: {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]},
  }
  text = json.dumps(header).encode()
  # Values begin at a multiple of 8 bytes.
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text
