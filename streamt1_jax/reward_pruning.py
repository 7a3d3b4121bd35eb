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

from streamt1_jax.config import SearchConfig


class ScoreHistory(NamedTuple):
  """Scores of one lineage.

  Attributes:
    short_sum: float32 scalar, sum of all short-term scores.
    recent: [W - 1] float32 short-term scores of the latest chunks, newest last; W is the sliding window, here at least
      2, because orbax saves no empty array.
    count: int32 scalar, chunks scored so far.
    long: float32 scalar, long-term score of the latest chunk.
  """

  short_sum: jax.Array
  recent: jax.Array
  count: jax.Array
  long: jax.Array


class Flags(NamedTuple):
  """What a chunk becomes when it leaves the window; bool scalars, never both true. If neither is, it is discarded."""

  ema: jax.Array
  append: jax.Array


def empty_history(search: SearchConfig) -> ScoreHistory:
  recent = jnp.zeros(max(search.sliding_window - 1, 1))
  return ScoreHistory(short_sum=jnp.zeros(()), recent=recent, count=jnp.int32(0), long=jnp.zeros(()))


def extend_history(history: ScoreHistory, short: jax.Array, long: jax.Array) -> ScoreHistory:
  recent = jnp.append(history.recent, short)[1:]
  return ScoreHistory(history.short_sum + short, recent, history.count + 1, long)


def fusion_weight(chunk_index: jax.Array, num_chunks: jax.Array, cap: float) -> jax.Array:
  """Weight of the short-term score, float32 in [0, cap]: min(chunk / (num_chunks - 1), cap); 0 in a single chunk."""
  return jnp.minimum(chunk_index / jnp.maximum(num_chunks - 1, 1), cap).astype(jnp.float32)


def hybrid_score(short: jax.Array, long: jax.Array, weight: jax.Array) -> jax.Array:
  return weight * short + (1.0 - weight) * long


def _baseline(history: ScoreHistory, search: SearchConfig) -> jax.Array:
  if search.short_baseline == "history":
    return history.short_sum / jnp.maximum(history.count, 1)
  length = search.sliding_window - 1
  seen = jnp.minimum(history.count, length)
  newest = jnp.arange(length) >= length - seen
  return jnp.where(newest, history.recent, 0.0).sum() / jnp.maximum(seen, 1)


def route_flags(short: jax.Array, long: jax.Array, history: ScoreHistory, search: SearchConfig) -> Flags:
  """Flags of one candidate against its parent's lineage; both are false for the first chunk of a video."""
  up = short - _baseline(history, search) > search.short_threshold
  drop = history.long - long > search.long_threshold
  later = history.count > 0
  return Flags(ema=later & up & ~drop, append=later & up & drop)


def prune(scores: jax.Array, usable: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
  """The best `top_k` of all candidates, best first; of equal scores the earlier candidate wins.

  A candidate that is not usable (NaN or Inf in its latents or scores) never survives: if fewer than `top_k` are
  usable, the best one fills the remaining beams. If no candidate is usable, the indices mean nothing and the caller
  must stop.

  Args:
    scores: [N] float32.
    usable: [N] bool.
    top_k: beams to keep, at most N.

  Returns:
    Indices [top_k] int32 into the candidates, and their scores [top_k].
  """
  ranked, index = jax.lax.top_k(jnp.where(usable, scores, -jnp.inf), top_k)
  keep = usable[index]
  return jnp.where(keep, index, index[0]), jnp.where(keep, ranked, ranked[0])
