"""Configuration dataclasses as JSON values and back. A missing, unknown or mistyped field is an error."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar, cast

from streamt1_jax.config import LATER, ConfigError

Config = TypeVar("Config")
_SCALAR_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def to_json_value(value: Any) -> Any:
  """A dataclass as a dict and a tuple as a list. Other values stay. `from_json_value` is the inverse.

  A field that older files lack (`config.LATER`) is left out at its default. A dataclass in a field of type Any, such as
  `SearchConfig.policy`, has the name of its class under "type": what reads it must know which classes it may be.
  """
  if dataclasses.is_dataclass(value):
    return {
      field.name: _field_to_json(field, getattr(value, field.name))
      for field in dataclasses.fields(value)
      if not (_is_later(field) and getattr(value, field.name) == field.default)
    }
  if isinstance(value, tuple):
    return [to_json_value(item) for item in value]
  return value


def _field_to_json(field: dataclasses.Field, item: Any) -> Any:
  value = to_json_value(item)
  any_class = field.type in (Any, "Any") and dataclasses.is_dataclass(item)
  return {"type": type(item).__name__} | value if any_class else value


def _is_later(field: dataclasses.Field) -> bool:
  return LATER.items() <= field.metadata.items()


def from_json_value(config_type: type[Config], value: Any, where: str) -> Config:
  """The instance of the dataclass `config_type` that `value` describes.

  Args:
    config_type: a dataclass whose fields are int, float, bool, str, Literal, tuples of those, other dataclasses, or
      optional ones of these.
    value: what `to_json_value` gave, or what JSON made of it.
    where: file and field that `value` came from. Every message begins with it.

  Raises:
    ConfigError: a field is missing, unknown or of another type, or the dataclass refuses the values.
  """
  if not isinstance(value, dict):
    raise ConfigError(f"{where} must be an object, got {_shorten(value)}")
  hints = typing.get_type_hints(config_type)
  fields = dataclasses.fields(cast(Any, config_type))
  known = [field.name for field in fields]
  missing = [f.name for f in fields if f.name not in value and not _is_later(f)]
  unknown = sorted(set(value) - set(known))
  if missing:
    raise ConfigError(f"{where} lacks {', '.join(missing)}")
  if unknown:
    raise ConfigError(f"{where} has unknown {', '.join(map(_shorten, unknown))}; known: {', '.join(known)}")
  fields = {name: _parse(hints[name], value[name], f"{where}.{name}") for name in known if name in value}
  try:
    return config_type(**fields)
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from error


def _parse(hint: Any, value: Any, where: str) -> Any:
  origin = typing.get_origin(hint)
  if origin in (types.UnionType, typing.Union):
    inner = [option for option in typing.get_args(hint) if option is not type(None)]
    return None if value is None else _parse(inner[0], value, where)
  if origin is typing.Literal:
    return _parse_literal(typing.get_args(hint), value, where)
  if origin is tuple:
    return _parse_tuple(typing.get_args(hint), value, where)
  if dataclasses.is_dataclass(hint):
    return from_json_value(cast(type, hint), value, where)
  return _parse_scalar(hint, value, where)


def _parse_literal(allowed: tuple, value: Any, where: str) -> Any:
  if value not in allowed:
    raise ConfigError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {_shorten(value)}")
  return value


def _parse_tuple(item_types: tuple, value: Any, where: str) -> tuple:
  if not isinstance(value, list):
    raise ConfigError(f"{where} must be a list, got {_shorten(value)}")
  return tuple(_parse(item_types[0], item, f"{where}[{index}]") for index, item in enumerate(value))


def _parse_scalar(scalar_type: type, value: Any, where: str) -> Any:
  # Many tools write 5.0 as 5 in JSON, so an integer is a float here. True is never a number.
  accepted = (int, float) if scalar_type is float else (scalar_type,)
  if type(value) not in accepted:
    raise ConfigError(f"{where} must be {_SCALAR_NAMES[scalar_type]}, got {_shorten(value)}")
  return scalar_type(value)


def parse_strict_json(text: str, where: str) -> Any:
  """`text` as JSON values. Raises ConfigError, naming `where`, if it is not strict JSON, which has no NaN."""

  def refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")

  def finite(number: str) -> float:
    if not math.isfinite(float(number)):
      refuse(number)
    return float(number)

  try:
    return json.loads(text, parse_constant=refuse, parse_float=finite)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{where} is not valid JSON: {error}") from error


def _shorten(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."
