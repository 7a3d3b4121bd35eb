"""LoRA adapters from files, merged into the tensors of a backbone while these are read.

W' = W + (alpha / rank) B A, in float32; W `[out, in]`, A `[rank, in]`, B `[out, rank]`.
Source: docs/reference/checkpoints.md.

An adapter names layers as some flavour does, which need not be the flavour of the backbone's file:

  blocks.0.attn1.to_q.lora_A.weight ─ diffusers' rule ─ blocks.self_attention.query.kernel ─ Wan's rule ─┐
                                                                     blocks.0.self_attn.q.weight is merged
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from streamt1_jax.config import ConfigError, required
from streamt1_jax.convert import engine, state_dicts
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.formats import weight_files
from streamt1_jax.convert.formats.lazy import LazyTensor
from streamt1_jax.convert.peft_merge import PREFIX, MergedWeight, Tensor
from streamt1_jax.io import config_json
from streamt1_jax.messages import shortened

CONFIG_FILE = "adapter_config.json"
ENTRIES = ("generator_lora",)
_WEIGHT, _DOWN, _UP = ".weight", ".lora_A.weight", ".lora_B.weight"
_ADAPTER_NAME = "default"
_MAX_ALPHA = 1e9


class Adapter(NamedTuple):
  """An adapter that fits the model.

  Attributes:
    layers: name of the adapted weight, as the backbone's file has it, to its A and B.
    rank: rows of every A.
    alpha: numerator of the scale.
    scale: alpha / rank, or alpha / sqrt(rank) where peft's configuration says `use_rslora`.
    files: what it was read from.
    skipped: what else these files hold, in words.
  """

  layers: dict[str, tuple[LazyTensor, LazyTensor]]
  rank: int
  alpha: float
  scale: float
  files: list[pathlib.Path]
  skipped: list[str]


def load(path: pathlib.Path, alpha: float | None, backbone: Flavour, known: Sequence[Flavour]) -> Adapter:
  """Reads an adapter and compares it with the model.

  Args:
    path: a file with an entry `generator_lora`, a bare peft state dict, or a folder that peft saved.
    alpha: the adapter's alpha; None takes it from `adapter_config.json` beside the weights.
    backbone: the flavour of the backbone's file.
    known: the flavours that the adapter may have.

  Raises:
    ConfigError: the file holds no adapter, or one for another model or of several ranks; or its alpha is unknown or
      contradicted.
  """
  where = f"--lora {path}"
  file = weight_files.load(path)
  found = state_dicts.read(file, ENTRIES, None, where)
  try:
    layers, rank = fit(found.tensors, backbone, known, where)
  except engine.FitError as error:
    raise error.prefixed(where) from error
  settings, files = _peft_settings(path)
  alpha = _alpha(alpha, settings, where)
  if settings.get("r", rank) != rank:
    raise ConfigError(f"{where}: {CONFIG_FILE} says rank {shortened(settings['r'])}, the tensors have {rank}")
  scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
  return Adapter(layers, rank, alpha, scale, [*file.files, *files], found.skipped)


def fit(
  tensors: Mapping[str, Any], backbone: Flavour, known: Sequence[Flavour], where: str
) -> tuple[dict[str, tuple[Any, Any]], int]:
  """Compares an adapter with the model.

  A linear layer may be left out of all blocks, but not of some.

  Args:
    tensors: names, with or without peft's prefix, to anything with `shape` and `dtype`.
    backbone: the flavour of the tensors that it will be merged into.
    known: the flavours that the adapter may have.
    where: begins every message but those of a FitError.

  Returns:
    Adapted weights by the backbone's names, each with its A and B; and the rank.

  Raises:
    ConfigError: the adapter has no rank or several, or another layout than the backbone's.
    FitError: names or shapes differ from the model's.
  """
  tensors = _under_plain_names(tensors, where)
  rank = _rank(tensors, where)
  tables = [(flavour, _matrices(flavour, rank)) for flavour in known]
  flavour, table = max(tables, key=lambda entry: len(_joined(entry[1]).keys() & tensors.keys()))
  adapted = {rule: specs for rule, specs in table.items() if specs.keys() & tensors.keys()} or table
  engine.compare(tensors, _joined(adapted))
  targets = {(rule.path, rule.transform): backbone.names_of(rule) for rule in backbone.rules}
  layers = {}
  for rule in adapted:
    if (rule.path, rule.transform) not in targets:
      raise ConfigError(f"{where}: {flavour.names} keeps {rule.source} in another layout than {backbone.names}")
    for name, target in zip(flavour.names_of(rule), targets[rule.path, rule.transform], strict=True):
      module = name.removesuffix(_WEIGHT)
      layers[target] = tensors[module + _DOWN], tensors[module + _UP]
  return layers, rank


def _under_plain_names(tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Names as `<module>.lora_A.weight`.

  Peft writes `base_model.model.<module>.lora_A.weight`. The prefix may be missing, a `model.` or `transformer.` may
  follow it, and the adapter's name `default` may follow `lora_A`.

  Raises:
    ConfigError: two names are the same then.
  """
  renamed: dict[str, Any] = {}
  for name, tensor in tensors.items():
    plain = name
    for prefix in (PREFIX, "model.", "transformer."):
      plain = plain.removeprefix(prefix)
    for matrix in ("lora_A", "lora_B"):
      plain = plain.replace(f".{matrix}.{_ADAPTER_NAME}.", f".{matrix}.")
    if plain in renamed:
      raise ConfigError(f"{where} holds {plain} twice; once as {name}")
    renamed[plain] = tensor
  return renamed


