"""Reward Pruning: a hybrid score ranks the candidates of all beams together, and the best few survive.

  hybrid = a * short + (1 - a) * long,   a = min(chunk * F / (video - F), cap)      (Stream-T1, reward pruning)

The short-term score `short` judges the chunk alone, the long-term score `long` a sliding window that ends with it.
The weight of `short` grows with the chunk index, up to a cap.

  up   = short - baseline > short_threshold      a chunk better than its lineage's usual: worth remembering
  drop = previous long - long > long_threshold   the window became less coherent: a change of scene
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from streamt1_jax.config import SearchConfig
from streamt1_jax.typing import FloatLike, FloatScalar, IntLike, IntScalar


class ScoreHistory(NamedTuple):
  """Scores of one lineage.

  Attributes:
    short_sum: sum of all short-term scores.
    recent: short-term scores of the latest chunks, newest last: one less than the sliding window has, but at least one,
      because orbax saves no empty array.
    count: chunks scored so far.
    long: long-term score of the latest chunk.
  """

  short_sum: FloatScalar
  recent: Float32[Array, " recent"]
  count: IntScalar
  long: FloatScalar


class Flags(NamedTuple):
  """What a chunk becomes when it leaves the window; never both true. If neither is, it is discarded."""

  ema: Bool[Array, ""]
  append: Bool[Array, ""]


def empty_history(search: SearchConfig) -> ScoreHistory:
  recent = jnp.zeros(max(search.sliding_window - 1, 1))
  return ScoreHistory(short_sum=jnp.zeros(()), recent=recent, count=jnp.int32(0), long=jnp.zeros(()))


def extend_history(history: ScoreHistory, short: FloatScalar, long: FloatScalar) -> ScoreHistory:
  recent = jnp.append(history.recent, short)[1:]
  return ScoreHistory(history.short_sum + short, recent, history.count + 1, long)


def fusion_weight(chunk_index: IntLike, num_chunks: IntLike, cap: float) -> FloatScalar:
  """Weight of the short-term score, in [0, cap]: min(chunk / (num_chunks - 1), cap); 0 in a single chunk."""
  return jnp.minimum(chunk_index / jnp.maximum(num_chunks - 1, 1), cap).astype(jnp.float32)


def hybrid_score(
  short: Float32[Array, "*axes"], long: Float32[Array, "*axes"], weight: FloatLike
) -> Float32[Array, "*axes"]:
  return weight * short + (1.0 - weight) * long


def _baseline(history: ScoreHistory, search: SearchConfig) -> FloatScalar:
  if search.short_baseline == "history":
    return history.short_sum / jnp.maximum(history.count, 1)
  length = search.sliding_window - 1
  seen = jnp.minimum(history.count, length)
  newest = jnp.arange(length) >= length - seen
  return jnp.where(newest, history.recent, 0.0).sum() / jnp.maximum(seen, 1)


def route_flags(short: FloatScalar, long: FloatScalar, history: ScoreHistory, search: SearchConfig) -> Flags:
  """Flags of one candidate against its parent's lineage; both are false for the first chunk of a video."""
  up = short - _baseline(history, search) > search.short_threshold
  drop = history.long - long > search.long_threshold
  later = history.count > 0
  return Flags(ema=later & up & ~drop, append=later & up & drop)


def prune(
  scores: Float32[Array, " N"], usable: Bool[Array, " N"], top_k: int
) -> tuple[Int32[Array, " {top_k}"], Float32[Array, " {top_k}"]]:
  """The best `top_k` of all candidates, best first; of equal scores the earlier candidate wins.

  A candidate that is not usable (NaN or Inf in its latents or scores) never survives: if fewer than `top_k` are
  usable, the best one fills the remaining beams. If no candidate is usable, the indices mean nothing and the caller
  must stop.

  Args:
    scores: of all candidates.
    usable: whether a candidate may survive.
    top_k: beams to keep, at most N.

  Returns:
    Indices into the candidates, and their scores.
  """
  ranked, index = jax.lax.top_k(jnp.where(usable, scores, -jnp.inf), top_k)
  keep = usable[index]
  return jnp.where(keep, index, index[0]), jnp.where(keep, ranked, ranked[0])
