"""A policy that trusts one reward."""

import dataclasses
from typing import Literal

import jax

from streamt1_jax import reward_pruning
from streamt1_jax.config import SearchConfig
from streamt1_jax.config.base import require_choices
from streamt1_jax.policies.base import Choice, Scores
from streamt1_jax.typing import IntScalar


@dataclasses.dataclass(frozen=True)
class ByScore:
  """The best K of all candidates by one of the two scores, from the first chunk to the last.

  Attributes:
    score: "short" of the chunk alone, or "long" of the window that ends with it.
  """

  score: Literal["short", "long"] = "short"

  def __post_init__(self):
    require_choices(self)

  def init(self, search: SearchConfig) -> None:
    del search

  def select(
    self, carry: None, scores: Scores, key: jax.Array, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    del key, chunk_index, num_chunks
    ranked = getattr(scores, self.score)
    return Choice(*reward_pruning.prune(ranked.reshape(-1), scores.usable.reshape(-1), ranked.shape[0]), carry)
