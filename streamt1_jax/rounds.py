"""Candidates drawn in rounds: many of them on a small memory, and no more than are needed."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from streamt1_jax.config import SearchConfig
from streamt1_jax.policies.base import Scores
from streamt1_jax.state import Beam
from streamt1_jax.step import Explored, Step
from streamt1_jax.typing import IntScalar


def explore(step: Step, beams: Beam, seed: Int32[Array, "K B"]) -> tuple[Explored, IntScalar]:
  """As `Step.explore`, some candidates of each beam at a time, until they are enough (`is_enough`) or no round is left.

  Frames and decoder states are not kept. What is not drawn is not usable, and all of it but the seed is 0.

  Returns:
    What was found, and the number of rounds.
  """
  search, size = step.search, step.search.round_size
  limit = jnp.int32(search.most_rounds)
  if step.state.spare is not None:
    limit = jnp.minimum(limit, search.round_budget + step.state.spare)

  def one_round(index: IntScalar) -> Explored:
    taken = jax.lax.dynamic_slice_in_dim(seed, index * size, size, axis=1)
    explored = dataclasses.replace(step, place=index * size).explore(beams, taken)
    return explored._replace(candidates=explored.candidates._replace(frames=None, codec=None))

  def is_short(carry: tuple[IntScalar, Explored]) -> Bool[Array, ""]:
    index, found = carry
    return (index < limit) & ~is_enough(found.candidates.scores, search)

  def go_on(carry: tuple[IntScalar, Explored]) -> tuple[IntScalar, Explored]:
    index, found = carry
    put = lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, index * size, axis=1)
    return index + 1, jax.tree.map(put, found, one_round(index))

  shapes = jax.eval_shape(one_round, jnp.int32(0))
  nothing = jax.tree.map(lambda x: jnp.zeros((x.shape[0], search.beam_size, *x.shape[2:]), x.dtype), shapes)
  rounds, found = jax.lax.while_loop(is_short, go_on, (jnp.int32(0), nothing))
  found = step.laid_out(found, "beam", "candidate")
  # As in `judge`: every device ranks all candidates.
  candidates = found.candidates._replace(seed=seed, scores=step.laid_out(found.candidates.scores))
  return found._replace(candidates=candidates), rounds


def is_enough(scores: Scores, search: SearchConfig) -> Bool[Array, ""]:
  """Whether the candidates that were drawn will do: `top_k` of them are good, or one more would gain too little."""
  enough = jnp.bool_(False)
  if search.accept is not None:
    enough |= (scores.usable & (scores.hybrid >= search.accept)).sum() >= search.top_k
  if search.least_gain is not None:
    enough |= expected_gain(scores.hybrid, scores.usable, search.top_k) < search.least_gain
  return enough


def expected_gain(hybrid: Float32[Array, "K B"], usable: Bool[Array, "K B"], top_k: int) -> Float32[Array, ""]:
  """By how much one more candidate is expected to raise the sum of the survivors' scores.

  Its score x is assumed to be normally distributed, with the mean m and the standard deviation s of those that were
  drawn. With b the `top_k`-th best of them and z = (b - m) / s this is E[max(x - b, 0)] = s (pdf(z) - z (1 - cdf(z))),
  where pdf and cdf are those of the standard normal distribution: the expected improvement of Bayesian optimisation, as
  a stop rule in BEACON (arXiv 2510.15945).

  Args:
    hybrid: scores; only those of usable candidates count.
    usable: drawn, and finite.
    top_k: survivors.

  Returns:
    The gain in units of the score, at least 0; infinite while at most `top_k` candidates are usable.
  """
  count = usable.sum()
  of_all = lambda values: jnp.where(usable, values, 0.0).sum() / jnp.maximum(count, 1)
  mean = of_all(hybrid)
  deviation = jnp.sqrt(of_all(jnp.square(hybrid - mean)) * count / jnp.maximum(count - 1, 1))
  last = jax.lax.top_k(jnp.where(usable, hybrid, -jnp.inf).reshape(-1), top_k)[0][-1]
  z = (last - mean) / jnp.where(deviation > 0.0, deviation, 1.0)
  gain = deviation * (jax.scipy.stats.norm.pdf(z) - z * jax.scipy.stats.norm.sf(z))
  return jnp.where(count > top_k, jnp.maximum(gain, 0.0), jnp.inf)
