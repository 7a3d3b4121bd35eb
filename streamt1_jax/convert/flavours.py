"""The table of checkpoint flavours. Which one a file has is told from the names of its tensors alone.

  from streamt1_jax.convert.flavours import FLAVOURS

  mine = {**FLAVOURS, "backbone": (*FLAVOURS["backbone"], my_flavour)}
  plans = plan.make_plans(model, sources, mine)

`my_flavour(model)` gives a `base.Flavour`. Source: docs/reference/checkpoints.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.convert.base import Flavour, FlavourTable, parts_of
from streamt1_jax.convert.tables import umt5, wan_dit, wan_vae
from streamt1_jax.io import part_files

FLAVOURS: FlavourTable = {
  "backbone": (wan_dit.wan_flavour, wan_dit.diffusers_flavour),
  "codec": (wan_vae.wan_flavour, wan_vae.diffusers_flavour),
  "text": (umt5.wan_flavour, umt5.hugging_face_flavour),
}
"""Part of a model to what makes the flavours that its file may have, each from the model's sizes."""
PART_NAMES = {"backbone": "a video backbone", "codec": "a video VAE", "text": "a text encoder"}


def of_model(model: ModelConfig, table: FlavourTable = FLAVOURS) -> tuple[Flavour, ...]:
  """Every flavour of every part that the model has."""
  return tuple(_made(make, model) for part in parts_of(model) for make in table.get(part, ()))


@functools.cache
def _made(make: Callable[[ModelConfig], Flavour], model: ModelConfig) -> Flavour:
  return make(model)


def detect(names: Iterable[str], known: Sequence[Flavour], part: str, where: str) -> Flavour:
  """The flavour with the most of these names.

  Args:
    names: names of the tensors of one file, without wrappers.
    known: the flavours of the model, of all its parts.
    part: the part that the file is wanted for.
    where: flag and file; begins every message.

  Raises:
    ConfigError: the names are those of another part, of an adapter, or of no part at all.
  """
  names = list(names)
  best = max(known, key=lambda flavour: flavour.count_known(names))
  count = best.count_known(names)
  if any(".lora_" in name for name in names):
    raise ConfigError(f"{where} holds a LoRA adapter, not {PART_NAMES[part]}; give it as --lora")
  if count == 0:
    first = part_files.list_some(sorted(names)) or "none"
    raise ConfigError(f"{where} is not {PART_NAMES[part]}: none of its {len(names)} tensors is known ({first})")
  if best.part != part:
    raise ConfigError(
      f"{where} holds {PART_NAMES[best.part]} ({best.names} names, {count} tensors), not {PART_NAMES[part]}"
    )
  return best
