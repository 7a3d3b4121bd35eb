"""VBench's prompts: which there are, how many samples each needs, and which text the model is given.

The prompts themselves are VBench's and are read from its files: `prompts/all_dimension.txt`, one prompt a line, or
`vbench/VBench_full_info.json`, which also says what every prompt is for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import config_json
from streamt1_jax.text.prompts import load_prompts, require_whole_characters

FLICKER = "temporal_flickering"
"""The dimension that throws moving videos away, and so needs more samples of each prompt."""


class Prompt(NamedTuple):
  """A prompt to be judged.

  Attributes:
    line: its first line in the file, from 1.
    text: what VBench knows it by.
    model_text: what the model is given, such as an extended prompt.
    dimensions: what it is for; empty where the file does not say.
  """

  line: int
  text: str
  model_text: str
  dimensions: frozenset[str]


def read(path: str | os.PathLike[str], model_path: str | os.PathLike[str] | None = None) -> list[Prompt]:
  """The different prompts of a file, in its order: VBench's 946 lines hold 944.

  Args:
    path: text of one prompt a line, or `VBench_full_info.json`.
    model_path: text of one prompt a line, aligned with `path`; by default the model is given VBench's own prompts.

  Raises:
    ConfigError: a file is missing or is not such a file, or the two have not the same number of lines.
  """
  is_json = os.fspath(path).endswith(".json")
  entries = _read_json(path) if is_json else [(text, frozenset[str]()) for text in load_prompts(path)]
  model_texts = [text for text, _ in entries] if model_path is None else load_prompts(model_path)
  if len(model_texts) != len(entries):
    raise ConfigError(f"{model_path} has {len(model_texts)} prompts, and {path} has {len(entries)}")
  found: dict[str, Prompt] = {}
  for line, ((text, dimensions), model_text) in enumerate(zip(entries, model_texts, strict=True), start=1):
    if text in found:
      found[text] = found[text]._replace(dimensions=found[text].dimensions | dimensions)
    else:
      found[text] = Prompt(line, text, model_text, dimensions)
  return list(found.values())


def samples_needed(prompt: Prompt, samples: int, flicker_samples: int | None) -> int:
  """How many videos of a prompt there must be; `flicker_samples` is for prompts of temporal flickering."""
  return max(samples, flicker_samples or 0) if FLICKER in prompt.dimensions else samples


def _read_json(path: str | os.PathLike[str]) -> Sequence[tuple[str, frozenset[str]]]:
  document = config_json.read_json(epath.Path(path), os.fspath(path))
  if not isinstance(document, list) or not document:
    raise ConfigError(f"{path} must be a list of prompts, as VBench_full_info.json is")
  return [_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(document, start=1)]


def _entry(entry: object, where: str) -> tuple[str, frozenset[str]]:
  fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
  text, dimensions = fields.get("prompt_en"), fields.get("dimension")
  names: list[Any] = dimensions if isinstance(dimensions, list) else [None]
  if not isinstance(text, str) or not text.strip() or not all(isinstance(name, str) for name in names):
    raise ConfigError(f"{where} needs prompt_en, a text, and dimension, a list of names")
  require_whole_characters(text, f"{where}: prompt_en")
  return text, frozenset(names)
