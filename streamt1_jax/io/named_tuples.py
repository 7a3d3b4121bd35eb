"""Named tuples of arrays as arrays by name, and back."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def named(tree: Any) -> dict[str, Any]:
  """Leaves by path: keys of dicts, fields of tuples and indices, joined by slashes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fits(kind: type, names: Collection[str]) -> bool:
  """Whether these are the paths of the leaves of a named tuple of this type. An optional field may have none."""
  return set(names) == set(named(_template(kind, names)))


def rebuilt(kind: type[Tree], leaves: Mapping[str, Any]) -> Tree:
  """The named tuple of type `kind` with these leaves. Raises ValueError if it has others."""
  template = _template(kind, leaves)
  if set(leaves) != set(named(template)):
    raise ValueError(f"these are not the fields of {kind.__name__}")
  return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in named(template)])


def _template(kind: type, names: Collection[str], prefix: str = "") -> Any:
  """A named tuple with 0 for every array.

  Fields typed `Any` are None. An optional field is None if no name begins with it.
  """

  def value(field: str, hint: Any) -> Any:
    path = f"{prefix}{field}"
    if hint is Any:
      return None
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in typing.get_args(hint):
      if not any(name == path or name.startswith(f"{path}/") for name in names):
        return None
      # A hint of arrays may name several types of them.
      hint = next(option for option in typing.get_args(hint) if option is not type(None))
    return _template(hint, names, f"{path}/") if hasattr(hint, "_fields") else 0

  return kind(**{field: value(field, hint) for field, hint in typing.get_type_hints(kind).items()})
