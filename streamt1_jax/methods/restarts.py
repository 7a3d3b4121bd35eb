"""A search that begins a video several times: zero-order search over the first chunk's noise.

  seed ── noise of the first chunk ── a few chunks ── video reward ── pivot
                                                                        │ N neighbours: t pivot + sqrt(1 - t^2) fresh
                                                                        └── the best is the next pivot, R times
                                                                              └── the video goes on from its state

Zero-order search is of Ma et al. (arXiv 2501.09732), here in its streaming form: the first chunk fixes scene and
layout, so only the video's beginning is tried. The noise between denoising steps and that of later chunks stay those of
the video's seed, so a neighbour differs from its pivot in nothing but the noise it starts from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax import drivers
from streamt1_jax.chunk_step import chunk_step
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.config.base import require
from streamt1_jax.generator import Models
from streamt1_jax.methods.spec import Method
from streamt1_jax.methods.tries import Tell, Try, copied, of_numbers, silent
from streamt1_jax.noise_propagation import fuse_noise
from streamt1_jax.parallel import hosts
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.typing import Latents, SearchParams

_MOST_TRIES = 900  # The second chunk's seeds begin 1000 above those of the first.


@dataclasses.dataclass(frozen=True)
class ZeroOrder:
  """How to search the first chunk's noise.

  Attributes:
    rounds: R, how often neighbours of the pivot are tried; 0 is plain streaming.
    neighbours: N, tried in every round.
    chunks: C_p, chunks that are made of every try and judged.
    nearness: t in [0, 1], share of the pivot in a neighbour's noise; 0 is random search.
  """

  rounds: int = 2
  neighbours: int = 4
  chunks: int = 1
  nearness: float = 0.95

  def __post_init__(self):
    for name, least in (("rounds", 0), ("neighbours", 1), ("chunks", 1)):
      require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}")
    require(0.0 <= self.nearness <= 1.0, f"nearness must be in [0, 1], got {self.nearness}")
    tries = self.rounds * self.neighbours
    require(tries <= _MOST_TRIES, f"rounds times neighbours must be at most {_MOST_TRIES}, got {tries}")


class _Trial(NamedTuple):
  """A beginning: its starting noise, its chunks with the states after them, and what the video reward gives it.

  One that is NaN or Inf has its `error`, and is never better than another.
  """

  noise: Latents
  steps: list[tuple[SearchState, ChunkTrace]]
  told: Try
  error: drivers.SearchError | None = None


def zero_order(
  params: SearchParams,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  *,
  num_chunks: int,
  seed: int,
  state: SearchState | None = None,
  border: drivers.Border | None = None,
  tell: Tell = silent,
  newest: ChunkTrace | None = None,
  **numbers: float,
) -> Iterator[tuple[SearchState, ChunkTrace]]:
  """Drives a video as `drivers.stream_states` does, once its first chunk's noise is found.

  It keeps the states of the best beginning beside those of the one in work, one for each of `ZeroOrder.chunks`.

  Args:
    params: weights.
    condition: what the video is made for.
    models: static half of the chunk step.
    search: of one candidate per chunk.
    num_chunks: length of the whole video.
    seed: base seed. Neighbours draw from the seeds behind it.
    state: as in `drivers.stream_states`. Behind the first chunk nothing is tried, and the video goes on.
    border: as there. It is called for the video that is kept.
    tell: receives every beginning that was tried.
    newest: as every `Method.run` takes it; nothing is read of it.
    **numbers: fields of `ZeroOrder`.

  Raises:
    ConfigError: impossible numbers, a search with several candidates, or a video whose first chunk is given.
    SearchError: as `drivers.stream_states`.
  """
  del newest
  method = of_numbers(ZeroOrder, numbers)
  require(search.num_candidates == 1, f"zero-order search takes one candidate per chunk, got {search.num_candidates}")
  drivers.check_length(models, search, num_chunks)
  go_on = functools.partial(
    drivers.stream_states, params, models=models, search=search, num_chunks=num_chunks, seed=seed
  )
  if state is None:
    state = drivers.jitted_init_state(params, np.asarray(seed, np.int32), models, search, num_chunks)
  begin, index = (int(number) for number in hosts.to_host((state.begin, state.chunk_index)))
  require(begin == 0, "zero-order search tries the first chunk of a video, and this video's is given")
  if index > 0 or not method.rounds:
    yield from go_on(condition=condition, state=state, border=border)
    return
  crossed = (state, condition) if border is None else border(state, condition)
  if crossed is None:
    return
  state, condition = crossed
  best = _best_beginning(params, state, condition, models, search, method, num_chunks, seed, tell)
  for index, step in enumerate(best.steps):
    crossed = (state, condition) if border is None or index == 0 else border(state, condition)
    if crossed is None:
      return
    if crossed[1] is not condition:
      # What was tried behind a change of the prompt was tried under the old one.
      tell(best.told._replace(begin=index, chunks=len(best.steps) - index, kept=False, judged_frames=0))
      yield from go_on(condition=crossed[1], state=crossed[0], border=border)
      return
    state = step[0]
    yield step
  yield from go_on(condition=condition, state=state, border=border)


def _best_beginning(
  params: SearchParams,
  begin: SearchState,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  method: ZeroOrder,
  num_chunks: int,
  seed: int,
  tell: Tell,
) -> _Trial:
  chunks = min(method.chunks, num_chunks)
  try_noise = functools.partial(_trial, params, begin, condition, models, search, chunks)
  tried: list[Try] = []

  def try_one(pivot: Latents, nearness: float, drawn: int) -> _Trial:
    trial = try_noise(seed, fuse(pivot, models.draw_noise(jnp.int32(drawn)).fresh, nearness), drawn)
    tried.append(trial.told)
    return trial

  best, kept = try_one(jnp.zeros(models.generator.latent_shape), 0.0, seed), 0
  for number in range(method.rounds):
    pivot = best.noise
    for index in range(method.neighbours):
      trial = try_one(pivot, method.nearness, seed + 1 + number * method.neighbours + index)
      # Between equals the earlier one stays, and NaN is never better.
      rescues = best.error is not None and trial.error is None
      if rescues or trial.told.score > _or_worst(best.told.score):
        best, kept = trial, len(tried) - 1
  if best.error is not None:
    raise best.error
  for index, told in enumerate(tried):
    tell(told._replace(kept=index == kept))
  return best


def _trial(
  params: SearchParams,
  begin: SearchState,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  chunks: int,
  seed: int,
  noise: Latents,
  drawn: int,
) -> _Trial:
  """Makes and judges the beginning of the video that starts from `noise`."""
  state, trace = first_chunk(params, copied(begin), condition, noise, models, search)
  made = []
  try:
    drivers.check_usable(trace, 0, seed)
    # Its noise was drawn from this seed, whatever the video's is.
    seeds = trace.candidates._replace(seed=np.full_like(trace.candidates.seed, drawn))
    made.append((state, hosts.to_host(trace._replace(candidates=seeds))))
    if chunks > 1:
      # The state is copied before it is lent: a caller may keep the states of the video's chunks.
      more = {"num_chunks": chunks, "seed": seed, "state": copied(state)}
      for state, trace in drivers.stream_states(params, condition, models, search, **more):
        made.append((copied(state), hosts.to_host(trace)))
  except drivers.SearchError as error:
    return _Trial(noise, made, Try(0, len(made) + 1, drawn, math.nan, False), error)
  frames = np.concatenate([trace.frames[:1] for _, trace in made], axis=1)
  last = made[-1][1].frames.shape[1]
  score = float(drivers.judged(params, models, search, condition, frames, last)[0])
  return _Trial(noise, made, Try(0, chunks, drawn, score, False, frames.shape[1]))


@functools.partial(jax.jit, static_argnames="nearness")
def fuse(pivot: Latents, fresh: Latents, nearness: float) -> Latents:
  """t pivot + sqrt(1 - t^2) fresh."""
  return fuse_noise(pivot, fresh, nearness)


@functools.partial(jax.jit, static_argnames=("models", "search"), donate_argnames="state")
def first_chunk(
  params: SearchParams, state: SearchState, condition: Condition, noise: Latents, models: Models, search: SearchConfig
) -> tuple[SearchState, ChunkTrace]:
  """The first chunk of a video with one candidate, from a starting noise that is given."""
  given = lambda seed: models.draw_noise(seed)._replace(fresh=noise)
  return chunk_step(params, state, condition, dataclasses.replace(models, draw_noise=given), search, first=True)


def _or_worst(score: float) -> float:
  return score if math.isfinite(score) else -math.inf


def _plain(model: ModelConfig, **numbers: float) -> SearchConfig:
  of_numbers(ZeroOrder, numbers)
  return SearchConfig.streaming(model)


def _kept(**numbers: float) -> int:
  """Where the video begins, and the chunks of the best beginning and of the one in work."""
  method = of_numbers(ZeroOrder, numbers)
  return 1 + 2 * method.chunks if method.rounds else 0


ZERO_ORDER = Method(
  "zero_order",
  "Zero-order search over the first chunk's noise: the video goes on from the beginning that the video reward likes.",
  _plain,
  ("reward_codec", "sink_distance"),
  numbers={field.name: field.default for field in dataclasses.fields(ZeroOrder)},  # type: ignore[misc]
  asks=True,
  kept=_kept,
  begins=True,
  run=zero_order,
)
