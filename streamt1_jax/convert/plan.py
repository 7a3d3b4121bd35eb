"""What a conversion will do: every published file opened, recognised and compared with the model; nothing is written.

--backbone (+ --lora) ─┐
--vae ─────────────────┼─ open, choose entry, recognise, compare ──► one PartPlan per folder of the checkpoint
--text_encoder ────────┘
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.convert import adapters, engine, known_files, state_dicts
from streamt1_jax.convert.base import Flavour, FlavourTable
from streamt1_jax.convert.flavours import FLAVOURS, detect, of_model
from streamt1_jax.convert.formats import weight_files
from streamt1_jax.convert.peft_merge import Tensor

FLAGS = {"backbone": "--backbone", "codec": "--vae", "text": "--text_encoder"}
"""Folder of a part of the model to the flag that names its source."""


def flag_of(part: str) -> str:
  """The flag that names the source of a part; a reward, in `rewards/NAME`, has the flag `--NAME`."""
  return FLAGS.get(part, f"--{part.rpartition('/')[2]}")


@dataclasses.dataclass(frozen=True)
class Sources:
  """The published files; None stands for a file that is not given.

  Attributes:
    backbone: weights of the DiT.
    backbone_entry: entry of that file to take, where it has several.
    lora: adapter to merge into the backbone.
    lora_alpha: the adapter's alpha, where its files do not say it.
    vae: weights of the video VAE.
    text_encoder: weights of the UMT5 encoder.
  """

  backbone: pathlib.Path | None = None
  backbone_entry: str | None = None
  lora: pathlib.Path | None = None
  lora_alpha: float | None = None
  vae: pathlib.Path | None = None
  text_encoder: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class PartPlan:
  """One part whose source fits the model.

  Attributes:
    part: folder of the part.
    flavour: the names that the source has, and their mapping table.
    config: sizes of the part, a dataclass.
    tensors: the source, by the names of the table; adapters are merged when a tensor is read.
    files: every file that is read.
    entry: the entry of the file that is taken, if the file has entries.
    adapter: the adapter that is merged into the weights, or None.
    skipped: what else the files hold, in words.
  """

  part: str
  flavour: Flavour
  config: Any
  tensors: Mapping[str, Tensor] = dataclasses.field(repr=False)
  files: list[pathlib.Path]
  entry: str | None
  adapter: adapters.Adapter | None
  skipped: list[str]

  def leaves(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every stored weight, by "/"-joined path."""
    return engine.stored_leaves(self.flavour.abstract_params, dtype)

  def stored_bytes(self, dtype: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves(dtype).values())

  def source_bytes(self) -> int:
    """Bytes of the tensors as they will be read."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

  def extra_files(self) -> dict[str, bytes]:
    """Files that the folder holds beside the weights: name to content."""
    return {}

  def further_sources(self) -> list[pathlib.Path]:
    """Files that are read beside those of the weights, and that somebody publishes as they are."""
    return []

  def further_provenance(self) -> dict[str, Any]:
    """JSON values that decide the bytes of this kind of part, in addition to those that decide every part."""
    return {}

  def further_lines(self) -> Iterator[str]:
    """Lines that `describe` adds for this kind of part."""
    yield from ()


def make_plans(model: ModelConfig, sources: Sources, flavours: FlavourTable = FLAVOURS) -> list[PartPlan]:
  """One plan per part that is given.

  Args:
    model: the model.
    sources: the published files.
    flavours: the flavours that are recognised.

  Raises:
    ConfigError: a source is missing, damaged, of another part or of another model; or flags contradict each other.
      It is an `engine.FitError`, which lists every tensor, where names or shapes differ.
  """
  if sources.backbone is None and (sources.lora or sources.backbone_entry):
    flag = "--lora" if sources.lora else "--backbone_entry"
    raise ConfigError(f"{flag} needs --backbone, the weights it belongs to")
  if sources.lora_alpha is not None and sources.lora is None:
    raise ConfigError("--lora_alpha needs --lora")
  known = of_model(model, flavours)
  plans = []
  if sources.backbone is not None:
    plan = _plan_part(model, known, "backbone", sources.backbone, sources.backbone_entry)
    plans.append(plan if sources.lora is None else _with_adapter(plan, known, sources.lora, sources.lora_alpha))
  for part, path in (("codec", sources.vae), ("text", sources.text_encoder)):
    if path is not None:
      plans.append(_plan_part(model, known, part, path))
  return plans


def _plan_part(
  model: ModelConfig, known: Sequence[Flavour], part: str, path: pathlib.Path, entry: str | None = None
) -> PartPlan:
  candidates = [flavour for flavour in known if flavour.part == part]
  if not candidates:
    raise ConfigError(f"{flag_of(part)}: the model {model.name!r} has no {part}")
  where = f"{flag_of(part)} {path}"
  file = weight_files.load(path)
  entries = list(dict.fromkeys(entry for flavour in candidates for entry in flavour.entries))
  found = state_dicts.read(file, entries, entry, where)
  flavour = detect(found.tensors, known, part, where)
  tensors = flavour.under_first_names(found.tensors)
  twice = [name for name, first in flavour.aliases.items() if {name, first} <= found.tensors.keys()]
  try:
    engine.check(tensors, flavour.rules, flavour.abstract_params)
  except engine.FitError as error:
    raise error.prefixed(f"{where}{weight_files.shard_advice(path)} as {flavour.names} {part}") from error
  skipped = [*found.skipped, *(f"{name} (a second name)" for name in twice)]
  return PartPlan(part, flavour, getattr(model, part), tensors, file.files, found.entry, None, skipped)


def _with_adapter(plan: PartPlan, known: Sequence[Flavour], path: pathlib.Path, alpha: float | None) -> PartPlan:
  candidates = [flavour for flavour in known if flavour.part == plan.part]
  adapter = adapters.load(path, alpha, plan.flavour, candidates)
  return dataclasses.replace(plan, tensors=adapters.merged(plan.tensors, adapter), adapter=adapter)


def describe(plan: PartPlan, dtype: Any) -> Iterator[str]:
  """The plan in lines to read: files, sizes, what is merged and skipped, and one line per rule of the mapping."""
  leaves = plan.leaves(dtype)
  count = sum(leaf.size for leaf in leaves.values())
  yield (
    f"{plan.part}/ from {flag_of(plan.part)}, {plan.flavour.names} names: {len(plan.tensors)} tensors, "
    f"{count:,} parameters, {plan.stored_bytes(dtype):,} bytes to write"
  )
  files = [*plan.files, *(plan.adapter.files if plan.adapter else [])]
  yield from (f"  file {path}, {_told_size(path.stat().st_size)}" for path in files)
  if plan.entry is not None:
    yield f"  entry {plan.entry}"
  if plan.adapter is not None:
    adapter = plan.adapter
    yield f"  merges a LoRA into {len(adapter.layers)} layers: rank {adapter.rank}, alpha {adapter.alpha:g}"
  yield from (f"  skips {what}" for what in [*plan.skipped, *(plan.adapter.skipped if plan.adapter else [])])
  yield from (f"  {line}" for line in plan.further_lines())
  for rule in plan.flavour.rules:
    leaf = leaves[rule.path.replace(".", "/")]
    yield f"  {rule.source} -> {rule.path} {list(leaf.shape)} {leaf.dtype}"


def _told_size(size: int) -> str:
  published = known_files.guess(size)
  return f"{size:,} bytes" + (f", {published}" if published else "")
