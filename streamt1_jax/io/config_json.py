"""Configuration dataclasses as JSON values and back. A missing, unknown or mistyped field is an error."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import types
import typing
from typing import Any, TypeVar, cast

from etils import epath

from streamt1_jax.config import LATER, ConfigError
from streamt1_jax.messages import shortened

MAX_JSON_BYTES = 64 * 2**20
"""The index of a sharded model has 0.1 MB."""
# Two brackets are two bytes of text and up to 64 bytes of memory.
_MAX_CONTAINERS = 2**20

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
    raise ConfigError(f"{where} must be an object, got {shortened(value)}")
  hints = typing.get_type_hints(config_type)
  fields = dataclasses.fields(cast(Any, config_type))
  known = [field.name for field in fields]
  missing = [f.name for f in fields if f.name not in value and not _is_later(f)]
  unknown = sorted(set(value) - set(known))
  if missing:
    raise ConfigError(f"{where} lacks {', '.join(missing)}")
  if unknown:
    raise ConfigError(f"{where} has unknown {', '.join(map(shortened, unknown))}; known: {', '.join(known)}")
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
    raise ConfigError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {shortened(value)}")
  return value


def _parse_tuple(item_types: tuple, value: Any, where: str) -> tuple:
  if not isinstance(value, list):
    raise ConfigError(f"{where} must be a list, got {shortened(value)}")
  if item_types[-1] is Ellipsis:
    item_types = item_types[:1] * len(value)
  if len(item_types) != len(value):
    raise ConfigError(f"{where} must have {len(item_types)} entries, got {len(value)}")
  return tuple(_parse(hint, item, f"{where}[{index}]") for index, (hint, item) in enumerate(zip(item_types, value)))


def _parse_scalar(scalar_type: type, value: Any, where: str) -> Any:
  # Many tools write 5.0 as 5 in JSON, so an integer is a float here. True is never a number.
  accepted = (int, float) if scalar_type is float else (scalar_type,)
  if type(value) not in accepted:
    raise ConfigError(f"{where} must be {_SCALAR_NAMES[scalar_type]}, got {shortened(value)}")
  try:
    return scalar_type(value)
  except OverflowError as error:
    raise ConfigError(f"{where} must be {_SCALAR_NAMES[scalar_type]}, got {shortened(value)}") from error


def read_json(path: pathlib.Path | epath.Path, where: str) -> Any:
  """The JSON values in a file. Raises ConfigError as `parse_strict_json`, and if the file cannot be read."""
  try:
    with path.open("rb") as file:
      content = file.read(MAX_JSON_BYTES + 1)
  except (OSError, ValueError) as error:  # A name with a zero byte is a ValueError.
    raise ConfigError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
  return parse_strict_json(content, where)


def parse_strict_json(content: bytes | str, where: str) -> Any:
  """JSON values of a text.

  Args:
    content: the text; bytes are UTF-8.
    where: begins every message.

  Raises:
    ConfigError: it is not strict JSON, which has no NaN; a name stands twice in one object; it is larger than 64 MiB,
      or has more than a million lists and objects.
  """
  if len(content) > MAX_JSON_BYTES:
    raise ConfigError(f"{where} is too large: at most {MAX_JSON_BYTES} bytes of JSON are read")
  try:
    text = content.decode() if isinstance(content, bytes) else content
  except UnicodeDecodeError as error:
    raise ConfigError(f"{where} cannot be read: {error}") from error
  if text.count("[") + text.count("{") > _MAX_CONTAINERS:
    raise ConfigError(f"{where} has too many lists and objects: at most {_MAX_CONTAINERS} are read")
  try:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_doubles)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{where} is not valid JSON: {error}") from error


def _refuse(constant: str) -> None:
  raise ValueError(f"{shortened(constant)} is not JSON")


def _finite(number: str) -> float:
  if not math.isfinite(float(number)):
    _refuse(number)
  return float(number)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    seen: set[str] = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))
    raise ValueError(f"the name {shortened(twice)} stands twice in one object")
  return found
