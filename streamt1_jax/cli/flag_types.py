"""Flags that refuse bad values in words a user understands. Each is defined on the `FlagValues` of one command."""

from __future__ import annotations

import math
import os.path

import fsspec
from absl import flags

from streamt1_jax.io import hub

# A flag belongs to the module that calls these functions; --help lists it under that module's name.
flags.disclaim_key_flags()


class _Integer(flags.IntegerParser):
  """Says what is allowed; absl quotes Python."""

  def convert(self, argument: int | str) -> int:
    try:
      return super().convert(argument)
    except ValueError as error:
      raise ValueError(f"{argument!r} is not {self.syntactic_help}") from error


class _FiniteFloat(flags.FloatParser):
  """Refuses NaN and infinities, which pass or fail every comparison with a bound."""

  def convert(self, argument: float | str) -> float:
    try:
      value = super().convert(argument)
    except ValueError as error:
      raise ValueError(f"{argument!r} is not a number") from error
    if not math.isfinite(value):
      raise ValueError(f"{argument!r} is not a finite number")
    return value


class _Path(flags.ArgumentParser):
  """A path of this machine's file systems or, if `url` is set, of Google's object store; with `repo` also of the hub.

  A path that begins with `~` is in the user's home. An empty one is refused unless `empty` is set: it would be the
  current folder, and comes from a variable of the shell that has no value.
  """

  syntactic_help = "a path"

  def __init__(self, url: bool, empty: bool, repo: bool):
    self._url, self._empty, self._repo = url, empty, repo

  def parse(self, argument: str) -> str:
    if not argument and not self._empty:
      raise ValueError("the path is empty; the current folder is .")
    if "\0" in argument:
      raise ValueError(f"{argument!r} is no path: it holds a NUL")
    scheme, separator, _ = argument.partition("://")
    if not separator:
      # Shells leave --flag=~/name as it is.
      return os.path.expanduser(argument)
    if self._repo and hub.is_hub(argument):
      hub.parse(argument)  # A ConfigError is a ValueError.
      return argument
    if not self._url or scheme != "gs":
      allowed = "a path of this machine or gs://bucket/name" if self._url else "a path of this machine"
      allowed += ", or hf://org/name" if self._repo else ""
      raise ValueError(f"{argument!r} is not {allowed}")
    try:
      fsspec.get_filesystem_class("gcs")
    except ImportError as error:
      raise ValueError("gs:// needs the package gcsfs: pip install gcsfs") from error
    return argument


class _Switch(flags.BooleanFlag):
  """Says what is allowed; absl quotes Python."""

  def parse(self, argument: str | bool) -> None:
    try:
      super().parse(argument)
    except flags.IllegalFlagValueError as error:
      raise flags.IllegalFlagValueError(
        f"flag --{self.name}={argument}: {argument!r} is not a boolean: give true or false"
      ) from error


def _define(parser: flags.ArgumentParser, values: flags.FlagValues, name: str, default, meaning: str, required=False):
  serializer = flags.ArgumentSerializer()
  flags.DEFINE(parser, name, default, meaning, flag_values=values, serializer=serializer, required=required)


def define_integer(
  values: flags.FlagValues,
  name: str,
  default: int | None,
  meaning: str,
  lower: int | None = None,
  upper: int | None = None,
) -> None:
  """A flag of an integer in `lower`..`upper`."""
  _define(_Integer(lower, upper), values, name, default, meaning)


def define_float(
  values: flags.FlagValues,
  name: str,
  default: float | None,
  meaning: str,
  lower: float | None = None,
  upper: float | None = None,
) -> None:
  """A flag of a finite number in `lower`..`upper`."""
  _define(_FiniteFloat(lower, upper), values, name, default, meaning)


def define_path(
  values: flags.FlagValues,
  name: str,
  default: str | None,
  meaning: str,
  *,
  required: bool = False,
  url: bool = True,
  empty: bool = False,
  repo: bool = False,
) -> None:
  """A flag of a file or folder; gs:// is refused unless `url`, hf:// unless `repo`, an empty path unless `empty`."""
  _define(_Path(url, empty, repo), values, name, default, meaning, required)


def define_checkpoint(values: flags.FlagValues, meaning: str = "Folder of the model") -> None:
  """The flag --checkpoint; `files.find_checkpoint` gives the folder it means."""
  define_path(
    values,
    "checkpoint",
    None,
    f"{meaning}, also hf://org/name of the hub; by default the small model that travels with this package.",
    repo=True,
  )


def define_string(
  values: flags.FlagValues, name: str, default: str | None, meaning: str, *, required: bool = False
) -> None:
  """A flag of any text."""
  flags.DEFINE_string(name, default, meaning, flag_values=values, required=required)


def define_choice(
  values: flags.FlagValues, name: str, default: str | None, choices: list[str] | tuple[str, ...], meaning: str
) -> None:
  """A flag of one of a few words."""
  flags.DEFINE_enum(name, default, choices, meaning, flag_values=values)


def define_switch(values: flags.FlagValues, name: str, default: bool, meaning: str) -> None:
  """A flag that is on or off: --name, --noname."""
  flags.DEFINE_flag(_Switch(name, default, meaning), values)


def define_list(values: flags.FlagValues, name: str, default: list[str] | None, meaning: str) -> None:
  """A flag of texts joined by commas."""
  flags.DEFINE_list(name, default, meaning, flag_values=values)
