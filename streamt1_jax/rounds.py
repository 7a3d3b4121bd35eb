"""Candidates drawn in rounds: many of them on a small memory, and no more than are needed."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from streamt1_jax.state import Beam
from streamt1_jax.step import Explored, Step
from streamt1_jax.typing import IntScalar


def explore(step: Step, beams: Beam, seed: Int32[Array, "K B"]) -> tuple[Explored, IntScalar]:
  """As `Step.explore`, some candidates of each beam at a time, until enough of them are good, or no round is left.

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
    if search.accept is None:
      return index < limit
    scores = found.candidates.scores
    good = scores.usable & (scores.hybrid >= search.accept)
    return (index < limit) & (good.sum() < search.top_k)

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
