"""Which model a file holds, and under whose names: told from the names of its tensors alone.

  content of a file ── choose an entry ── strip wrappers ──► names ── count known names per table ──► flavour

Source: Wan spec, sections 1.6 and 1.7.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.convert import engine
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.formats.lazy import LazyTensor
from streamt1_jax.convert.formats.weight_files import WeightFile
from streamt1_jax.convert.tables import umt5, wan_dit, wan_vae
from streamt1_jax.io import part_files
from streamt1_jax.text.umt5 import UMT5Encoder
from streamt1_jax.typing import Params

BACKBONE_ENTRIES = ("generator", "generator_ema", "model")
"""Where training programs keep the backbone, in the order in which one is chosen."""
LORA_ENTRIES = ("generator_lora",)

# What FSDP, activation checkpointing, torch.compile and DistributedDataParallel put between the names of modules.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
_PEFT = "base_model.model."
_ADAPTER_NAME = "default"
# Entries with tensors that are no weights of the part and may be left out. Others are refused, lest weights get lost.
_UNUSED = (
  *("generator*", "critic*", "fake_score*", "real_score*", "discriminator*", "model", "*ema*", "*lora*"),
  *("*optim*", "*scheduler*", "*scaler*", "*rng*", "*random*"),
)


@dataclasses.dataclass(frozen=True)
class Flavour:
  """One way to publish one part.

  Attributes:
    part: folder of the part: "backbone", "codec" or "text".
    names: whose names these are.
    rules: the mapping table.
    abstract_params: shapes of the part's parameters.
    aliases: second names of tensors, which a file may hold instead or in addition.
  """

  part: str
  names: str
  rules: tuple[Rule, ...]
  abstract_params: Params = dataclasses.field(repr=False)
  aliases: tuple[str, ...] = ()

  @functools.cached_property
  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Name and shape of every tensor."""
    return engine.source_specs(self.rules, self.abstract_params)


PART_NAMES = {"backbone": "a video backbone", "codec": "a video VAE", "text": "a text encoder"}


@functools.cache
def flavours(model: ModelConfig) -> tuple[Flavour, ...]:
  """Every flavour of every part that the model has."""
  backbone = wan_dit.abstract_params(model)
  known = [
    Flavour("backbone", "Wan", tuple(wan_dit.wan_rules(model.backbone)), backbone),
    Flavour("backbone", "diffusers", tuple(wan_dit.diffusers_rules(model.backbone)), backbone),
  ]
  if model.codec is not None:
    codec = engine.abstract_params(lambda: VideoCodec(model.codec, rngs=nnx.Rngs(0)))
    known.append(Flavour("codec", "Wan", wan_vae.rules(model.codec, wan_vae.WAN_NAMES), codec))
    known.append(Flavour("codec", "diffusers", wan_vae.rules(model.codec, wan_vae.DIFFUSERS_NAMES), codec))
  if model.text is not None:
    text = engine.abstract_params(lambda: UMT5Encoder(model.text, nnx.Rngs(0)))
    known.append(Flavour("text", "Wan", umt5.WAN_RULES, text))
    known.append(Flavour("text", "Hugging Face", umt5.HF_RULES, text, (umt5.HF_EMBEDDING_ALIAS,)))
  return tuple(known)


def detect(names: Iterable[str], known: Sequence[Flavour], part: str, where: str) -> Flavour:
  """The flavour with the most of these names.

  Args:
    names: of the tensors of one file, cleaned.
    known: what `flavours` gave.
    part: what the file is wanted for.
    where: flag and file; begins every message.

  Raises:
    ConfigError: the names are those of another part, of an adapter, or of no model at all.
  """
  names = list(names)
  counts = [len({*flavour.specs, *flavour.aliases}.intersection(names)) for flavour in known]
  best = known[counts.index(max(counts))]
  if any(".lora_" in name for name in names):
    raise ConfigError(f"{where} holds a LoRA adapter, not {PART_NAMES[part]}; give it as --lora")
  if max(counts) == 0:
    first = part_files.list_some(sorted(names)) or "none"
    raise ConfigError(f"{where} is not {PART_NAMES[part]}: none of its {len(names)} tensors is known ({first})")
  if best.part != part:
    raise ConfigError(
      f"{where} holds {PART_NAMES[best.part]} ({best.names} names, {max(counts)} tensors), not {PART_NAMES[part]}"
    )
  return best


