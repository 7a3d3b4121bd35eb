"""The videos of prompts that are made together: searched chunk by chunk, judged, written and saved as they come."""

from __future__ import annotations

import bisect
import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tqdm

from streamt1_jax import drivers
from streamt1_jax.cli import (
  command,
  monitoring,
  search_flags,
  stopped_searches,
)
from streamt1_jax.cli.generate_plan import Searcher
from streamt1_jax.cli.growing_result import GrowingResult
from streamt1_jax.cli.telling import warn
from streamt1_jax.config import SearchConfig
from streamt1_jax.cost import Cost
from streamt1_jax.drivers import SearchError
from streamt1_jax.finishing import Finishing, Scored
from streamt1_jax.io import manifest
from streamt1_jax.methods.tries import Try
from streamt1_jax.parallel import hosts
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.saved_search import SavedSearch
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.steering import Steering
from streamt1_jax.text.tokenizer import clean

_PROGRESS = "{desc}: chunk {n_fmt}/{total_fmt} |{bar:20}| {elapsed} passed, {remaining} left{postfix}"


def search_videos(
  searcher: Searcher,
  prompts: list[str],
  timer: manifest.PhaseTimer,
  writers: Mapping[str, GrowingResult],
  saved: SavedSearch,
) -> list[Made]:
  """Searches the videos of prompts that are made together; `writers` receive their chunks as they come."""
  plan, length = searcher.plan, searcher.plan.num_chunks
  videos, conditions, steering, states, start = _begin(searcher, prompts, timer, writers, saved)
  title = clean(prompts[0])[:40] + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
  options = {"bar_format": _PROGRESS, "mininterval": 0, "file": sys.stderr, "disable": not hosts.is_first()}
  unsaved: list[list[ChunkTrace]] = [[] for _ in prompts]
  with (
    tqdm.tqdm(total=length, initial=start, desc=title, **options) as bar,
    contextlib.closing(monitoring.Monitor(plan.values, prompts, length, start, plan.sample)) as monitor,
  ):
    for index in range(start, length):
      command.raise_if_interrupted()
      # The first chunk brings the seed to the device; after that, nothing may travel there unasked.
      guard = jax.transfer_guard_host_to_device("disallow" if index > start else "allow")
      with guard, timer.phase("search" if index > start else "first_chunk"), monitor.chunk(index):
        state, made = next(states)
      for chunks, trace in zip(unsaved, made, strict=True):
        chunks.append(trace)
      judged = plan.search.judges_chunk(searcher.start.num_chunks + index)
      monitor.log(index, made, judged=judged)
      if judged:
        bar.set_postfix_str(f"best score {made[0].score.max():.3f}", refresh=False)
      bar.update()
      stopped_searches.save_if_due(saved, state, unsaved, length, timer, plan.values.save_every)
      with timer.phase("write"):
        take_all(videos, made)
  command.raise_if_interrupted()
  with timer.phase("assemble"):
    scored = [video.finishing.end() for video in videos]
  told = [[(0, prompt)] for prompt in prompts]
  if steering is not None:
    told = [list(zip(steering.begins, steering.prompts, strict=True))]
  return [
    Made(each, segments, video.finishing.cost, condition)
    for each, segments, video, condition in zip(scored, told, videos, conditions, strict=True)
  ]


class Made(NamedTuple):
  """A finished video.

  Attributes:
    scored: its scores.
    segments: first chunk and prompt of every segment.
    cost: what judging it as a whole took.
    condition: its first prompt.
  """

  scored: Scored
  segments: list[tuple[int, str]]
  cost: Cost
  condition: Condition


class Unchanged(NamedTuple):
  """The one segment of a video that nothing steers."""

  condition: Condition
  begins: Sequence[int] = (0,)

  def segment(self, index: int) -> drivers.Segment:
    return drivers.Segment(self.begins[index], self.condition)


class Making:
  """One video while it is made: chunks that come are judged, and written if there is a `writer`."""

  def __init__(
    self, pipeline: Pipeline, search: SearchConfig, segments: Steering | Unchanged, writer: GrowingResult | None
  ):
    """`segments` may become more while the video is made."""
    self._segments, self._writer, self._chunks = segments, writer, 0
    self._segment: drivers.Segment | None = None
    self.finishing = Finishing(pipeline.params, pipeline.models, search, None if writer is None else writer.add)

  def give(self, given: drivers.Given) -> None:
    """The chunks that the video begins with."""
    self._chunks = len(given.frames)
    self.finishing.give(given, self._segments.segment(0))

  def take(self, trace: ChunkTrace) -> None:
    """The next chunk that was made."""
    if self._writer is not None:
      self._writer.add_trace(trace)
    self.finishing.add(trace, self._current_segment())
    self._chunks += 1

  def _current_segment(self) -> drivers.Segment:
    index = bisect.bisect_right(self._segments.begins, self._chunks) - 1
    # A prompt is read once for all of its chunks.
    if self._segment is None or self._segment.begin != self._segments.begins[index]:
      self._segment = self._segments.segment(index)
    return self._segment


