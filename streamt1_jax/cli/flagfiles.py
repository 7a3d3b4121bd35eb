"""--flagfile=NAME: a file of flags, one a line; lines that begin with # say why.

NAME is looked for in the current folder, then beside the flagfile that names it, then among the package's own, so
`--flagfile=paper_5s.flags` works in any folder.
"""

from __future__ import annotations

import os.path
import pathlib
from collections.abc import Iterator, Sequence

from streamt1_jax import shipped
from streamt1_jax.config import ConfigError

_NAMES = ("--flagfile", "-flagfile")


def expand(argv: Sequence[str], within: Sequence[pathlib.Path] = ()) -> Iterator[str]:
  """The arguments with every flagfile replaced by the flags it holds.

  Args:
    argv: as a user gives them, or as a flagfile holds them.
    within: the flagfiles that are being read, the outermost first.

  Raises:
    ConfigError: a file is missing, cannot be read, is no text, or names itself.
  """
  arguments = iter(argv)
  for argument in arguments:
    flag, separator, name = argument.partition("=")
    if flag not in _NAMES:
      yield argument
      continue
    name = name if separator else next(arguments, "")
    if not name:
      raise ConfigError("--flagfile names no file")
    path = _find(name, within)
    if path in within:
      raise ConfigError(f"--flagfile={name}: the file names itself")
    yield from expand(_read(name, path), (*within, path))


def _find(name: str, within: Sequence[pathlib.Path]) -> pathlib.Path:
  path = pathlib.Path(os.path.expanduser(name))
  beside = [within[-1].parent / path.name] if within else []
  places = [path, *beside, pathlib.Path(shipped.flagfiles()) / path.name]
  found = next((place for place in places if os.path.isfile(place)), None)
  if found is None:
    raise ConfigError(f"--flagfile={name}: there is no such file")
  return found.resolve()


def _read(name: str, path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise ConfigError(f"--flagfile={name} is not UTF-8 text: {error}") from error
  except OSError as error:
    raise ConfigError(f"--flagfile={name} cannot be read: {error.strerror}") from error
  return [line.strip() for line in lines if line.strip() and not line.strip().startswith(("#", "//"))]
