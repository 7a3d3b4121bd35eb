"""Backtracking: a video that goes wrong is taken back a few chunks and made anew from another seed.

  chunk ── health ── good ── next chunk
              └───── bad ─── the state of some chunks ago, another base seed ── the same chunks again, A times at most
                                                                                  └── the healthiest of all go on

The health of a chunk is its motion: the mean difference of neighbouring frames, as a share of the chunk before. What is
below `motion` has begun to freeze. Chunks that somebody has seen cannot be taken back: a live stream lags behind by as
many chunks as `back` says.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from streamt1_jax import drivers
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.config.base import require
from streamt1_jax.generator import Models
from streamt1_jax.methods.spec import Method
from streamt1_jax.methods.tries import Tell, Try, copied, of_numbers, silent
from streamt1_jax.parallel import hosts
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.typing import HostArray, SearchParams

_SEED_LIMIT = 2**30
"""Seeds grow by 1000 a chunk and have 32 bits."""


@dataclasses.dataclass(frozen=True)
class Rewind:
  """When to go back, how far and how often.

  Attributes:
    motion: smallest healthy motion of a chunk, as a share of the motion of the chunk before; 0 is plain streaming.
    back: L, chunks that are made anew, the bad one included.
    attempts: A, how often that is tried at one place, before the healthiest of all is kept.
  """

  motion: float = 0.8
  back: int = 1
  attempts: int = 2

  def __post_init__(self):
    require(0.0 <= self.motion < 10.0, f"motion must be in [0, 10), got {self.motion}")
    for name, least in (("back", 1), ("attempts", 0)):
      require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}")


class _Begin(NamedTuple):
  """Where a chunk begins: the state, the prompt, and the motion of the chunk before (NaN for none)."""

  state: SearchState
  condition: Condition
  motion: float


class _Made(NamedTuple):
  """A chunk: where it began, the state after it, what it left, its motion and its health; `error` if it is unusable."""

  begin: _Begin
  state: SearchState
  trace: ChunkTrace
  motion: float
  health: float
  error: drivers.SearchError | None = None


_Make = Callable[[SearchState, Condition, float, int], _Made]


def motion_of(frames: Shaped[HostArray, "Q ..."]) -> float:
  """Mean absolute difference of neighbouring frames; NaN for a single one."""
  values = np.asarray(frames, np.float32)
  return float(np.abs(np.diff(values, axis=0)).mean()) if len(values) > 1 else float("nan")


def health_of(motion: float, before: float) -> float:
  """The motion of a chunk as a share of that of the chunk before; infinite if there is nothing to compare with."""
  comparable = np.isfinite(motion) and np.isfinite(before) and before > 0
  return motion / before if comparable else math.inf


def seed_of_attempt(seed: int, chunk: int, attempt: int) -> int:
  """The base seed of an attempt: a function of the three alone."""
  return int(np.random.SeedSequence([seed % 2**32, chunk, attempt]).generate_state(1)[0]) % _SEED_LIMIT


def backtrack(
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
  """Drives a video as `drivers.stream_states` does, and yields chunks that will not be taken back any more.

  It never goes back behind a change of the prompt. While chunks are made anew it keeps up to six copies of the
  state for each of the `Rewind.back` chunks. A chunk that is NaN or Inf is not healthy.

  Args:
    params: weights.
    condition: what the video is made for.
    models: static half of the chunk step.
    search: any with one beam.
    num_chunks: length of the whole video.
    seed: base seed.
    state: as in `drivers.stream_states`, with `newest`: the video is the same as if it had not stopped there.
    border: as there.
    tell: where a chunk was not healthy, receives that try and every other one.
    newest: the trace that was yielded with `state`, on the host; None where the video begins.
    **numbers: fields of `Rewind`.

  Raises:
    ConfigError: impossible numbers, or a search with several beams.
    SearchError: as `drivers.stream_states`.
  """
  method = of_numbers(Rewind, numbers)
  require(search.top_k == 1, f"backtracking takes a search of one beam, got {search.top_k}")
  drivers.check_length(models, search, num_chunks)
  if state is None:
    state = drivers.jitted_init_state(params, np.asarray(seed, np.int32), models, search, num_chunks)
  make = functools.partial(_make, params, models, search, seed)
  # Chunks that may still be taken back.
  last: collections.deque[_Made] = collections.deque()
  motion = float("nan") if newest is None else motion_of(newest.frames[0])
  start, begin = (int(number) for number in hosts.to_host((state.chunk_index, state.begin)))
  # Before a chunk is yielded, those that go back to it are settled: after a stop they only have to be made again.
  settled = start + method.back - 1 if start > begin else start
  for chunk in range(start, num_chunks):
    if border is not None:
      crossed = border(state, condition)
      if crossed is None:
        break
      if crossed[1] is not condition:
        yield from _shown(last, 0)
        settled = chunk
      state, condition = crossed
    last.append(make(state, condition, motion, chunk))
    if last[-1].health < method.motion and chunk >= settled:
      last = collections.deque(_healthiest(make, list(last), method, seed, chunk, tell))
    if last[-1].error is not None:
      raise last[-1].error
    state, motion = last[-1].state, last[-1].motion
    if method.back > 1:
      # The next chunk takes the buffers of the state.
      last.append(last.pop()._replace(state=copied(state)))
    yield from _shown(last, method.back - 1)
  yield from _shown(last, 0)


def _make(
  params: SearchParams,
  models: Models,
  search: SearchConfig,
  seed: int,
  state: SearchState,
  condition: Condition,
  motion: float,
  chunk: int,
) -> _Made:
  """Makes one chunk; it takes the buffers of `state`."""
  begin = _Begin(copied(state), condition, motion)
  state, trace = drivers.jitted_chunk_step(params, state, condition, models, search, first=chunk == 0)
  try:
    drivers.check_usable(trace, chunk, seed)
  except drivers.SearchError as error:
    return _Made(begin, state, trace, math.nan, -math.inf, error)
  moved = motion_of(hosts.to_host(trace.frames)[0])
  return _Made(begin, state, trace, moved, health_of(moved, motion))


def _healthiest(make: _Make, first: list[_Made], method: Rewind, seed: int, chunk: int, tell: Tell) -> Sequence[_Made]:
  """The healthiest of several tries at the chunks `first`.

  Their last one, `chunk`, is not healthy; `first` itself is one of the tries.
  """
  begin = first[0].begin
  place, best, kept = chunk - len(first) + 1, first, 0
  tried = [Try(place, len(first), int(hosts.to_host(begin.state.base_seed)), _worst(first), False)]
  for attempt in range(1, method.attempts + 1):
    drawn = seed_of_attempt(seed, chunk, attempt)
    new = jax.device_put(np.int32(drawn), begin.state.base_seed.sharding)
    state, motion, made = copied(begin.state)._replace(base_seed=new), begin.motion, []
    for index in range(place, chunk + 1):
      made.append(make(state if not made else copied(state), begin.condition, motion, index))
      state, motion = made[-1].state, made[-1].motion
      if made[-1].error is not None:
        break
    tried.append(Try(place, len(made), drawn, _worst(made), False))
    # Between equals the earlier one stays. The memories of the others are let go.
    if _worst(made) > _worst(best):
      best, kept = made, attempt
    if _worst(made) >= method.motion:
      break
  for attempt, each in enumerate(tried):
    tell(each._replace(kept=attempt == kept))
  return best


def _worst(made: Sequence[_Made]) -> float:
  return min(each.health for each in made)


def _shown(last: collections.deque[_Made], keep: int) -> Iterator[tuple[SearchState, ChunkTrace]]:
  """Takes out all but the newest `keep`."""
  while len(last) > keep:
    made = last.popleft()
    yield made.state, made.trace


def _plain(model: ModelConfig, **numbers: float) -> SearchConfig:
  of_numbers(Rewind, numbers)
  return SearchConfig.streaming(model)


def _kept(**numbers: float) -> int:
  """Where each chunk begins and ends, of the first try, of the best one and of the one in work."""
  method = of_numbers(Rewind, numbers)
  return (6 if method.attempts else 2) * method.back - 1


BACKTRACKING = Method(
  "backtracking",
  "Plain streaming that makes a chunk anew, from another seed, where the motion falls.",
  _plain,
  ("reward_codec", "sink_distance"),
  numbers={field.name: field.default for field in dataclasses.fields(Rewind)},  # type: ignore[misc]
  kept=_kept,
  run=backtrack,
)
