"""Videos finished chunk by chunk: as if put together at the end, and no chunk is kept longer than it must."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.drivers import Given, Segment
from streamt1_jax.finishing import Finishing
from streamt1_jax.generator import Eviction
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.state import CandidateTrace, ChunkTrace, Condition
from tests import small_search as small
from tests import toy_generator as toy

K, B, CHUNKS = 3, 2, 11
SEARCH = dataclasses.replace(small.SEARCH, top_k=K, beam_size=B)
CONDITION = Condition((), (), (), jnp.int32(CHUNKS))
FIRST, SECOND = Segment(0, CONDITION), Segment(5, CONDITION)


def _traces(seed: int):
  """Random chunks of one number, and by hand: what each beam has seen, as (candidate, number) per chunk."""
  rng = np.random.default_rng(seed)
  traces, videos = [], [[] for _ in range(K)]
  for chunk in range(CHUNKS):
    survivor = rng.integers(0, K * B, K).astype(np.int32)
    numbers = rng.standard_normal(K * B).astype(np.float32)[survivor]
    seeds = np.arange(K * B, dtype=np.int32).reshape(K, B) + 100 * chunk
    table = np.zeros((K, B), np.float32)
    candidates = CandidateTrace(seeds, table, table, table, table == 0, Flags(table > 0, table > 0))
    none = np.zeros(K, np.int32)
    values = numbers.reshape(K, 1, 1, 1, 1)
    traces.append(ChunkTrace(candidates, Eviction(none, none, none), survivor, table[:, 0], values, values, None))
    videos = [[*videos[n // B], (int(n), float(numbers[k]))] for k, n in enumerate(survivor)]
  return traces, videos


def _finish(traces, segments, given=None):
  taken, counts = [], []
  finishing = Finishing(toy.PARAMS, toy.MODELS, SEARCH, taken.append)
  if given is not None:
    finishing.give(given, segments[0])
  start = len(taken)
  for index, trace in enumerate(traces, start):
    finishing.add(trace, [segment for segment in segments if segment.begin <= index][-1])
    counts.append(len(taken))
  return finishing.end(), taken, counts


def _score(numbers, parts):
  """The mean of the parts' sums, weighted by their frames: every chunk is one frame."""
  return sum(sum(numbers[begin:end]) * (end - begin) for begin, end in parts) / len(numbers)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_video_that_is_put_together_at_the_end(monkeypatch, seed):
  monkeypatch.setattr(drivers, "PART_CHUNKS", 3)
  traces, videos = _traces(seed)
  scored, taken, counts = _finish(traces, [FIRST, SECOND])
  parts = [(0, 3), (3, 5), (5, 8), (8, 11)]
  scores = [_score([number for _, number in video], parts) for video in videos]
  np.testing.assert_allclose(scored.scores, scores, rtol=0, atol=1e-5)
  assert scored.best == int(np.argmax(scores))
  best = videos[scored.best]
  assert [chunk.choice.candidate for chunk in taken] == [candidate for candidate, _ in best]
  assert [chunk.choice.seed for chunk in taken] == [
    100 * index + candidate for index, (candidate, _) in enumerate(best)
  ]
  np.testing.assert_array_equal([chunk.frames.item() for chunk in taken], np.float32([n for _, n in best]))
  final = drivers.final_beams(toy.PARAMS, CONDITION, toy.MODELS, SEARCH, traces, segments=[FIRST, SECOND])
  np.testing.assert_allclose(final.scores, scored.scores, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(final.latents[final.best].ravel(), [chunk.latents.item() for chunk in taken])
  # Chunks that all beams share are taken at once.
  for made in range(1, CHUNKS + 1):
    shared = _shared(traces[:made])
    assert counts[made - 1] == shared


def _shared(traces):
  """How many of the first chunks all beams have in common, by following every beam from the beginning."""
  beams = [[] for _ in range(K)]
  for trace in traces:
    beams = [[*beams[n // B], int(n)] for n in trace.survivor]
  return next((index for index, chunk in enumerate(zip(*beams, strict=True)) if len(set(chunk)) > 1), len(traces))


def test_given_chunks_come_first_and_are_judged():
  traces, videos = _traces(0)
  numbers = np.float32([[2.0], [3.0]]).reshape(2, 1, 1, 1, 1)
  scored, taken, _ = _finish(traces, [FIRST], Given(numbers, list(numbers)))
  assert [chunk.choice for chunk in taken[:2]] == [None, None]
  assert [chunk.frames.item() for chunk in taken[:2]] == [2.0, 3.0]
  assert len(taken) == 2 + CHUNKS
  scores = [5.0 + sum(number for _, number in video) for video in videos]
  np.testing.assert_allclose(scored.scores, scores, rtol=0, atol=1e-5)
