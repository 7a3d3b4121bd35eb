"""What a look at unfinished candidates tells of the finished ones.

Two questions, of each chunk of a search from the same state: how far candidates differ that share the noise they start
from and differ in the noise between the steps; and how a score of x0, as a step predicts it, ranks candidates.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig
from streamt1_jax.generator import Models
from streamt1_jax.noise_propagation import DrawNoise, NoiseDraws
from streamt1_jax.policies import Event
from streamt1_jax.state import Condition
from streamt1_jax.step import Proposal, Step
from streamt1_jax.typing import SearchParams

_SEEDS_OF_A_BEAM = 100

LIGHT, LARGE, FULL = "light", "large", "full"
"""Previews: one frame of the first latent frame; three of all latent frames; and what both rewards say of them all."""


class Look(NamedTuple):
  """One chunk of N candidates.

  Attributes:
    final: their scores by name, "short", "long" and "hybrid", [N] each.
    previews: by name of the preview, [S, N] after every step.
    same_start: final scores of other candidates, which share the noise they start from.
    same_between: of others, which share the noise between the steps.
  """

  final: dict[str, Float32[np.ndarray, " N"]]
  previews: dict[str, Float32[np.ndarray, "S N"]]
  same_start: dict[str, Float32[np.ndarray, " N"]]
  same_between: dict[str, Float32[np.ndarray, " N"]]


def search_of(candidates: int) -> SearchConfig:
  """One beam, whose candidates have nothing in common but their memory."""
  return SearchConfig(beam_size=candidates, top_k=1, noise_sigma=0.0, first_candidate="fresh")


@functools.cache
def shared(draw: DrawNoise, part: str) -> DrawNoise:
  """`draw`, but a beam's candidates have the same `part`, a field of `NoiseDraws`; base seeds are whole hundreds."""

  def drawn(seed: Any) -> NoiseDraws:
    return draw(seed)._replace(**{part: getattr(draw(seed // _SEEDS_OF_A_BEAM * _SEEDS_OF_A_BEAM), part)})

  return drawn


@functools.partial(jax.jit, static_argnames=("models", "search", "first"))
def _previews(params, state, condition, seed, steps, models, search, *, first):
  """Scores [S, K, B] by name of the preview."""
  step = Step(params, state, condition, models, search, first)
  latents = steps["x0"]
  proposal = Proposal(seed, steps["noise"], steps["noise"][:, :, None])
  sizes = {LIGHT: (1, 1), LARGE: (latents.shape[3], 3)}
  # One after the other: one program serves all steps.
  by_step = jnp.moveaxis(latents, 2, 0)
  found = {
    name: jax.lax.map(lambda x0, size=size: step.preview(state.beams, x0, Event(search.beam_size, 0, *size)), by_step)
    for name, size in sizes.items()
  }
  full = lambda x0: step.judge(state.beams, proposal, x0).scores.hybrid
  return found | {FULL: jax.lax.map(full, by_step)}


def look(
  params: SearchParams, condition: Condition, models: Models, *, candidates: int, chunks: int, seed: int
) -> Iterator[Look]:
  """Yields a look at every chunk of a video; the search goes on with its best candidate.

  Args:
    params: weights.
    condition: what the video is made for.
    models: static half of the chunk step.
    candidates: N.
    chunks: of the whole video.
    seed: base seed, a whole hundred.
  """
  search = search_of(candidates)
  state = drivers.jitted_init_state(params, np.int32(seed), models, search)
  alike = {part: _sharing(models, part) for part in ("fresh", "renoise")}
  for chunk in range(chunks):
    others, first = {}, chunk == 0
    for part, sharing in alike.items():
      # A step takes its state's buffers.
      given = jax.tree.map(jnp.copy, state)
      _, trace = drivers.jitted_chunk_step(params, given, condition, sharing, search, first=first)
      others[part] = _scores(trace.candidates)
    given = jax.tree.map(jnp.copy, state)
    after, trace = drivers.jitted_chunk_step(params, given, condition, models, search, first=first, record=True)
    drivers.check_usable(trace, chunk, seed)
    found = _previews(params, state, condition, trace.candidates.seed, trace.steps, models, search, first=first)
    previews = {name: np.asarray(scores)[:, 0] for name, scores in found.items()}
    yield Look(_scores(trace.candidates), previews, others["fresh"], others["renoise"])
    state = after


def _sharing(models: Models, part: str) -> Models:
  return dataclasses.replace(models, draw_noise=shared(models.draw_noise, part))


def _scores(candidates: Any) -> dict[str, np.ndarray]:
  return {name: np.asarray(getattr(candidates, name))[0] for name in ("short", "long", "hybrid")}


def spread(looks: Sequence[Look], which: str) -> dict[str, float]:
  """Mean over chunks of the standard deviation of candidates, by score; `which` is a field of `Look`."""
  found = [getattr(each, which) for each in looks]
  return {name: float(np.mean([np.std(each[name], ddof=1) for each in found])) for name in found[0]}


def rank_correlation(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float:
  """Spearman's correlation of two scores of the same candidates; equal scores share their mean place."""
  places = [np.mean([x[:, None] > x, x[:, None] >= x], axis=0).sum(axis=1) for x in (a, b)]
  if any(np.ptp(place) == 0 for place in places):
    return 0.0
  return float(np.corrcoef(*places)[0, 1])


def agreement(looks: Sequence[Look], preview: str, step: int, final: str = "hybrid") -> dict[str, float]:
  """How a preview after a step agrees with the final scores: means over chunks.

  Returns:
    `rank_correlation`; and with half and with a quarter of the candidates kept by the preview, `best_rejected_*`, the
    share of chunks whose best candidate is not kept, and `gain_kept_*`: how far above the mean candidate the best kept
    one is, as a share of how far the best of all is.
  """
  pairs = [(each.previews[preview][step], each.final[final]) for each in looks]
  row = {"rank_correlation": float(np.mean([rank_correlation(*pair) for pair in pairs]))}
  for name, divisor in (("half", 2), ("quarter", 4)):
    kept = [(np.argsort(-seen, kind="stable")[: len(seen) // divisor], truth) for seen, truth in pairs]
    row[f"best_rejected_{name}"] = float(np.mean([np.argmax(truth) not in places for places, truth in kept]))
    gained = sum(truth[places].max() - truth.mean() for places, truth in kept)
    row[f"gain_kept_{name}"] = float(gained / sum(truth.max() - truth.mean() for _, truth in kept))
  return row
