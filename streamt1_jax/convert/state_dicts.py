"""Finds the weights among everything that a file holds.

  content of a file ── choose an entry ── drop the names of wrappers ──► tensors by name

Source: docs/reference/checkpoints.md.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats.lazy import LazyTensor
from streamt1_jax.convert.formats.weight_files import WeightFile
from streamt1_jax.io import limits, part_files
from streamt1_jax.messages import one_line, shortened

# FSDP, activation checkpointing, torch.compile and DistributedDataParallel put these between the names of modules.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
_NAME_SHOWN = 140  # Characters of an entry's name.
# Entries with tensors that are not the part's weights. Others are refused, so that no weights get lost.
_UNUSED = (
  *("generator*", "critic*", "fake_score*", "real_score*", "discriminator*", "model", "*ema*", "*lora*"),
  *("*optim*", "*scheduler*", "*scaler*", "*rng*", "*random*"),
)


class StateDict(NamedTuple):
  """The weights of one file.

  Attributes:
    tensors: by name, without wrappers.
    entry: the entry of the file that they were in; None if the file holds nothing else.
    skipped: what else the file holds, in words.
  """

  tensors: dict[str, LazyTensor]
  entry: str | None
  skipped: list[str]


def read(file: WeightFile, entries: Sequence[str], entry: str | None, where: str) -> StateDict:
  """Chooses the weights among what a file holds, and drops the names of wrappers.

  Args:
    file: an opened file.
    entries: names of entries that may hold the weights, the preferred one first.
    entry: the one to take; None chooses.
    where: flag and file; begins every message.

  Raises:
    ConfigError: the entry is missing; another entry holds tensors and is not known as training state; a name is not
      a string or a value not a tensor; two names are the same without their wrappers.
  """
  nested = {name: value for name, value in file.content.items() if isinstance(value, Mapping)}
  if not nested:
    if entry is not None:
      raise ConfigError(f"{where} holds plain tensors, no entry {entry!r}")
    return StateDict(_clean(file.content, where), None, [])
  chosen = next((name for name in ([entry] if entry else entries) if name in nested), None)
  if chosen is None:
    wanted = entry or " or ".join(entries) or "plain tensors"
    raise ConfigError(f"{where} has no entry {wanted}; its entries: {part_files.list_some(list(map(_shown, nested)))}")
  skipped, unused = [], (*_UNUSED, *entries)
  for name, value in file.content.items():
    if name == chosen:
      continue
    count = _count_tensors(value)
    skipped.append(f"{_shown(name)} ({count} tensors)" if count else _shown(name))
    if count and not any(fnmatch.fnmatch(str(name), pattern) for pattern in unused):
      raise ConfigError(
        f"{where} has an entry {shortened(name)} of {count} tensors that is neither weights nor training state"
      )
  return StateDict(_clean(nested[chosen], f"{where}, entry {chosen}"), chosen, skipped)


def _shown(name: Any) -> str:
  return one_line(name, _NAME_SHOWN) if isinstance(name, str) else shortened(name)


def _clean(content: Mapping[str, Any], where: str) -> dict[str, LazyTensor]:
  limits.require_few(len(content), where)
  for name, value in content.items():
    if not isinstance(name, str) or not isinstance(value, LazyTensor):
      raise ConfigError(f"{where}: {shortened(name)} is a {type(value).__name__}; expected names and tensors only")
    limits.require_name(name, where)
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


def _count_tensors(value: Any) -> int:
  """Tensors at any depth. Every container is looked into once, because a pickle can nest one in itself."""
  seen: set[int] = set()
  waiting, count = [value], 0
  while waiting:
    item = waiting.pop()
    count += isinstance(item, LazyTensor)
    if isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
      seen.add(id(item))
      waiting.extend(item.values() if isinstance(item, Mapping) else item)
  return count
