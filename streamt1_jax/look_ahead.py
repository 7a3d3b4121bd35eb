"""Looking ahead: every candidate is carried on by chunks that are judged and thrown away."""

import dataclasses

import jax
import jax.numpy as jnp

from streamt1_jax.policies import Scores
from streamt1_jax.state import Beam, SearchState
from streamt1_jax.step import Candidates, Step
from streamt1_jax.typing import IntScalar


def scores_with(step: Step, beams: Beam, candidates: Candidates) -> Scores:
  """The means of the candidates' scores and of those of the chunks that follow each; fewer do near the video's end.

  What follows is drawn as candidate 0 of the beam would draw it: where that draws fresh noise and none is propagated,
  all candidates of a beam go on with the same. A candidate that leads to NaN or Inf is not usable. If all do, nothing
  is known of what follows, and their own scores are left to rank them by.
  """
  own = candidates.scores
  end, longest = step.condition.num_chunks, step.models.generator.max_chunks(step.search)
  # A video without an end is longer than its condition says, which may also say more chunks than the model can make.
  end = jnp.minimum(jnp.where(step.chunk_index < end, end, longest), longest)
  count = jnp.minimum(step.search.look_ahead, end - 1 - step.chunk_index)

  def means() -> Scores:
    ahead = step.models.execution.map_siblings(lambda siblings: _sums(step, beams, siblings, count))(candidates)
    mean = lambda own, sums: (own + sums) / (count + 1).astype(jnp.float32)
    short, long, hybrid = (mean(*each) for each in zip(own[:3], ahead, strict=True))
    usable = own.usable & jnp.isfinite(short) & jnp.isfinite(long) & jnp.isfinite(hybrid)
    known = usable.any()
    return Scores(*(jnp.where(known, *each) for each in zip((short, long, hybrid, usable), own, strict=True)))

  # As in `judge`: every device ranks all candidates.
  return step.laid_out(jax.lax.cond(count > 0, means, lambda: own))


def _sums(begun: Step, beams: Beam, candidates: Candidates, count: IntScalar) -> tuple[jax.Array, ...]:
  """Sums of each score of `count` chunks, at least one, that follow one candidate of every beam, [K] each."""
  search = dataclasses.replace(begun.search, beam_size=1, policy=None, look_ahead=0)

  def after(step: Step, beams: Beam, candidates: Candidates) -> SearchState:
    beams, kept = step.keep(beams, candidates)
    assert kept.frames is not None
    num_past = step.past_after(beams, kept.frames.shape[1])
    return SearchState(step.chunk_index + 1, step.state.base_seed, step.state.begin, num_past, beams, None)

  def next_chunk(state: SearchState) -> tuple[Step, Beam, Candidates]:
    step = dataclasses.replace(begun, state=state, search=search, first=False)
    opened, _ = step.open()
    explored = step.explore(opened, step.seeds(opened))
    return step, opened, jax.tree.map(lambda x: x[:, 0], explored.candidates)

  def go_on(_: IntScalar, carry: tuple[SearchState, tuple]) -> tuple[SearchState, tuple]:
    state, sums = carry
    step, opened, made = next_chunk(state)
    return after(step, opened, made), jax.tree.map(jnp.add, sums, made.scores[:3])

  state, sums = after(begun, beams, candidates), jax.tree.map(jnp.zeros_like, candidates.scores[:3])
  if begun.search.look_ahead > 1:
    state, sums = jax.lax.fori_loop(1, count, go_on, (state, sums))
  return jax.tree.map(jnp.add, sums, next_chunk(state)[2].scores[:3])
