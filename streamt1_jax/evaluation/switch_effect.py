"""How soon a video of the shapes world shows a new caption, for every way to change the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax import drivers
from streamt1_jax.between_chunks import switch_prompt
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.data import shapes, verify, world
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.state import Condition, SearchState

VERDICTS = ("color", "motion", "background", "all_at_once")
"""What is asked of every chunk under the new caption."""


class Pair(NamedTuple):
  """A caption, and the one that it changes to: another colour, direction and background."""

  before: str
  after: str


def choose_pairs(captions: Sequence[str], count: int) -> list[Pair]:
  """The first `count` captions, each with the next one that differs in colour, direction and background."""
  pairs = []
  for index, before in enumerate(captions[:count]):
    old = shapes.parse_caption(before)
    others = itertools.islice(itertools.cycle(captions), index + 1, index + len(captions))
    differs = lambda text, old=old: all(
      getattr(shapes.parse_caption(text), name) != getattr(old, name) for name in ("color", "direction", "background")
    )
    pairs.append(Pair(before, next(text for text in others if differs(text))))
  return pairs


def after_switches(
  pipeline: Pipeline,
  search: SearchConfig,
  switches: Sequence[SwitchConfig],
  pair: Pair,
  seed: int,
  *,
  chunks_before: int,
  chunks_after: int,
) -> Iterator[list[dict[str, bool]]]:
  """Verdicts of every chunk after the switch, under the new caption; one list per way, all from the same video.

  First come the verdicts of the chunks before it, under the old caption.
  """
  num_chunks = chunks_before + chunks_after
  old, new = (pipeline.condition(text, num_chunks) for text in pair)
  states = drivers.stream_states(pipeline.params, old, pipeline.models, search, num_chunks=num_chunks, seed=seed)
  *earlier, (state, last) = [*itertools.islice(states, chunks_before)]
  traces = [trace for _, trace in earlier] + [last]
  yield [verify.verify(_frames(trace), world.parse(pair.before)) for trace in traces]
  for switch in switches:
    # A step takes its state's buffers.
    switched = switch_prompt(pipeline.params, jax.tree.map(jnp.copy, state), new, pipeline.models, search, switch)
    frames = _go_on(pipeline, search, switched, new, chunks_after)
    yield [verify.verify(chunk, world.parse(pair.after)) for chunk in frames]


def _go_on(
  pipeline: Pipeline, search: SearchConfig, state: SearchState, condition: Condition, chunks: int
) -> Iterator[np.ndarray]:
  for _ in range(chunks):
    inputs = pipeline.params, state, condition, pipeline.models, search
    state, trace = drivers.jitted_chunk_step(*inputs, first=False)
    yield _frames(trace)


def _frames(trace: Any) -> np.ndarray:
  """The frames of the best beam."""
  return np.asarray(trace.frames[0])


def summarise(videos: Sequence[Sequence[dict[str, bool]]]) -> dict[str, dict[str, float | None]]:
  """By verdict: the share of videos in which it holds in some chunk, the median of the first such chunk (1 is the
  first after the switch; None if half of the videos never show it), and the share of the last chunks that show it.
  """
  report = {}
  for name in VERDICTS:
    first = [next((c for c, verdicts in enumerate(video, 1) if verdicts[name]), np.inf) for video in videos]
    median = float(np.median(first))
    report[name] = {
      "ever": float(np.mean(np.isfinite(first))),
      "median_chunk": median if np.isfinite(median) else None,
      "last_chunk": float(np.mean([video[-1][name] for video in videos])),
    }
  return report
