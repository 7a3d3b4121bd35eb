"""What all configurations share: the error that refuses one, and what raises it."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Collection
from typing import Any, TypeVar

from streamt1_jax.messages import one_line, shortened

T = TypeVar("T")

# Metadata of a field that files written before it lack: it is stored only where it differs from its default.
LATER = {"later": True}


class ConfigError(ValueError):
  """A configuration or an input that cannot work; the message names the field and what is allowed.

  Whatever text of a file is in it, the message is one line of at most `messages.MESSAGE_LIMIT` characters.
  """

  def __init__(self, message: str):
    super().__init__(one_line(message))


def required(value: T | None, what: str) -> T:
  """`value`. Raises ConfigError, which names it as `what`, if it is None."""
  if value is None:
    raise ConfigError(f"{what} is missing")
  return value


def require(condition: bool, message: str) -> None:
  """Raises ConfigError with `message` unless the condition holds."""
  if not condition:
    raise ConfigError(message)


@functools.cache
def choices(config_type: type, field: str) -> tuple[Any, ...]:
  """What a field of a configuration may be: the values of its Literal type, in their order; empty for other types."""
  hint = typing.get_type_hints(config_type)[field]
  return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def require_choices(config: Any) -> None:
  """Raises ConfigError unless every field of a Literal type has one of its values."""
  for field in dataclasses.fields(config):
    value, allowed = getattr(config, field.name), choices(type(config), field.name)
    require(not allowed or value in allowed, f"{field.name} must be one of {allowed}, got {value!r}")


MAX_SIZE = 2**24
"""Largest number in the configuration of a model: one digit too many is told before arrays of that size are made."""


def require_sizes(config: Any, zero: Collection[str] = (), signed: Collection[str] = ()) -> None:
  """Raises ConfigError, naming the field, unless every number of a dataclass, alone or in a tuple, is in its range.

  Integers must be in 1..MAX_SIZE, other numbers above 0 and at most MAX_SIZE.

  Args:
    config: the dataclass; its fields that hold something else are left alone.
    zero: names of fields that may be 0 as well.
    signed: names of fields that may have any sign.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    for number in value if isinstance(value, tuple) else (value,):
      if type(number) not in (int, float):
        continue
      least = -MAX_SIZE if field.name in signed else 0
      above = number > 0 or field.name in zero or field.name in signed
      require(
        least <= number <= MAX_SIZE and above,
        f"{field.name} must be {_allowed(type(number), field.name in zero, least)}, got {shortened(number)}",
      )


def _allowed(number_type: type, zero: bool, least: int) -> str:
  if least < 0:
    return f"from {least} to {MAX_SIZE}"
  if number_type is int:
    return f"in {0 if zero else 1}..{MAX_SIZE}"
  return f"{'at least' if zero else 'above'} 0 and at most {MAX_SIZE}"
