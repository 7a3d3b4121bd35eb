"""Rows of a long run, each safe as soon as it is made, in a file that a later run goes on with.

  {"settings": {"seconds": 5.0, "seed": 0}}
  {"caption": "a red circle moves left over a dark blue background", "score": 1.25}

Every line is one JSON object. The first one holds what decides the rows, so that a run with other settings is refused.
A kill leaves whole rows and at most one cut line at the end, which does not count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, config_json

Row = dict[str, Any]
REMEDY = "give the same flags or another file"


def read(
  path: epath.Path,
  settings: Mapping[str, Any],
  *,
  name: str = "",
  remedy: str = REMEDY,
  is_row: Callable[[Row], bool] = lambda row: True,
) -> list[Row]:
  """The rows of an earlier run with the same settings; no rows if there was no run.

  Args:
    path: the file.
    settings: what decides the rows, as JSON values.
    name: how a message names the file, as in `--output=rows.jsonl`; its path by default.
    remedy: how a message ends.
    is_row: whether a JSON object is a row of such a run.

  Raises:
    ConfigError: the file has rows of other settings, and the first difference is named; or it holds something else.
  """
  name = name or str(path)
  if not path.exists():
    return []
  try:
    # What follows the last line's end was cut off.
    lines = path.read_text().split("\n")[:-1]
  except UnicodeDecodeError as error:
    raise ConfigError(f"{name} does not hold the rows of a run, it is binary; {remedy}") from error
  values = [config_json.parse_strict_json(line, f"{name}, line {number}") for number, line in enumerate(lines, 1)]
  # A rename puts the first line there, so it is never cut: a file without it belongs to another program.
  if not values or not all(isinstance(value, dict) for value in values):
    raise ConfigError(f"{name} does not hold the rows of a run; {remedy}")
  require_same(name, values[0].get("settings"), settings, remedy)
  for number, row in enumerate(values[1:], 2):
    if not is_row(row):
      raise ConfigError(f"{name}, line {number} is not a row of such a run; {remedy}")
  return values[1:]


def require_same(name: str, stored: Any, settings: Mapping[str, Any], remedy: str) -> None:
  """Raises ConfigError, "`name` was made with SETTING VALUE, not VALUE; `remedy`", unless `stored` are `settings`."""
  if not isinstance(stored, dict):
    raise ConfigError(f"{name} does not say which settings it was made with; {remedy}")
  # JSON has lists alone: a tuple that was stored is read as one.
  given = json.loads(json.dumps(settings))
  for setting in dict.fromkeys([*given, *stored]):
    if stored.get(setting) != given.get(setting):
      raise ConfigError(f"{name} was made with {setting} {stored.get(setting)}, not {given.get(setting)}; {remedy}")


class Writer:
  """Takes rows; every row is on the disk when `append` returns."""

  def __init__(self, path: epath.Path, settings: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = ()):
    """Replaces the file: it holds `settings` and `rows` from now on.

    Args:
      path: the file; its folder is made.
      settings: as of `read`.
      rows: JSON objects that are kept from an earlier run.

    Raises:
      OSError: the file system refuses; an earlier file stays.
      ValueError: something is no JSON value, such as NaN.
    """
    self._path = path
    atomic.replace_bytes(path, "".join(map(_line, ({"settings": settings}, *rows))).encode())

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row. Raises OSError if the file system refuses; the rows before it are safe."""
    atomic.append_text(self._path, _line(row))


def _line(row: Mapping[str, Any]) -> str:
  return json.dumps(row, allow_nan=False) + "\n"
