"""Search policies: who survives a chunk. One file per family.

A policy from outside the package is a frozen dataclass with `init` and `select` (see `base.Policy`), given as
`SearchConfig(policy=...)`; it needs no line here.
"""

from streamt1_jax.config import SearchConfig
from streamt1_jax.policies.base import (
  Choice,
  Event,
  InsidePolicy,
  NamesWinner,
  Policy,
  Scores,
  SwitchedPolicy,
  require_choice,
  selection_key,
)
from streamt1_jax.policies.particles import Particles, alpha_of
from streamt1_jax.policies.selection import ByScore, KeepBeams, PerBeam, ProbabilisticTopK, RankEnsemble, TopK
from streamt1_jax.policies.widths import Reject

__all__ = [
  "ByScore",
  "Choice",
  "Event",
  "InsidePolicy",
  "KeepBeams",
  "NamesWinner",
  "Particles",
  "PerBeam",
  "Policy",
  "ProbabilisticTopK",
  "RankEnsemble",
  "Reject",
  "Scores",
  "SwitchedPolicy",
  "TopK",
  "alpha_of",
  "candidates_drawn",
  "inside_event",
  "names_winner",
  "require_choice",
  "search_policy",
  "selection_key",
]


def search_policy(search: SearchConfig) -> Policy:
  """The policy of a search: `TopK` unless it names another."""
  return TopK() if search.policy is None else search.policy


def inside_event(search: SearchConfig) -> Event | None:
  """When the policy of a search decides inside of denoising; None if it does not.

  Raises ConfigError if the policy does not fit the search.
  """
  policy = search_policy(search)
  return policy.event(search) if isinstance(policy, InsidePolicy) else None


def candidates_drawn(search: SearchConfig) -> int:
  """Candidates that every beam begins a judged chunk with: more than `beam_size` if some are rejected early."""
  event = inside_event(search)
  return search.beam_size if event is None else event.start


def names_winner(search: SearchConfig) -> bool:
  """Whether the last chunk's best `Choice.score` names the video that is shown, and not the whole videos' scores."""
  policy = search_policy(search)
  return isinstance(policy, NamesWinner) and policy.names_winner