class _Begun(NamedTuple):
  """Videos that are made together, and what drives them.

  Attributes:
    videos: what takes their chunks.
    conditions: their first prompts.
    steering: of the one video that is steered.
    states: the state after every chunk, and the chunk's traces.
    start: chunks that were made before.
  """

  videos: list[Making]
  conditions: list[Condition]
  steering: Steering | None
  states: Iterator[tuple[SearchState, list[ChunkTrace]]]
  start: int


def _begin(
  searcher: Searcher,
  prompts: list[str],
  timer: manifest.PhaseTimer,
  writers: Mapping[str, GrowingResult],
  saved: SavedSearch,
) -> _Begun:
  """Begins videos, or goes on with those of a stopped search."""
  plan, pipeline = searcher.plan, searcher.pipeline
  seeds, length = [plan.seed] * len(prompts), plan.num_chunks
  with timer.phase("text"):
    steering = begin_steering(searcher, prompts[0]) if plan.steered.is_steered else None
    conditions = (
      [pipeline.condition(prompt, length) for prompt in prompts] if steering is None else [steering.condition]
    )
    conditions = jax.block_until_ready(conditions)
  with timer.phase("load"):
    end = plan.length(searcher.start)
    abstract = pipeline.abstract_state(plan.search, num_chunks=max(end, plan.steered.horizon or 0), seeds=seeds)
    state, start = saved.restore(abstract, warn) or (None, 0)
  border = None
  if steering is not None:
    state, border = resume_steering(searcher, steering, state), functools.partial(scripted_border, steering)
    # A search that goes on does so under the prompt that was in force.
    conditions = [steering.condition]
  videos = [
    Making(pipeline, plan.search, steering or Unchanged(condition), writer)
    for condition, writer in zip(conditions, map(writers.get, prompts), strict=True)
  ]
  with timer.phase("load"):
    if steering is not None and steering.given is not None:
      videos[0].give(steering.given)
    newest = None
    for made in saved.traces():
      take_all(videos, made)
      newest = made[0]
    for fields in saved.tries:
      count_try(writers, Try(*fields))
  drive = search_flags.driver(plan.values)
  options: dict[str, Any] = {"num_chunks": end, "seeds": seeds, "state": state, "border": border}
  if drive is not None:

    def tell(tried: Try) -> None:
      saved.tries.append(tried)
      count_try(writers, tried)

    options["drive"] = functools.partial(drive, tell=tell, newest=newest)
  states = pipeline.stream_states(conditions, plan.search, **options)
  return _Begun(videos, conditions, steering, states, start)


def count_try(writers: Mapping[str, GrowingResult], tried: Try) -> None:
  """Counts what a driver tried for the one video that is made."""
  for writer in writers.values():
    writer.ledger.add_try(tried)


def take_all(videos: Sequence[Making], traces: Sequence[ChunkTrace]) -> None:
  """The next chunk of every video."""
  for video, trace in zip(videos, traces, strict=True):
    video.take(trace)


def begin_steering(searcher: Searcher, prompt: str) -> Steering:
  """Steers a video that begins under `prompt`. Raises ConfigError for a prompt that cannot be read."""
  plan, pipeline = searcher.plan, searcher.pipeline
  end, script = plan.length(searcher.start), searcher.script(prompt)
  horizon = plan.steered.horizon or end
  options = {"horizon": horizon, "capacity": max(end, horizon), "start": searcher.start}
  return Steering(pipeline, script, plan.search, plan.steered.switch, **options)


def resume_steering(searcher: Searcher, steering: Steering, state: SearchState | None) -> SearchState:
  """The state that a steered video goes on from: the saved one, or that after the chunks that it begins with."""
  begun = steering.begin(searcher.plan.seed)
  if state is None:
    return begun
  steering.resume(int(hosts.to_host(state.chunk_index)))
  return state


def scripted_border(
  steering: Steering, state: SearchState, condition: Condition
) -> tuple[SearchState, Condition] | None:
  """As `Steering.border`. Nobody watches: a prompt that cannot be switched to ends the search with SearchError."""
  begun = steering.border(state, condition)
  for receipt in steering.applied:
    if receipt.status == "failed":
      raise SearchError(f"chunk {receipt.chunk}: prompt {receipt.prompt!r} cannot take effect: {receipt.reason}")
  return begun
