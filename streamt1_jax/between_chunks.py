"""What may happen to a search between two chunks: a new prompt, and chunks that are given instead of made.

Both are functions from state to state, like the chunk step. A state keeps its shapes, so that none of them makes the
chunk step compile again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from streamt1_jax import reward_pruning
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.generator import Models
from streamt1_jax.parallel.sharding import with_shardings
from streamt1_jax.policies import Scores, SwitchedPolicy, search_policy
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.state import Beam, Condition, SearchState
from streamt1_jax.step import Candidates, Step
from streamt1_jax.typing import Decoded, HostArray, Latents, SearchParams


@functools.partial(jax.jit, static_argnames=("models", "search", "switch"), donate_argnames=("state",))
def switch_prompt(
  params: SearchParams,
  state: SearchState,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  switch: SwitchConfig,
  switches: Bool[HostArray, " prompts"] | None = None,
) -> SearchState:
  """The state as a new prompt finds it; compiled once for all switches of a search.

  The memories of all beams are computed anew as `switch` says. The history of scores restarts: scores under two prompts
  do not compare, and a first fall of the video score would read as a change of scene. Noise, seeds and decoder state
  stay, and so does the policy's carry, unless the policy says otherwise (`policies.SwitchedPolicy`).

  Args:
    params: weights of all models.
    state: between two chunks; may be donated.
    condition: the new prompt. For videos in lockstep the prompts of all of them, as `drivers.stack_conditions` puts
      them together.
    models: static.
    search: static.
    switch: static; how. Videos in lockstep share their counters, so that `since` must hold for all of them or none.
    switches: which videos in lockstep have a new prompt; all by default.
  """

  def one_video(beams: Beam, text: Any) -> Beam:
    def recache(memory):
      backbone, execution = params["backbone"], models.execution
      return models.generator.recache(backbone, memory, state.chunk_index, text, search, switch, execution)

    history = jax.vmap(lambda _: reward_pruning.empty_history(search))(beams.seed)
    return beams._replace(memory=jax.vmap(recache)(beams.memory), history=history)

  def if_switched(video: tuple[Beam, Any, jax.Array]) -> Beam:
    beams, text, switched = video
    return jax.lax.cond(switched, one_video, lambda beams, _: beams, beams, text)

  policy = search_policy(search)
  carry_after = policy.switched if isinstance(policy, SwitchedPolicy) else lambda carry: carry
  if state.base_seed.ndim:
    switched = jnp.ones(state.base_seed.shape, bool) if switches is None else jnp.asarray(switches)
    # One after the other: a video that goes on under its prompt costs nothing.
    beams = jax.lax.map(if_switched, (state.beams, condition.text, switched))
    choose = jax.vmap(lambda switched, carry: jax.lax.cond(switched, carry_after, lambda carry: carry, carry))
    carry = choose(switched, state.policy)
  else:
    beams, carry = one_video(state.beams, condition.text), carry_after(state.policy)
  num_past = jnp.zeros_like(state.num_past) if switch.video == "since" else state.num_past
  leading = ("prompt",) * state.base_seed.ndim
  return with_shardings(
    models.execution.mesh, "state", state._replace(beams=beams, num_past=num_past, policy=carry), leading=leading
  )


@functools.partial(jax.jit, static_argnames=("models", "search", "first"), donate_argnames=("state",))
def commit_given(
  params: SearchParams,
  state: SearchState,
  condition: Condition,
  latents: Latents,
  models: Models,
  search: SearchConfig,
  *,
  first: bool,
) -> tuple[SearchState, Decoded]:
  """The state after a chunk that is given: all beams remember it, and the next chunk has no parent noise.

  It is decoded, so that the decoder goes on from it and the video reward sees it; it is not judged.

  Args:
    params: weights of all models.
    state: before the chunk; may be donated.
    condition: the prompt.
    latents: the chunk.
    models: static.
    search: static.
    first: static; whether it is the video's first chunk.

  Returns:
    The state, and the chunk's decoded frames.
  """
  step = Step(params, state, condition, models, search, first)
  beams, _ = step.open()
  equal = lambda x: jnp.broadcast_to(x[None], (search.top_k, *x.shape))
  chunk = equal(latents)
  frames, codec = models.execution.map_beams(step.decode)(chunk, beams.codec)
  nothing, no = jnp.zeros(search.top_k), jnp.zeros(search.top_k, bool)
  scores = Scores(nothing, nothing, nothing, ~no)
  given = Candidates(beams.seed, beams.noise, chunk, scores, Flags(no, no), frames, codec)
  after = step.commit(beams, given)._replace(history=beams.history)
  num_past = step.past_after(after, frames.shape[1])
  index = state.chunk_index + 1
  state = state._replace(chunk_index=index, begin=index, num_past=num_past, beams=after)
  return with_shardings(models.execution.mesh, "state", state), frames[0]
