"""Policies that rank the candidates of a chunk, or draw among them."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, PRNGKeyArray

from streamt1_jax import reward_pruning
from streamt1_jax.config import LATER, SearchConfig, require
from streamt1_jax.config.base import require_choices
from streamt1_jax.policies import resampling
from streamt1_jax.policies.base import Choice, Scores
from streamt1_jax.typing import IntScalar


def best(ranked: Float32[Array, "K B"], usable: Bool[Array, "K B"]) -> Choice:
  """The best K of the candidates of all beams together, best first, without a carry."""
  return Choice(*reward_pruning.prune(ranked.reshape(-1), usable.reshape(-1), ranked.shape[0]), None)


@dataclasses.dataclass(frozen=True)
class TopK:
  """The best K of the candidates of all beams together: Reward Pruning, and what a search does by default.

  Attributes:
    cumulative: ranks by the sum of the hybrid scores of all chunks of a lineage, and not by the newest chunk alone.
  """

  cumulative: bool = dataclasses.field(default=False, metadata=LATER)

  def init(self, search: SearchConfig) -> Float32[Array, " K"] | None:
    return jnp.zeros(search.top_k) if self.cumulative else None

  def select(
    self,
    carry: Float32[Array, " K"] | None,
    scores: Scores,
    key: PRNGKeyArray,
    chunk_index: IntScalar,
    num_chunks: IntScalar,
  ) -> Choice:
    del key, chunk_index, num_chunks
    if carry is None:
      return best(scores.hybrid, scores.usable)
    choice = best(carry[:, None] + scores.hybrid, scores.usable)
    return choice._replace(carry=choice.score)


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
    self, carry: None, scores: Scores, key: PRNGKeyArray, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    del carry, key, chunk_index, num_chunks
    return best(getattr(scores, self.score), scores.usable)


@dataclasses.dataclass(frozen=True)
class KeepBeams:
  """Every beam keeps the best of its own candidates, so beams never mix.

  With one candidate per beam this is best-of-K: K independent videos, and the best one is shown. A beam without a
  usable candidate takes the best candidate of all beams.
  """

  def init(self, search: SearchConfig) -> None:
    del search

  def select(
    self, carry: None, scores: Scores, key: PRNGKeyArray, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    del key, chunk_index, num_chunks
    beams, candidates = scores.hybrid.shape
    ranked = jnp.where(scores.usable, scores.hybrid, -jnp.inf)
    own = jnp.arange(beams) * candidates + jnp.argmax(ranked, axis=1)
    survivor = jnp.where(scores.usable.any(axis=1), own, jnp.argmax(ranked)).astype(jnp.int32)
    return Choice(survivor, ranked.reshape(-1)[survivor], carry)


@dataclasses.dataclass(frozen=True)
class PerBeam:
  """Now and then every beam keeps the best of its own candidates, so that lineages do not all end in one.

  ScalingNoise (arXiv 2503.16400) does so with its beams.

  Attributes:
    epsilon: the probability that a chunk is decided as `KeepBeams` decides; others are decided as by `TopK`.
  """

  epsilon: float = 0.2

  def __post_init__(self):
    require(0.0 <= self.epsilon <= 1.0, f"epsilon must be in [0, 1], got {self.epsilon}")

  def init(self, search: SearchConfig) -> None:
    del search

  def select(
    self, carry: None, scores: Scores, key: PRNGKeyArray, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    own = KeepBeams().select(carry, scores, key, chunk_index, num_chunks)
    together = best(scores.hybrid, scores.usable)
    alone = jax.random.uniform(key) < self.epsilon
    return jax.tree.map(lambda a, b: jnp.where(alone, a, b), own, together)


@dataclasses.dataclass(frozen=True)
class ProbabilisticTopK:
  """Draws K of the candidates of all beams without replacement, with probability exp(hybrid / temperature) each.

  SWIFT (arXiv 2503.24320) finds this better than the best K.

  Attributes:
    temperature: in units of the hybrid score; 0 is `TopK`.
  """

  temperature: float = 0.01

  def __post_init__(self):
    require(0.0 <= self.temperature < float("inf"), f"temperature must be at least 0, got {self.temperature}")

  def init(self, search: SearchConfig) -> None:
    del search

  def select(
    self, carry: None, scores: Scores, key: PRNGKeyArray, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    del chunk_index, num_chunks
    hybrid, beams = scores.hybrid.reshape(-1), scores.hybrid.shape[0]
    survivor = resampling.gumbel_top_k(key, hybrid, scores.usable.reshape(-1), self.temperature, beams)
    return Choice(survivor, hybrid[survivor], carry)


@dataclasses.dataclass(frozen=True)
class RankEnsemble:
  """The best K by their mean place in the order of the image reward and in that of the video reward.

  Places need no scales, so that no reward outweighs the other (arXiv 2501.09732). What survives survives with its mean
  place, 0 for a candidate that both put last.
  """

  def init(self, search: SearchConfig) -> None:
    del search

  def select(
    self, carry: None, scores: Scores, key: PRNGKeyArray, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    del carry, key, chunk_index, num_chunks
    usable = scores.usable.reshape(-1)
    short, long = (resampling.ranks(score.reshape(-1), usable) for score in (scores.short, scores.long))
    return best(((short + long) / 2.0).reshape(scores.usable.shape), scores.usable)
