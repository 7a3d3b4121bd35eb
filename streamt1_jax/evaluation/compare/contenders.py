"""What takes part in a comparison: `method:SIZE:name=value`, as a search and the way to drive it.

  stream_t1                     the method at its own size
  stream_t1:4x1                 candidates x beams
  best_of_n:8                   N of a method with one size; of plain videos the reward picks the best of N
  particles:1x8:alpha=0.02      a number of its policy or its driver, or a field of the search

Every entry has a label of its own, by which its videos are found again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig
from streamt1_jax.io import config_json
from streamt1_jax.messages import shortened
from streamt1_jax.methods import METHODS, Method, find

SIZES = ("beam_size", "top_k")
"""Fields that a size sets: candidates of a beam, and beams."""


class Contender(NamedTuple):
  """One of those that are compared.

  Attributes:
    label: the method's name with its size.
    method: as the table has it.
    search: how it searches.
    numbers: of its policy or its driver, where the user gave some.
    picks: N of a method that picks the best of N plain videos, 1 for plain streaming itself; None for one that makes
      videos of its own.
  """

  label: str
  method: Method
  search: SearchConfig
  numbers: Mapping[str, float]
  picks: int | None

  @property
  def run(self) -> Callable[..., Any] | None:
    """Drives the chunk step; None where `drivers.stream_states` does."""
    run = self.method.run
    return None if run is None else functools.partial(run, **{**self.method.numbers, **self.numbers})

  @property
  def settings(self) -> dict[str, Any]:
    """What decides its videos, as JSON values."""
    return {"method": self.method.name, **config_json.to_json_value(self.search), "numbers": dict(self.numbers)}


def read(
  entries: Sequence[str],
  model: ModelConfig,
  *,
  numbers: Mapping[str, float] | None = None,
  fields: Mapping[str, Any] | None = None,
  methods: Mapping[str, Method] = METHODS,
) -> list[Contender]:
  """The contenders that --methods names.

  Args:
    entries: as above.
    model: sizes.
    numbers: of policies and drivers; each method takes those that it has, unless its entry says otherwise.
    fields: of `SearchConfig` or "semantics"; each method takes those that it leaves open, as with numbers.
    methods: the methods there are.

  Raises:
    ConfigError: an unknown method, an impossible size, two entries that are the same, a number or field that no method
      takes, or a field for the plain videos of one method alone.
  """
  numbers, fields = numbers or {}, fields or {}
  if not entries:
    raise ConfigError(f"at least one method must be given; known: {', '.join(methods)}")
  chosen = [_entry(entry, methods) for entry in entries]
  for name in numbers:
    if not any(name in each.method.numbers for each in chosen):
      raise ConfigError(f"none of these methods has a number {shortened(name)}")
  for name in fields:
    if not any(name in each.method.fields for each in chosen):
      raise ConfigError(f"none of these methods takes {name}")
  found = [_contender(each, model, numbers, fields) for each in chosen]
  labels = [contender.label for contender in found]
  for label in labels:
    if labels.count(label) > 1:
      raise ConfigError(f"{label} is given twice")
  return found


class _Entry(NamedTuple):
  """What one entry says: the method, fields that its size sets, and its own numbers and fields."""

  method: Method
  sizes: dict[str, int]
  numbers: dict[str, float]
  fields: dict[str, Any]


def _entry(entry: str, methods: Mapping[str, Method]) -> _Entry:
  name, *rest = entry.split(":")
  method = find(name, methods)
  size = "" if not rest or "=" in rest[0] else rest.pop(0)
  numbers, fields = {}, {}
  for option in rest:
    key, separator, value = option.partition("=")
    known = (*method.numbers, *(each for each in method.fields if each not in SIZES))
    if not separator or key not in known:
      raise ConfigError(f"{entry}: {option!r} is not name=value; {name} has {', '.join(known) or 'no names'}")
    kind = float if key in method.numbers else _kind(key)
    try:
      (numbers if key in method.numbers else fields)[key] = kind(value)
    except ValueError as error:
      raise ConfigError(f"{entry}: {key} is no {kind.__name__}: {value!r}") from error
  for key, number in numbers.items():
    if not math.isfinite(number):
      raise ConfigError(f"{entry}: {key} is not a finite number: {number}")
  return _Entry(method, _sizes(method, size), numbers, fields)


def _kind(field: str) -> type:
  """What values of a field are: numbers by its type hint, and texts otherwise."""
  hint = typing.get_type_hints(SearchConfig).get(field, str)
  return next((kind for kind in (int, float) if kind in (hint, *typing.get_args(hint))), str)


def _contender(entry: _Entry, model: ModelConfig, numbers: Mapping[str, float], fields: Mapping[str, Any]) -> Contender:
  method, sizes = entry.method, entry.sizes
  own_numbers = {name: value for name, value in numbers.items() if name in method.numbers} | entry.numbers
  own_fields = {name: value for name, value in fields.items() if name in method.fields} | entry.fields
  settings = functools.partial(method.settings, model, numbers=own_numbers, **own_fields)
  # Fields may need the size's candidates. Its beams may be more than one batch holds.
  base = settings(**{name: size for name, size in sizes.items() if name != "top_k"})
  if method.run is None and _is_plain(base, model):
    if entry.fields:
      names = ", ".join(f"--{name}" for name in entry.fields)
      raise ConfigError(f"{method.name} takes its videos from the pool that all methods share: give {names} for all")
    # Videos are made one at a time, so there may be more than fit in one batch.
    n = sizes.get("top_k", base.top_k)
    settings(**{name: min(n, base.top_k) for name in ("top_k",) if name in method.fields})
    return Contender(_label(entry, {"top_k": n}), method, base, own_numbers, n)
  search = settings(**sizes)
  return Contender(_label(entry, vars(search)), method, search, own_numbers, None)


def _is_plain(search: SearchConfig, model: ModelConfig) -> bool:
  """Whether it makes plain videos, one or several, and judges nothing but whole videos."""
  plain = SearchConfig.streaming(model)
  alike = {"top_k": 1, "policy": None, "sink_distance": None, "reward_codec": plain.reward_codec}
  return dataclasses.replace(search, **alike) == plain


def _sizes(method: Method, size: str) -> dict[str, int]:
  """The fields that a size sets; none if it is left out."""
  if not size:
    return {}
  named, parts = f"{method.name}:{size}", size.split("x")
  if not all(part.isascii() and part.isdigit() for part in parts) or len(parts) > 2:
    raise ConfigError(f"{named}: a size is N or candidates x beams, as in best_of_n:4 and stream_t1:2x2")
  open_fields = [name for name in SIZES if name in method.fields]
  if len(parts) != len(open_fields):
    allowed = {0: "no size", 1: f"one number, its {''.join(open_fields)}", 2: "candidates x beams, as in 2x2"}
    raise ConfigError(f"{named}: {method.name} takes {allowed[len(open_fields)]}")
  return dict(zip(open_fields, map(int, parts), strict=True))


def _label(entry: _Entry, values: Mapping[str, Any]) -> str:
  """The method's name, its size, and what its entry sets."""
  sizes = [str(values[name]) for name in SIZES if name in entry.method.fields]
  own = [f"{name}={value:g}" for name, value in entry.numbers.items()]
  own += [f"{name}={value}" for name, value in entry.fields.items()]
  return ":".join([entry.method.name, *(["x".join(sizes)] if sizes else []), *own])
