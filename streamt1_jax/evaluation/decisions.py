"""What a setting changes in the decisions of a search: each chunk decided several ways from the same beams and noises.

`decide_ways` does it for any ways; the rest is about fewer frames of a chunk.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig
from streamt1_jax.generator import Models
from streamt1_jax.io import markdown
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards import selection
from streamt1_jax.state import ChunkTrace, SearchState


class Decision(NamedTuple):
  """How one chunk was decided.

  Attributes:
    survivors: [K] int, best first.
    short: [N] float32 scores of the image reward.
  """

  survivors: Int32[np.ndarray, " K"]
  short: Float32[np.ndarray, " N"]

  @classmethod
  def of(cls, trace: ChunkTrace) -> "Decision":
    return cls(np.asarray(trace.survivor), np.asarray(trace.candidates.short).ravel())


class Way(NamedTuple):
  """One way to decide a chunk.

  Attributes:
    models: what makes and judges candidates.
    search: how to search.
  """

  models: Models
  search: SearchConfig


def decide_ways(
  pipeline: Pipeline, ways: Sequence[Way], chunks: int, caption: str, seed: int
) -> Iterator[list[ChunkTrace]]:
  """Yields every chunk's traces, one per way; the search goes on with the first way's winners."""
  condition = pipeline.condition(caption, chunks)
  state = _state_for_all([drivers.jitted_init_state(pipeline.params, np.int32(seed), *way) for way in ways])
  for chunk in range(chunks):
    after, traces = None, []
    for models, search in ways:
      # A step takes its state's buffers.
      given = jax.tree.map(jnp.copy, state)
      found, trace = drivers.jitted_chunk_step(pipeline.params, given, condition, models, search, first=chunk == 0)
      drivers.check_usable(trace, chunk, seed)
      after = found if after is None else after
      traces.append(trace)
    state = after
    yield traces


def _state_for_all(states: Sequence[SearchState]) -> SearchState:
  """The first state, with what other ways keep of the past and it does not: every step adds to all that is there."""
  kept = {
    name: next((found for state in states if (found := getattr(state.beams, name)) is not None), None)
    for name in ("past", "latents")
  }
  return states[0]._replace(beams=states[0].beams._replace(**kept))


def decide(
  pipeline: Pipeline, search: SearchConfig, frames: list[int], chunks: int, caption: str, seed: int
) -> list[list[Decision]]:
  """[chunks][numbers of frames] decisions; the search goes on with the first number's winners."""
  image = pipeline.models.image_reward
  assert isinstance(image, selection.WeightedImageReward)
  seeing = lambda count: dataclasses.replace(pipeline.models, image_reward=dataclasses.replace(image, num_frames=count))
  ways = [Way(seeing(count), search) for count in frames]
  return [list(map(Decision.of, traces)) for traces in decide_ways(pipeline, ways, chunks, caption, seed)]


def agreement(decided: list[list[Decision]], frames: list[int]) -> dict[int, dict[str, float]]:
  """Shares, by number of frames, of decisions equal to those of the first number."""
  report = {}
  for index, number in enumerate(frames):
    pairs = [(decisions[0], decisions[index]) for decisions in decided]
    share = lambda values: round(float(np.mean(values)), 3)
    report[number] = {
      "chunks": len(pairs),
      "same_best": share([a.survivors[0] == b.survivors[0] for a, b in pairs]),
      "same_survivors": share([set(a.survivors) == set(b.survivors) for a, b in pairs]),
      "same_order": share([same_order(a.short, b.short) for a, b in pairs]),
    }
  return report


def same_order(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float:
  """Share of the pairs of entries that are in the same order in `a` and `b`."""
  first, second = np.triu_indices(len(a), 1)
  return float(np.mean((a[first] > a[second]) == (b[first] > b[second])))


def agreement_table(report: dict[int, dict[str, float]]) -> str:
  """The report in Markdown."""
  shares = lambda row: [f"{row[name]:.2f}" for name in ("same_best", "same_survivors", "same_order")]
  rows = ([str(number), str(row["chunks"]), *shares(row)] for number, row in report.items())
  return markdown.table(["frames", "chunks", "same best", "same survivors", "same order"], rows)
