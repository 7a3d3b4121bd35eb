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
from streamt1_jax.convert import adapters, engine, flavours
from streamt1_jax.convert.flavours import Flavour
from streamt1_jax.convert.formats import weight_files
from streamt1_jax.convert.formats.lazy import LazyTensor
from streamt1_jax.convert.peft_merge import MergedWeight
from streamt1_jax.convert.tables import umt5
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.rewards.folder import REWARDS_FOLDER

FLAGS = {
  "backbone": "--backbone",
  "codec": "--vae",
  "text": "--text_encoder",
  **{f"{REWARDS_FOLDER}/{name}": f"--{name}" for name in CONVERSIONS},
}
"""Folder of a part to the flag that names its source."""


@dataclasses.dataclass(frozen=True)
class Sources:
  """The published files; None for what is not given.

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
    flavour: whose names the source has; its mapping table.
    config: sizes of the part, a dataclass.
    tensors: the source, by the names of the table; adapters are merged when a tensor is read.
    files: every file that is read.
    entry: the entry of the file that is taken, if it has entries.
    adapter: what is merged into it.
    skipped: what the files hold besides, in words.
  """

  part: str
  flavour: Flavour
  config: Any
  tensors: Mapping[str, LazyTensor | MergedWeight] = dataclasses.field(repr=False)
  files: list[pathlib.Path]
  entry: str | None
  adapter: adapters.Adapter | None
  skipped: list[str]

  def leaves(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What is stored, by "/"-joined path."""
    return engine.stored_leaves(self.flavour.abstract_params, dtype)

  def stored_bytes(self, dtype: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves(dtype).values())

  def source_bytes(self) -> int:
    """Bytes of the tensors as they will be read."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

  def extra_files(self) -> dict[str, bytes]:
    """What the folder holds beside weights, by name."""
    return {}

  def further_provenance(self) -> dict[str, Any]:
    """JSON values that decide the bytes of the part, beside those of every part."""
    return {}

  def further_lines(self) -> Iterator[str]:
    """What `describe` says beside that of every part."""
    yield from ()


def make_plans(model: ModelConfig, sources: Sources) -> list[PartPlan]:
  """One plan per part that is given.

  Raises:
    ConfigError: a source is missing, damaged, of another part or of another model; or flags contradict each other.
      It is an `engine.FitError`, which lists every tensor, where names or shapes differ.
  """
  if sources.backbone is None and (sources.lora or sources.backbone_entry):
    flag = "--lora" if sources.lora else "--backbone_entry"
    raise ConfigError(f"{flag} needs --backbone, the weights it belongs to")
  if sources.lora_alpha is not None and sources.lora is None:
    raise ConfigError("--lora_alpha needs --lora")
  known = flavours.flavours(model)
  plans = []
  if sources.backbone is not None:
    plans.append(_plan_backbone(model, known, sources))
  for part, path in (("codec", sources.vae), ("text", sources.text_encoder)):
    if path is not None:
      if not any(flavour.part == part for flavour in known):
        raise ConfigError(f"{FLAGS[part]}: the model {model.name!r} has no {part}")
      plans.append(_plan_part(model, known, part, path, flavours.BACKBONE_ENTRIES[-1:], None))
  return plans


def _plan_backbone(model: ModelConfig, known: Sequence[Flavour], sources: Sources) -> PartPlan:
  plan = _plan_part(model, known, "backbone", sources.backbone, flavours.BACKBONE_ENTRIES, sources.backbone_entry)
  if sources.lora is None:
    return plan
  adapter = adapters.load(sources.lora, model, plan.flavour.names, sources.lora_alpha)
  return dataclasses.replace(plan, tensors=adapters.merged(plan.tensors, adapter), adapter=adapter)


def _plan_part(
  model: ModelConfig,
  known: Sequence[Flavour],
  part: str,
  path: pathlib.Path,
  entries: Sequence[str],
  entry: str | None,
) -> PartPlan:
  where = f"{FLAGS[part]} {path}"
  file = weight_files.load(path)
  found = flavours.state_dict(file, entries, entry, where)
  flavour = flavours.detect(found.tensors, known, part, where)
  tensors, skipped = found.tensors, list(found.skipped)
  if flavour.aliases:
    tensors = umt5.with_one_embedding(tensors)
    skipped += [f"{name} (a second name)" for name in flavour.aliases if len(tensors) < len(found.tensors)]
  try:
    engine.check(tensors, flavour.rules, flavour.abstract_params)
  except engine.FitError as error:
    raise error.prefixed(f"{where}{weight_files.shard_advice(path)} as {flavour.names} {part}") from error
  # Parts are called like their configurations.
  return PartPlan(part, flavour, getattr(model, part), tensors, file.files, found.entry, None, skipped)


def missing_parts(model: ModelConfig, present: Sequence[str]) -> list[str]:
  """Folders of the parts that the model needs and that are not among `present`."""
  needed = ["backbone", *(["codec"] if model.codec else []), *(["text"] if model.text else [])]
  return [part for part in needed if part not in present]


def describe(plan: PartPlan, dtype: Any) -> Iterator[str]:
  """The plan for people: files, sizes, what is merged and skipped, and one line per rule of the mapping."""
  leaves = plan.leaves(dtype)
  count = sum(leaf.size for leaf in leaves.values())
  yield (
    f"{plan.part}/ from {FLAGS[plan.part]}, {plan.flavour.names} names: {len(plan.tensors)} tensors, "
    f"{count:,} parameters, {plan.stored_bytes(dtype):,} bytes to write"
  )
  files = [*plan.files, *(plan.adapter.files if plan.adapter else [])]
  yield from (f"  file {path}, {path.stat().st_size:,} bytes" for path in files)
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
