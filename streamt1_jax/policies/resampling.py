"""Drawing by weight: pure functions of a key and of log weights, all float32.

A log weight may be -inf, which is the weight 0: what has it is never drawn as long as another one has more. Where all
have it, all count the same, so that nothing is NaN; the caller must then stop by itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray

from streamt1_jax.reward_pruning import prune
from streamt1_jax.typing import FloatLike, FloatScalar


def log_normalise(log_weight: Float32[Array, " N"]) -> Float32[Array, " N"]:
  """Log weights whose weights sum to 1."""
  return jax.nn.log_softmax(jnp.where(jnp.isneginf(log_weight).all(), 0.0, log_weight))


def effective_size(log_weight: Float32[Array, " N"]) -> FloatScalar:
  """The effective sample size 1 / sum w^2 of normalised weights, from 1 (one has all) to N (all have the same)."""
  return jnp.exp(-jax.nn.logsumexp(2.0 * log_normalise(log_weight)))


def systematic(key: PRNGKeyArray, log_weight: Float32[Array, " N"], count: int) -> Int32[Array, " {count}"]:
  """Draws `count` of N with replacement, by one random number: who has weight w is drawn floor or ceil(count w) times.

  Kitagawa (1996). The draws are in ascending order.
  """
  weight = jnp.exp(log_normalise(log_weight))
  # A parallel sum may fall by its rounding.
  cumulative = jax.lax.cummax(jnp.cumsum(weight))
  at = (jnp.arange(count) + jax.random.uniform(key)) / count * cumulative[-1]
  index = jnp.searchsorted(cumulative, at, side="right")
  # Rounding may also reach beyond the end, or what has no weight.
  drawable = jnp.where(weight > 0, jnp.arange(weight.size), -1)
  before = jax.lax.cummax(drawable)[jnp.minimum(index, weight.size - 1)]
  return jnp.where(before < 0, jnp.argmax(drawable >= 0), before).astype(jnp.int32)


def gumbel_top_k(
  key: PRNGKeyArray, scores: Float32[Array, " N"], usable: Bool[Array, " N"], temperature: FloatLike, count: int
) -> Int32[Array, " {count}"]:
  """Draws `count` of N without replacement, one after the other with probability exp(score / temperature) each.

  The best of scores with noise of a Gumbel distribution are such a draw (Kool and others, 2019). Without temperature
  they are the best. What is not usable is never drawn; of fewer than `count` the first is drawn again.
  """
  return prune(scores + temperature * jax.random.gumbel(key, scores.shape), usable, count)[0]


def ranks(scores: Float32[Array, " N"], usable: Bool[Array, " N"]) -> Float32[Array, " N"]:
  """The place of each usable score among the usable ones, from 0 for the worst; equal scores share their mean place.

  What is not usable has -inf.
  """
  counts = lambda compared: (compared & usable[None, :]).sum(axis=1).astype(jnp.float32)
  place = counts(scores[None, :] < scores[:, None]) + (counts(scores[None, :] == scores[:, None]) - 1.0) / 2.0
  return jnp.where(usable, place, -jnp.inf)
