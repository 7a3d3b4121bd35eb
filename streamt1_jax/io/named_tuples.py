"""Named tuples of arrays as arrays by name, and back."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def named(tree: Any) -> dict[str, Any]:
  """Leaves by path: keys of dicts, fields of tuples and indices, joined by slashes."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def field_names(kind: type) -> set[str]:
  """Paths of the leaves of a named tuple of this type."""
  return set(named(_template(kind)))


def rebuilt(kind: type[Tree], leaves: Mapping[str, Any]) -> Tree:
  """The named tuple of type `kind` with these leaves. Raises ValueError if it has others."""
  template = _template(kind)
  if set(leaves) != set(named(template)):
    raise ValueError(f"these are not the fields of {kind.__name__}")
  return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in named(template)])


def _template(kind: type) -> Any:
  """A named tuple with 0 for every array. Fields of any type, such as recorded steps, are None."""
  value = lambda hint: _template(hint) if hasattr(hint, "_fields") else None if hint is Any else 0
  return kind(**{name: value(hint) for name, hint in typing.get_type_hints(kind).items()})