class StateDict(NamedTuple):
  """The weights of one file.

  Attributes:
    tensors: by cleaned name.
    entry: the entry of the file they were in; None if the file holds nothing else.
    skipped: what else the file holds, in words.
  """

  tensors: dict[str, LazyTensor]
  entry: str | None
  skipped: list[str]


def state_dict(file: WeightFile, entries: Sequence[str], entry: str | None, where: str) -> StateDict:
  """Chooses the weights among what a file holds, and cleans their names.

  Args:
    file: an opened file.
    entries: names of entries that may hold the weights, the preferred one first.
    entry: the one to take; None chooses.
    where: flag and file; begins every message.

  Raises:
    ConfigError: there is no such entry; another entry holds tensors and is no training state; a name is no
      string, a value no tensor, or two names are the same without their wrappers.
  """
  nested = {name: value for name, value in file.content.items() if isinstance(value, Mapping)}
  if not nested:
    if entry is not None:
      raise ConfigError(f"{where} holds plain tensors, no entry {entry!r}")
    return StateDict(_clean(file.content, where), None, [])
  chosen = next((name for name in ([entry] if entry else entries) if name in nested), None)
  if chosen is None:
    wanted = entry or " or ".join(entries) or "plain tensors"
    raise ConfigError(f"{where} has no entry {wanted}; its entries: {part_files.list_some(list(map(str, nested)))}")
  skipped = []
  for name, value in file.content.items():
    count = _count_tensors(value)
    if name != chosen:
      skipped.append(f"{name} ({count} tensors)" if count else str(name))
    if name != chosen and count and not any(fnmatch.fnmatch(str(name), pattern) for pattern in _UNUSED):
      raise ConfigError(f"{where} has an entry {name!r} of {count} tensors that is neither weights nor training state")
  return StateDict(_clean(nested[chosen], f"{where}, entry {chosen}"), chosen, skipped)


def _clean(content: Mapping[str, Any], where: str) -> dict[str, LazyTensor]:
  for name, value in content.items():
    if not isinstance(name, str) or not isinstance(value, LazyTensor):
      raise ConfigError(f"{where}: {name!r:.80} is a {type(value).__name__}; expected names and tensors only")
  pairs = [(_without_wrappers(name), name) for name in content]
  if all(cleaned.startswith("model.") for cleaned, _ in pairs):
    pairs = [(cleaned.removeprefix("model."), name) for cleaned, name in pairs]
  tensors: dict[str, LazyTensor] = {}
  for cleaned, name in pairs:
    if cleaned in tensors:
      raise ConfigError(f"{where} holds {cleaned} twice; once as {name}")
    tensors[cleaned] = content[name]
  return tensors


def _without_wrappers(name: str) -> str:
  return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def adapter_names(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
  """Adapter tensors under the names of `wan_dit.lora_rules`.

  Peft writes `base_model.model.<module>.lora_A.weight`; the prefix may be missing, a `model.` or `transformer.` may
  follow it, and the adapter's name `default` may follow `lora_A`.

  Raises:
    ConfigError: two names are the same then.
  """
  renamed: dict[str, LazyTensor] = {}
  for name, tensor in tensors.items():
    module = name.removeprefix(_PEFT)
    for prefix in ("model.", "transformer."):
      module = module.removeprefix(prefix)
    for matrix in ("lora_A", "lora_B"):
      module = module.replace(f".{matrix}.{_ADAPTER_NAME}.", f".{matrix}.")
    if _PEFT + module in renamed:
      raise ConfigError(f"{where} holds {module} twice; once as {name}")
    renamed[_PEFT + module] = tensor
  return renamed


def _count_tensors(value: Any) -> int:
  """Tensors anywhere inside; every container is looked into once, for a pickle can nest one in itself."""
  seen: set[int] = set()
  waiting, count = [value], 0
  while waiting:
    item = waiting.pop()
    count += isinstance(item, LazyTensor)
    if isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
      seen.add(id(item))
      waiting.extend(item.values() if isinstance(item, Mapping) else item)
  return count
