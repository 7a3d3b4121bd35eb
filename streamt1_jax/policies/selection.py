"""Policies that look at the scores of one chunk."""

import dataclasses

import jax
import jax.numpy as jnp

from streamt1_jax import reward_pruning
from streamt1_jax.config import SearchConfig
from streamt1_jax.policies.base import Choice, Scores
from streamt1_jax.typing import IntScalar


@dataclasses.dataclass(frozen=True)
class TopK:
  """The best K of the candidates of all beams together: Reward Pruning, and what a search does by default."""

  def init(self, search: SearchConfig) -> None:
    del search

  def select(
    self, carry: None, scores: Scores, key: jax.Array, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    del key, chunk_index, num_chunks
    beams = scores.hybrid.shape[0]
    return Choice(*reward_pruning.prune(scores.hybrid.reshape(-1), scores.usable.reshape(-1), beams), carry)


@dataclasses.dataclass(frozen=True)
class KeepBeams:
  """Every beam keeps the best of its own candidates, so beams never mix.

  With one candidate per beam this is best-of-K: K independent videos, and the best one is shown. A beam without a
  usable candidate takes the best candidate of all beams.
  """

  def init(self, search: SearchConfig) -> None:
    del search

  def select(
    self, carry: None, scores: Scores, key: jax.Array, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    del key, chunk_index, num_chunks
    beams, candidates = scores.hybrid.shape
    ranked = jnp.where(scores.usable, scores.hybrid, -jnp.inf)
    own = jnp.arange(beams) * candidates + jnp.argmax(ranked, axis=1)
    survivor = jnp.where(scores.usable.any(axis=1), own, jnp.argmax(ranked)).astype(jnp.int32)
    return Choice(survivor, ranked.reshape(-1)[survivor], carry)
