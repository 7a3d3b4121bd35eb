"""Carries conversion plans out: a checkpoint folder that `streamt1 generate` takes, or nothing that looks like one.

Every part is written aside and renamed when it is whole. Its `source.json` says what it was made from. `config.json`,
without which a folder is not a checkpoint, comes last. A part that was made from the same files in the same way is left
as it is; a part that was made from something else is never replaced.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tqdm
from etils import epath

from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.convert import engine, known_files
from streamt1_jax.convert.base import parts_of
from streamt1_jax.convert.plan import PartPlan
from streamt1_jax.io import atomic, checkpoint, config_json, part_files, part_writer
from streamt1_jax.io.checkpoint import TOKENIZER_FILE, TOKENIZER_FILES
from streamt1_jax.text.tokenizer import Tokenizer

CONVERTER_VERSION = 1
"""Recorded with every part; it must be raised when the same files would give other weights."""
SOURCE_FILE = "source.json"
TOKENIZER_NAMES = ("tokenizer.json", "spiece.model", "tokenizer.model")
"""What a folder of a tokenizer is searched for; Wan reads the first of them."""
_BLOCK_BYTES = 16 * 2**20


def execute(
  model: ModelConfig,
  plans: Sequence[PartPlan],
  tokenizer: pathlib.Path | None,
  output: pathlib.Path,
  dtype: Any,
  tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
  """Converts every planned part that is not there yet; writes `config.json` when nothing is missing.

  Args:
    model: the model.
    plans: what to convert.
    tokenizer: its file or folder, or None.
    output: the checkpoint folder; made if missing.
    dtype: dtype of the stored weights.
    tell: called before anything is written, with a line per file: whether it is a published one.

  Returns:
    What the folder still lacks: folders of parts, and `tokenizer.model`. Empty if it is a checkpoint.

  Raises:
    ConfigError: `output` holds a part, tokenizer or config made from something else; a file is damaged; the disk is
      full. What was there before stays, and nothing half-written is left.
  """
  _require_usable(output, model)
  given = None
  if tokenizer is not None:
    given = read_tokenizer(tokenizer, model)
    _require_same_tokenizer(output, given, tokenizer)
    tell(known_files.describe(given.file, len(given.content), hashlib.sha256(given.content).hexdigest()))
  # All that exists is compared before anything is written.
  provenance = {plan.part: _provenance(plan, dtype) for plan in plans}
  for found in provenance.values():
    for source in (*found["sources"], *(found["lora"] or {"sources": ()})["sources"]):
      tell(_known(source))
  # Rewards share a tokenizer.
  for path in dict.fromkeys(path for plan in plans for path in plan.further_sources()):
    tell(_known(_describe_file(path)))
  waiting = [plan for plan in plans if not _is_done(output / plan.part, provenance[plan.part])]
  _require_space(output, sum(plan.stored_bytes(dtype) for plan in waiting))
  for plan in waiting:
    _convert_part(plan, output / plan.part, provenance[plan.part], dtype)
  if given is not None and not (output / given.name).exists():
    _write(output / given.name, given.content)
  still_lacking = lacking(output, model)
  if not still_lacking and not (output / checkpoint.CONFIG_FILE).exists():
    checkpoint.save_config(output, model, _checkpoint_provenance(output, model))
  return still_lacking


def lacking(
  output: pathlib.Path | None, model: ModelConfig, parts: Sequence[str] = (), tokenizer: bool = False
) -> list[str]:
  """What `output` would still lack to be a checkpoint of `model`.

  Args:
    output: the checkpoint folder; None if there is no folder yet.
    model: the model.
    parts: folders of parts that count as present.
    tokenizer: whether the tokenizer counts as present.

  Returns:
    Folders of parts, then `tokenizer.model`.
  """
  is_there = lambda name: output is not None and (output / name).is_file()
  missing = [p for p in parts_of(model) if p not in parts and not is_there(f"{p}/{part_files.PART_FILE}")]
  needs_tokenizer = model.text is not None and not tokenizer and not any(map(is_there, TOKENIZER_FILES))
  return [*missing, *([TOKENIZER_FILE] if needs_tokenizer else [])]


class TokenizerSource(NamedTuple):
  """A tokenizer that fits a model.

  Attributes:
    name: the name it has in a checkpoint.
    content: of the file.
    file: name of the file that was read.
  """

  name: str
  content: bytes
  file: str


def read_tokenizer(path: pathlib.Path, model: ModelConfig) -> TokenizerSource:
  """A tokenizer that fits the model's text encoder.

  Args:
    path: the file (published as tokenizer.json and as spiece.model), or the folder it is in.
    model: the model.

  Raises:
    ConfigError: the file is missing or damaged, it has more pieces than the text encoder embeds, or a sentencepiece
      model would give other ids than Wan's tokenizer.
  """
  if path.is_dir():
    found = [path / name for name in TOKENIZER_NAMES if (path / name).is_file()]
    if not found:
      raise ConfigError(f"--tokenizer {path} holds no {' or '.join(sorted(TOKENIZER_NAMES))}")
    path = found[0]
  if model.text is None:
    raise ConfigError(f"--tokenizer: the model {model.name!r} has no text encoder")
  try:
    vocab_size = Tokenizer(path, model.text.max_len).vocab_size
  except ConfigError as error:
    raise ConfigError(f"--tokenizer: {error}") from error
  if vocab_size > model.text.vocab_size:
    raise ConfigError(
      f"--tokenizer {path} has {vocab_size} pieces, the text encoder embeds only {model.text.vocab_size}"
    )
  name = next((name for name in TOKENIZER_FILES if pathlib.Path(name).suffix == path.suffix), TOKENIZER_FILE)
  return TokenizerSource(name, path.read_bytes(), path.name)


def _convert_part(plan: PartPlan, folder: pathlib.Path, provenance: dict[str, Any], dtype: Any) -> None:
  pieces = engine.stream(plan.tensors, plan.flavour.rules, plan.flavour.abstract_params)
  with _bar(f"converting {plan.part}", plan.source_bytes()) as bar:
    source = (json.dumps(provenance, indent=2) + "\n").encode()
    files = {SOURCE_FILE: source, **plan.extra_files()}
    part_writer.write_part(folder, plan.leaves(dtype), _counted(pieces, bar), files)


def _counted(pieces: Iterator[part_writer.Piece], bar: tqdm.tqdm) -> Iterator[part_writer.Piece]:
  for piece in pieces:
    yield piece
    bar.update(piece.rows.nbytes)


def _provenance(plan: PartPlan, dtype: Any) -> dict[str, Any]:
  """Everything that decides the bytes of a part, and what was skipped in its files."""
  adapter = plan.adapter
  return {
    "converter": {"streamt1_jax": importlib.metadata.version("streamt1_jax"), "version": CONVERTER_VERSION},
    "config": config_json.to_json_value(plan.config),
    "dtype": str(dtype),
    "names": plan.flavour.names,
    "entry": plan.entry,
    "sources": [_describe_file(path) for path in plan.files],
    "skipped": plan.skipped,
    "lora": None
    if adapter is None
    else {
      "layers": len(adapter.layers),
      "rank": adapter.rank,
      "alpha": adapter.alpha,
      "scale": adapter.scale,
      "sources": [_describe_file(path) for path in adapter.files],
      "skipped": adapter.skipped,
    },
    **plan.further_provenance(),
  }


def _known(source: Mapping[str, Any]) -> str:
  """Whether a file, as `_describe_file` gives it, is a published one."""
  return known_files.describe(source["file"], source["bytes"], source["sha256"])


def _describe_file(path: pathlib.Path) -> dict[str, Any]:
  size, digest = path.stat().st_size, hashlib.sha256()
  with path.open("rb") as file, _bar(f"checksum of {path.name}", size) as bar:
    while block := file.read(_BLOCK_BYTES):
      digest.update(block)
      bar.update(len(block))
  return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _is_done(folder: pathlib.Path, provenance: dict[str, Any]) -> bool:
  """Whether `folder` was made as `provenance` says. Raises ConfigError if it was made in another way."""
  if not folder.exists():
    return False
  found = _read_provenance(folder)
  differing = [name for name in provenance if found.get(name) != provenance[name]]
  if differing:
    raise ConfigError(
      f"{folder} exists and was made otherwise ({', '.join(differing)} differ, see its {SOURCE_FILE}); "
      "remove it or give another --output"
    )
  return True


def _read_provenance(folder: pathlib.Path) -> dict[str, Any]:
  """The `source.json` of a part. Raises ConfigError if the folder is not a part, or not one of the present format."""
  part_files.read_part_file(epath.Path(folder))
  return part_files.read_json_object(epath.Path(folder), SOURCE_FILE, "a part made by `streamt1 convert`")


def _checkpoint_provenance(output: pathlib.Path, model: ModelConfig) -> dict[str, Any]:
  parts = {part: _read_provenance(output / part) for part in parts_of(model)}
  tokenizer = {}
  if model.text is not None:
    tokenizer = {"tokenizer": _describe_file(output / checkpoint.tokenizer_file(output).name)}
  return {"converted_by": "streamt1 convert", **parts, **tokenizer}


def _require_usable(output: pathlib.Path, model: ModelConfig) -> None:
  """Raises ConfigError if the folder is a checkpoint of another model, or holds parts of one."""
  if output.exists() and not output.is_dir():
    raise ConfigError(f"--output {output} is a file; expected a folder")
  if not (output / checkpoint.CONFIG_FILE).exists():
    for part in (part for part in parts_of(model) if (output / part).exists()):
      if _read_provenance(output / part).get("config") != config_json.to_json_value(getattr(model, part)):
        raise ConfigError(f"{output / part} exists and was made for another --model; give another --output")
    return
  existing = checkpoint.load_config(output)
  if existing != model:
    differing = [
      name
      for name, value in config_json.to_json_value(model).items()
      if config_json.to_json_value(existing)[name] != value
    ]
    raise ConfigError(
      f"--output {output} is a checkpoint of another model ({', '.join(differing)} differ); give another folder"
    )


def _require_same_tokenizer(output: pathlib.Path, given: TokenizerSource, source: pathlib.Path) -> None:
  for path in (output / name for name in TOKENIZER_FILES):
    if path.exists() and (path.name != given.name or path.read_bytes() != given.content):
      raise ConfigError(f"{path} exists and differs from --tokenizer {source}; remove it or give another --output")


def _require_space(output: pathlib.Path, needed: int) -> None:
  existing = next(folder for folder in [output, *output.absolute().parents] if folder.exists())
  free = shutil.disk_usage(existing).free
  if needed > free:
    raise ConfigError(f"--output {output} needs {needed:,} bytes, the disk has {free:,} left")


def _write(path: pathlib.Path, content: bytes) -> None:
  try:
    atomic.replace_bytes(path, content)
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {part_files.first_line(error)}") from error


def _bar(what: str, total: int) -> tqdm.tqdm:
  return tqdm.tqdm(desc=what, total=total, unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5)
