"""What all configurations share: the error that refuses one, and what raises it."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

# Metadata of a field that files written before it lack: it is stored only where it differs from its default.
LATER = {"later": True}


class ConfigError(ValueError):
  """A configuration or an input that cannot work; the message is one line that names the field and what is allowed."""


def required(value: T | None, what: str) -> T:
  """`value`. Raises ConfigError, which names it as `what`, if it is None."""
  if value is None:
    raise ConfigError(f"{what} is missing")
  return value


def require(condition: bool, message: str) -> None:
  """Raises ConfigError with `message` unless the condition holds."""
  if not condition:
    raise ConfigError(message)
