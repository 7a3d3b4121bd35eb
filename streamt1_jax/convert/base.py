"""A checkpoint flavour: the names and layouts under which one part of the model is published."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from streamt1_jax.config import ModelConfig
from streamt1_jax.convert import engine
from streamt1_jax.convert.engine import LAYER, Rule
from streamt1_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Flavour:
  """One way to publish one part of one model.

  Attributes:
    part: folder of the part in a checkpoint: "backbone", "codec" or "text".
    names: whose names these are, in a word; people read it, and `source.json` records it.
    rules: the mapping table.
    abstract_params: shapes of the part's parameters, as a nested dict.
    aliases: second name of a tensor to its first name. A file may hold either or both.
    entries: where a training program keeps the part, if its file has entries; the first one that is there is taken.
  """

  part: str
  names: str
  rules: tuple[Rule, ...]
  abstract_params: Params = dataclasses.field(repr=False)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  entries: tuple[str, ...] = ("model",)

  @functools.cached_property
  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Name and shape of every tensor. Raises ConfigError if the rules do not fit the parameters."""
    return engine.source_specs(self.rules, self.abstract_params)

  def count_known(self, names: Iterable[str]) -> int:
    """How many of these names the flavour has. The flavour with the most names of a file is the file's."""
    return len({*self.specs, *self.aliases}.intersection(names))

  def names_of(self, rule: Rule) -> list[str]:
    """The tensors that a rule reads, in the order of the layers."""
    if LAYER not in rule.source:
      return [rule.source]
    names = (rule.source.replace(LAYER, str(layer)) for layer in itertools.count())
    return list(itertools.takewhile(self.specs.__contains__, names))

  def under_first_names(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` without second names: an alias becomes the first name, or is dropped where that is there too."""
    first = {name: tensor for name, tensor in tensors.items() if name not in self.aliases}
    return {self.aliases[name]: tensor for name, tensor in tensors.items() if name in self.aliases} | first

  def convert(self, tensors: Mapping[str, Any], dtype: Any = None) -> Params:
    """The parameters in memory, as a nested dict of numpy arrays; see `engine.convert`."""
    return engine.convert(self.under_first_names(tensors), self.rules, self.abstract_params, dtype)

  def invert(self, params: Params) -> dict[str, Shaped[np.ndarray, " ..."]]:
    """The tensors that `convert` turns into `params`; see `engine.invert`."""
    return engine.invert(params, self.rules)


FlavourTable = Mapping[str, Sequence[Callable[[ModelConfig], Flavour]]]
"""Folder of a part to functions that give, for a model that has the part, one flavour each."""


def parts_of(model: ModelConfig) -> list[str]:
  """Folders of the parts of a model; a part is called like its configuration in `ModelConfig`."""
  return [part for part in ("backbone", "codec", "text") if getattr(model, part) is not None]
