"""Search policies: who survives a chunk. One file per family, and one table of names.

A policy from outside the package is a frozen dataclass with `init` and `select` (see `base.Policy`), given as
`SearchConfig(policy=...)`; it needs no line here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.io import config_json
from streamt1_jax.policies.base import Choice, Policy, Scores, require_choice, selection_key
from streamt1_jax.policies.selection import KeepBeams, TopK

__all__ = [
  "POLICIES",
  "Choice",
  "KeepBeams",
  "Policy",
  "Scores",
  "TopK",
  "from_json_value",
  "require_choice",
  "search_policy",
  "selection_key",
]

POLICIES: Mapping[str, type[Policy]] = {"keep_beams": KeepBeams, "top_k": TopK}
"""Name to policy, as command lines name them."""


def search_policy(search: SearchConfig) -> Policy:
  """The policy of a search: `TopK` unless it names another."""
  return TopK() if search.policy is None else search.policy


def from_json_value(value: Any, where: str, known: Iterable[type[Policy]] = tuple(POLICIES.values())) -> Policy:
  """The policy that `config_json.to_json_value` described as {"type": name of its class, and its fields}.

  Args:
    value: the description.
    where: file and field that it came from; begins every message.
    known: policies that it may be.

  Raises:
    ConfigError: it is no description of a known policy.
  """
  types = {policy.__name__: policy for policy in known}
  name = value.get("type") if isinstance(value, dict) else None
  if name not in types:
    raise ConfigError(f"{where}.type must be one of {', '.join(types)}, got {name!r}")
  fields = {field: item for field, item in value.items() if field != "type"}
  return config_json.from_json_value(types[name], fields, where)
