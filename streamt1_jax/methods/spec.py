"""What a named search is: its `Method`.

  name ── METHODS ── Method ── settings(model, beam_size=4, ...) ── SearchConfig ── drivers, Pipeline.generate

A method is a way to search a whole video; a policy (`policies`) only says who survives a chunk. Most methods are
settings of the same chunk step. One that restarts or rewinds videos has a driver of its own, `run`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig

SEMANTICS: Mapping[str, Mapping[str, Any]] = {
  "released": {},
  "paper": {
    name: value for name, value in vars(SearchConfig.paper()).items() if value != getattr(SearchConfig(), name)
  },
}
"""By name, the fields of a search in which it differs from the released code."""


@dataclasses.dataclass(frozen=True)
class Method:
  """One named search.

  Attributes:
    name: what --search calls it.
    about: one sentence.
    search: gives the method's own search: (model, **numbers) to SearchConfig.
    fields: fields of `SearchConfig` that a user may set, and "semantics" if a user may choose between the released
      code and the paper. All others belong to the method.
    numbers: parameters of its policy that a user may set, with their defaults; None for one that must be given.
    least: smallest value of a field, where a smaller one would be another method.
    asks: whether its driver judges by the video reward, though its search judges nothing.
    kept: of a method with a `run`, by its numbers: copies of the state that it keeps at most, beside the one in work.
    note: by search and number of chunks, what a user should know of the video, in one line; or None.
    begins: whether its driver makes the first chunk in a way of its own, so that no video may begin with given chunks.
    run: of a method that drives the chunk step in its own way from the host, as `drivers.stream_states` does and with
      its arguments; it also takes `tell` (`tries.Tell`), `newest`, the trace that was yielded with the state that it
      goes on from, and the numbers. None for what `drivers.stream` drives.
  """

  name: str
  about: str
  search: Callable[..., SearchConfig]
  fields: tuple[str, ...] = ()
  numbers: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
  least: Mapping[str, int] = dataclasses.field(default_factory=dict)
  asks: bool = False
  kept: Callable[..., int] | None = None
  note: Callable[[SearchConfig, int], str | None] = lambda search, num_chunks: None
  begins: bool = False
  run: Callable[..., Any] | None = None

  def settings(
    self,
    model: ModelConfig,
    *,
    semantics: str | None = None,
    numbers: Mapping[str, float] | None = None,
    **fields: Any,
  ) -> SearchConfig:
    """The search of this method over `model`.

    Args:
      model: sizes.
      semantics: "released" or "paper"; released unless the method says otherwise.
      numbers: parameters of its policy, by name.
      **fields: fields of `SearchConfig`.

    Raises:
      ConfigError: the method does not let these be set, one that it needs is missing, or the search cannot run.
    """
    refused = self.refused([*(["semantics"] if semantics is not None else []), *fields])
    if refused:
      raise ConfigError(f"search {self.name} takes no {', '.join(refused)}; it takes {self.taken or 'nothing'}")
    if semantics is not None and semantics not in SEMANTICS:
      raise ConfigError(f"semantics must be one of {', '.join(SEMANTICS)}, got {semantics!r}")
    for name, least in self.least.items():
      if fields.get(name, least) < least:
        raise ConfigError(f"search {self.name} needs {name} of at least {least}, got {fields[name]}")
    own = self.search(model, **self._numbers(numbers or {}))
    search = dataclasses.replace(own, **{**SEMANTICS[semantics or "released"], **fields})
    search.validate_for(model)
    return search

  def refused(self, names: Collection[str]) -> list[str]:
    """Those of `names` that a user may not set."""
    return [name for name in names if name not in self.fields]

  @property
  def taken(self) -> str:
    """What a user may set, joined by commas."""
    return ", ".join(self.fields)

  def states_kept(self, numbers: Mapping[str, float]) -> int:
    """Copies of the state that it keeps beside the one in work, with these of its numbers."""
    return 0 if self.kept is None else self.kept(**{**self.numbers, **numbers})

  def _numbers(self, given: Mapping[str, float]) -> dict[str, float]:
    known = ", ".join(self.numbers) or "none"
    for name in given:
      if name not in self.numbers:
        raise ConfigError(f"search {self.name} has no number {name}; known: {known}")
    values = {name: given.get(name, default) for name, default in self.numbers.items()}
    missing = [name for name, value in values.items() if value is None]
    if missing:
      raise ConfigError(f"search {self.name} needs {', '.join(missing)}: --policy={missing[0]}:NUMBER")
    return {name: value for name, value in values.items() if value is not None}
