"""Makes one video of a comparison, and counts what it took."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.cost import Cost, chunk_cost, streams_begun, total, whole_video_cost
from streamt1_jax.evaluation.compare.scenes import Scene
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.measuring import search_flop
from streamt1_jax.measuring.ledger import Ledger
from streamt1_jax.measuring.search_flop import Flop, Prices
from streamt1_jax.methods.tries import Try
from streamt1_jax.parallel import hosts
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.state import ChunkTrace
from streamt1_jax.steering import Steering


class Counted(NamedTuple):
  """What a video costs: in pieces of work, and in FLOP."""

  cost: Cost
  flop: Flop


class Finished(NamedTuple):
  """A video, and what it took.

  Attributes:
    frames: [T, H, W, 3] uint8.
    score: what the reward of the whole video gives it.
    made: what making it costs.
    verdict: what the reward of the finished video costs on top: who chooses nothing does not need it.
    depth: forwards one after the other, if all candidates of a chunk run at once.
    seconds: wall time of making it.
    verdict_seconds: wall time of the last verdict.
    compilations: programs that were built meanwhile; with any, the seconds are not those of a warm device.
  """

  frames: np.ndarray
  score: float
  made: Counted
  verdict: Counted
  depth: int
  seconds: float
  verdict_seconds: float
  compilations: int


Run = Callable[..., Iterator[tuple[Any, ChunkTrace]]]
"""Makes the chunks of a video as `drivers.stream_states` does, and tells of what it tried by `tell`."""


def make(
  pipeline: Pipeline,
  scene: Scene,
  search: SearchConfig,
  prices: Callable[[Any], Prices],
  *,
  run: Run | None = None,
  num_chunks: int,
  seed: int,
) -> Finished:
  """Makes a video as a session that is told the scene's captions does.

  Args:
    pipeline: the model.
    scene: what to show.
    search: how to search.
    prices: of the model, for prompts like that of a condition.
    run: drives the chunk step; None for `drivers.stream_states`.
    num_chunks: length.
    seed: base seed.

  Raises:
    ConfigError: the search or the length does not fit the model.
    SearchError: all candidates of a chunk are NaN or Inf.
  """
  tried: list[Try] = []
  drive = drivers.stream_states if run is None else functools.partial(run, tell=tried.append)
  with CompileCounter() as compiled:
    begun = time.perf_counter()
    lengths = {"horizon": num_chunks, "capacity": num_chunks}
    steering = Steering(pipeline, scene.script(), search, SwitchConfig(), **lengths)
    options = {"num_chunks": num_chunks, "seed": seed, "border": steering.border}
    condition = steering.condition
    states = drive(pipeline.params, condition, pipeline.models, search, **options)
    traces = [hosts.to_host(trace) for _, trace in states]
    made = time.perf_counter()
    told = {"segments": steering.segments, "prompts": scene.captions}
    video = pipeline.assemble(steering.condition, search, traces, **told)
    end = time.perf_counter()
  counted = _Account(pipeline, search, num_chunks, prices(condition))
  chunks = num_chunks + sum(each.chunks for each in tried if not each.kept)
  return Finished(
    frames=video.frames,
    score=video.score,
    made=counted.made(traces, tried),
    verdict=counted.verdict(steering.begins),
    depth=chunks * (len(pipeline.models.generator.sigmas) + 1),
    seconds=made - begun,
    verdict_seconds=end - made,
    compilations=compiled.count,
  )


class _Account(NamedTuple):
  """Counts the work of one video."""

  pipeline: Pipeline
  search: SearchConfig
  num_chunks: int
  prices: Prices

  def made(self, traces: Sequence[ChunkTrace], tried: Sequence[Try]) -> Counted:
    """What its chunks cost, and those that were tried and are not in it."""
    models, model, search = self.pipeline.models, self.pipeline.config, self.search
    short_frames = self.pipeline.rewards.choice.short_frames
    ledger = Ledger(models, model, search, capacity=self.num_chunks, short_frames=short_frames)
    for trace in traces:
      ledger.add(trace)
    costs, flops = [ledger.cost], [ledger.flop(self.prices)]
    for each in tried:
      for index in () if each.kept else range(each.begin, each.begin + each.chunks):
        cost = chunk_cost(models, search, index, self.num_chunks, short_frames=short_frames)
        seen = min(index, search_flop.most_seen(model)) + 1
        costs.append(cost)
        flops.append(self.prices.of(cost, streams_begun(models, search, index), seen))
      judged = Cost(video_calls=int(each.judged_frames > 0), video_frames=each.judged_frames)
      costs.append(judged)
      flops.append(self.prices.of(judged))
    return Counted(total(costs), search_flop.add(flops))

  def verdict(self, begins: Sequence[int]) -> Counted:
    """What the reward of the finished video costs, whose prompts begin with these chunks."""
    cost = whole_video_cost(self.pipeline.models, self.search, self.num_chunks, begins=begins)
    return Counted(cost, self.prices.of(cost))
