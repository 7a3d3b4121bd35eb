"""One chunk of the search, as a pure function from state to state.

  open      makes room in the memory                                                      every beam
  propose   seeds, noise fused with the parent's noise, noise for the steps between       every candidate
  denoise   S steps that read the memory and write nothing ── x0                          every candidate
            some policies reject candidates between two of them, by a preview of x0       candidates of one beam
  judge     decode ── short-term and long-term score ── hybrid score                      every candidate
            some searches carry it on by chunks that are judged and thrown away           every candidate
  select    the policy names the survivors                                                all candidates together
  close     survivors take their beams ── clean pass ── commit to the memory              winners only

`propose`, `denoise` and `judge` together are `explore`, which changes nothing: it can be called several times on what
`open` gave. A chunk that is not judged has neither `judge` nor `select`: every beam goes on with its one candidate,
unless that is NaN or Inf.
The parts are those of `step.Step`.
"""

import jax
import jax.numpy as jnp

from streamt1_jax import look_ahead, reward_pruning, rounds
from streamt1_jax.config import SearchConfig
from streamt1_jax.generator import Models
from streamt1_jax.parallel.sharding import constrain, with_shardings
from streamt1_jax.policies import Choice
from streamt1_jax.state import CandidateTrace, ChunkTrace, Condition, SearchState
from streamt1_jax.step import Step
from streamt1_jax.typing import SearchParams


def chunk_step(
  params: SearchParams,
  state: SearchState,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  *,
  first: bool,
  judged: bool = True,
  record: bool = False,
) -> tuple[SearchState, ChunkTrace]:
  """Generates and searches one chunk.

  Args:
    params: weights of all models, by the names that `Models` gives.
    state: state before the chunk; may be donated.
    condition: the prompt.
    models: static.
    search: static.
    first: static; whether this is the video's first chunk (it has fewer pixel frames and no parent noise).
    judged: static; false for the chunks between those that `SearchConfig.judge_every` judges.
    record: static; whether the trace holds fused noise and every x0.

  Returns:
    State after the chunk, and its trace.
  """
  step = Step(params, state, condition, models, search if judged else search.unjudged(), first)
  with jax.named_scope("open"):
    opened, eviction = step.open()
  ahead = drawn_rounds = None
  if judged and search.round_size:
    (candidates, x0, inside), drawn_rounds = rounds.explore(step, opened, step.seeds(opened))
  else:
    candidates, x0, inside = step.explore(opened, step.seeds(opened))
  if judged:
    scores = candidates.scores
    if search.look_ahead:
      with jax.named_scope("look_ahead"):
        scores = look_ahead.scores_with(step, opened, candidates)
      ahead = scores.hybrid
    with jax.named_scope("select"):
      choice = step.select(scores)
    beams, winners = step.close(opened, candidates, choice.survivor)
  else:
    # A beam whose candidate is not usable takes that of the first beam that has one, as with `KeepBeams`.
    usable = candidates.scores.usable[:, 0]
    kept = jnp.where(usable, jnp.arange(search.top_k), jnp.argmax(usable)).astype(jnp.int32)
    take = lambda tree: jax.tree.map(lambda x: jnp.take(x, kept, axis=0, mode="clip"), tree)
    choice = Choice(kept * search.beam_size, jnp.zeros(search.top_k), take(step.carry))
    no = jnp.zeros_like(candidates.scores.usable)
    candidates = candidates._replace(flags=reward_pruning.Flags(no, no))
    beams, winners = step.close(opened, candidates, kept)
    beams = beams._replace(history=take(opened.history))
  assert winners.frames is not None
  # The candidates of all chunks have one shape in the trace, whether a chunk is judged or not.
  missing = search.beam_size - candidates.seed.shape[1]
  drawn = CandidateTrace(candidates.seed, *candidates.scores, candidates.flags)
  trace = ChunkTrace(
    candidates=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing))), drawn) if missing else drawn,
    eviction=eviction,
    survivor=choice.survivor,
    score=choice.score,
    latents=winners.latents,
    frames=winners.frames,
    steps={"noise": candidates.noise, "x0": x0} if record else None,
    log_weight=choice.log_weight,
    inside=inside,
    ahead=ahead,
    rounds=drawn_rounds,
    previews=step.previews(candidates) if judged else None,
  )
  num_past = step.past_after(beams, winners.frames.shape[1])
  spare = state.spare
  if spare is not None and drawn_rounds is not None:
    spare = spare + search.round_budget - drawn_rounds
  state = SearchState(state.chunk_index + 1, state.base_seed, state.begin, num_past, beams, choice.carry, spare)
  # The trace is what a host reads: every device has all of it.
  mesh = models.execution.mesh
  return with_shardings(mesh, "state", state), constrain(mesh, trace)
