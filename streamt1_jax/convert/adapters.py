"""LoRA adapters from files, merged into the tensors of a backbone while these are read.

W' = W + (alpha / rank) B A, in float32; W `[out, in]`, A `[rank, in]`, B `[out, rank]`. Source: Wan spec, section 1.7.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.convert import engine, flavours
from streamt1_jax.convert.formats import weight_files
from streamt1_jax.convert.formats.lazy import LazyTensor
from streamt1_jax.convert.peft_merge import MergedWeight
from streamt1_jax.convert.tables import wan_dit
from streamt1_jax.io import config_json

CONFIG_FILE = "adapter_config.json"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


class Adapter(NamedTuple):
  """An adapter that fits the model.

  Attributes:
    layers: name of the adapted weight, as the backbone's file has it, to its A and B.
    rank: rows of every A.
    alpha: numerator of the scale.
    scale: alpha / rank, or alpha / sqrt(rank) where peft's configuration says `use_rslora`.
    files: what it was read from.
    skipped: what else these hold.
  """

  layers: dict[str, tuple[LazyTensor, LazyTensor]]
  rank: int
  alpha: float
  scale: float
  files: list[pathlib.Path]
  skipped: list[str]


def load(path: pathlib.Path, model: ModelConfig, names: str, alpha: float | None) -> Adapter:
  """Reads an adapter and compares it with the model.

  Args:
    path: a file with an entry `generator_lora`, a bare peft state dict, or a folder that peft saved.
    model: the model it is for.
    names: whose names the backbone's file has, "Wan" or "diffusers"; the adapter's may be either.
    alpha: the adapter's alpha; None takes it from `adapter_config.json` beside the weights.

  Raises:
    ConfigError: it is no adapter, fits another model, has several ranks, or its alpha is unknown or contradicted.
  """
  where = f"--lora {path}"
  file = weight_files.load(path)
  found = flavours.state_dict(file, flavours.LORA_ENTRIES, None, where)
  tensors = flavours.adapter_names(found.tensors, where)
  rank = wan_dit.adapter_rank(tensors, where)
  try:
    targets = wan_dit.check_lora(tensors, model, rank)
  except engine.FitError as error:
    raise error.prefixed(where) from error
  settings, files = _peft_settings(path)
  alpha = _alpha(alpha, settings, where)
  if settings.get("r", rank) != rank:
    raise ConfigError(f"{where}: {CONFIG_FILE} says rank {settings['r']}, the tensors have {rank}")
  scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
  layers = {}
  for source, wan_name in targets.items():
    weight = f"{wan_name if names == 'Wan' else wan_dit.diffusers_name(wan_name)}.weight"
    layers[weight] = (tensors[source + _DOWN], tensors[source + _UP])
  return Adapter(layers, rank, alpha, scale, [*file.files, *files], found.skipped)


def merged(tensors: Mapping[str, LazyTensor], adapter: Adapter) -> dict[str, LazyTensor | MergedWeight]:
  """`tensors` with the adapted weights as W + scale B A, float32, computed when they are read."""
  return {
    name: MergedWeight(tensor, *adapter.layers[name], adapter.scale) if name in adapter.layers else tensor
    for name, tensor in tensors.items()
  }


def _peft_settings(path: pathlib.Path) -> tuple[dict[str, Any], list[pathlib.Path]]:
  """What peft wrote beside the weights, and the file it is in; nothing if there is none."""
  file = (path if path.is_dir() else path.parent) / CONFIG_FILE
  if not file.is_file():
    return {}, []
  try:
    settings = config_json.parse_strict_json(file.read_text(), str(file))
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{file} cannot be read: {error}") from error
  if not isinstance(settings, dict):
    raise ConfigError(f"{file} must hold a JSON object")
  for setting in ("rank_pattern", "alpha_pattern", "use_dora"):
    if settings.get(setting):
      raise ConfigError(f"{file}: {setting} is not supported, got {settings[setting]!r:.60}")
  return settings, [file]


def _alpha(given: float | None, settings: Mapping[str, Any], where: str) -> float:
  stored = settings.get("lora_alpha")
  if given is None and stored is None:
    raise ConfigError(f"{where} does not say its alpha; give --lora_alpha (LongLive: 256, equal to its rank)")
  for alpha in (value for value in (given, stored) if value is not None):
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
      raise ConfigError(f"{where}: lora_alpha must be a positive number, got {alpha!r:.60}")
  if given is not None and stored is not None and given != stored:
    raise ConfigError(f"{where}: --lora_alpha={given:g}, but {CONFIG_FILE} says {stored:g}")
  return float(stored if given is None else given)