def _rank(tensors: Mapping[str, Any], where: str) -> int:
  ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_DOWN) and tensor.shape})
  if len(ranks) != 1 or ranks == [0]:
    raise ConfigError(f"{where} needs one rank, found {shortened(ranks) if ranks else 'no lora_A tensors'}")
  return ranks[0]


def _matrices(flavour: Flavour, rank: int) -> dict[Rule, dict[str, jax.ShapeDtypeStruct]]:
  """Name and shape of A and B of every linear layer, by the rule of its weight `[out, in]`."""
  matrices: dict[Rule, dict[str, jax.ShapeDtypeStruct]] = {}
  for rule in flavour.rules:
    for name in flavour.names_of(rule) if rule.source.endswith(_WEIGHT) else ():
      if len(flavour.specs[name].shape) != 2:
        continue
      outputs, inputs = flavour.specs[name].shape
      module, of_rule = name.removesuffix(_WEIGHT), matrices.setdefault(rule, {})
      of_rule[module + _DOWN] = jax.ShapeDtypeStruct((rank, inputs), np.float32)
      of_rule[module + _UP] = jax.ShapeDtypeStruct((outputs, rank), np.float32)
  return matrices


def _joined(matrices: Mapping[Rule, Mapping[str, Any]]) -> dict[str, Any]:
  return {name: spec for of_rule in matrices.values() for name, spec in of_rule.items()}


def merged(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
  """`tensors` with the adapted weights as W + scale B A, float32, computed when they are read."""
  return {
    name: MergedWeight(tensor, *adapter.layers[name], adapter.scale) if name in adapter.layers else tensor
    for name, tensor in tensors.items()
  }


def _peft_settings(path: pathlib.Path) -> tuple[dict[str, Any], list[pathlib.Path]]:
  """What peft wrote beside the weights, and the file it is in; nothing if there is no such file."""
  file = (path if path.is_dir() else path.parent) / CONFIG_FILE
  if not file.is_file():
    return {}, []
  settings = config_json.read_json(file, str(file))
  if not isinstance(settings, dict):
    raise ConfigError(f"{file} must hold a JSON object")
  for setting in ("rank_pattern", "alpha_pattern", "use_dora"):
    if settings.get(setting):
      raise ConfigError(f"{file}: {setting} is not supported, got {shortened(settings[setting])}")
  if settings.get("use_rslora") not in (None, True, False):
    raise ConfigError(f"{file}: use_rslora must be true or false, got {shortened(settings['use_rslora'])}")
  return settings, [file]


def _alpha(given: float | None, settings: Mapping[str, Any], where: str) -> float:
  stored = settings.get("lora_alpha")
  if given is None and stored is None:
    raise ConfigError(f"{where} does not say its alpha; give --lora_alpha (LongLive: 256, equal to its rank)")
  for alpha in (value for value in (given, stored) if value is not None):
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= _MAX_ALPHA:
      raise ConfigError(f"{where}: lora_alpha must be a positive number of at most 1e9, got {shortened(alpha)}")
  if given is not None and stored is not None and given != stored:
    raise ConfigError(f"{where}: --lora_alpha={given:g}, but {CONFIG_FILE} says {stored:g}")
  return float(required(stored if given is None else given, f"{where}: alpha"))
