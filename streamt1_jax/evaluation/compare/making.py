"""Makes one video of a comparison, and counts what it took."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.cost import Cost, chunk_depth, whole_video_cost
from streamt1_jax.evaluation.compare.scenes import Scene
from streamt1_jax.io.manifest import CompileCounter
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

  frames: UInt8[np.ndarray, "T H W 3"]
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
    lengths: Any = {"horizon": num_chunks, "capacity": num_chunks}
    steering = Steering(pipeline, scene.script(), search, SwitchConfig(), **lengths)
    options = {"num_chunks": num_chunks, "seed": seed, "border": steering.border}
    condition = steering.condition
    states = drive(pipeline.params, condition, pipeline.models, search, **options)
    traces = [hosts.to_host(trace) for _, trace in states]
    made = time.perf_counter()
    told = {"segments": steering.segments, "prompts": scene.captions}
    video = pipeline.assemble(steering.condition, search, traces, **told)
    end = time.perf_counter()
  models, price = pipeline.models, prices(condition)
  ledger = _counted(pipeline, search, num_chunks, traces, tried)
  verdict = whole_video_cost(models, search, num_chunks, begins=steering.begins)
  rounds = (None if trace.rounds is None else int(trace.rounds) for trace in traces)
  depths = [chunk_depth(models, search, index, num_chunks, each) for index, each in enumerate(rounds)]
  tries = sum(each.chunks for each in tried if not each.kept)
  return Finished(
    frames=video.frames,
    score=video.score,
    made=Counted(ledger.cost, ledger.flop(price)),
    verdict=Counted(verdict, price.of(verdict)),
    depth=sum(depths) + tries * (len(models.generator.sigmas) + 1),
    seconds=made - begun,
    verdict_seconds=end - made,
    compilations=compiled.count,
  )


def _counted(
  pipeline: Pipeline, search: SearchConfig, num_chunks: int, traces: Sequence[ChunkTrace], tried: Sequence[Try]
) -> Ledger:
  short_frames = pipeline.rewards.choice.short_frames
  ledger = Ledger(pipeline.models, pipeline.config, search, capacity=num_chunks, short_frames=short_frames)
  for trace in traces:
    ledger.add(trace)
  for each in tried:
    ledger.add_try(each)
  return ledger
