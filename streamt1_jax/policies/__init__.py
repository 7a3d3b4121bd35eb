"""Search policies: who survives a chunk. One file per family, and one table of names.

A policy from outside the package is a frozen dataclass with `init` and `select` (see `base.Policy`), given as
`SearchConfig(policy=...)`; it needs no line here.
"""

from collections.abc import Mapping

from streamt1_jax.config import SearchConfig
from streamt1_jax.policies.base import Choice, Policy, Scores, require_choice, selection_key
from streamt1_jax.policies.by_score import ByScore
from streamt1_jax.policies.selection import KeepBeams, TopK

__all__ = [
  "POLICIES",
  "ByScore",
  "Choice",
  "KeepBeams",
  "Policy",
  "Scores",
  "TopK",
  "require_choice",
  "search_policy",
  "selection_key",
]

POLICIES: Mapping[str, type[Policy]] = {"by_score": ByScore, "keep_beams": KeepBeams, "top_k": TopK}
"""Name to policy."""


def search_policy(search: SearchConfig) -> Policy:
  """The policy of a search: `TopK` unless it names another."""
  return TopK() if search.policy is None else search.policy
