"""Zero-order search over the first chunk's noise: by hand on the toy generator."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.methods import restarts, tries
from streamt1_jax.noise_propagation import gaussian_noise
from streamt1_jax.state import Condition
from tests.toy_generator import MODELS, PARAMS, SHAPE, draw_noise

_PLAIN = SearchConfig(beam_size=1, top_k=1, noise_sigma=0.0, first_candidate="fresh", judges=False)
_CHUNKS, _SEED = 4, 3
_NOISY = dataclasses.replace(MODELS, draw_noise=gaussian_noise(SHAPE, 2))


def _inputs(models=MODELS):
  return PARAMS, Condition((), (), (), jnp.int32(_CHUNKS)), models, _PLAIN


def _searched(models=MODELS, tell=restarts.silent, **numbers):
  steps = restarts.zero_order(*_inputs(models), num_chunks=_CHUNKS, seed=_SEED, tell=tell, **numbers)
  return [trace for _, trace in steps]


def _plain(models=MODELS):
  return list(drivers.stream(*_inputs(models), num_chunks=_CHUNKS, seed=_SEED))


def _chunks(traces):
  return np.array([np.asarray(trace.latents).item() for trace in traces])


def test_zero_order_by_hand():
  """Noise is the remainder by 7; neighbours are .6 of the pivot and .8 of theirs, and a chunk is half of its noise."""
  told = []
  traces = _searched(tell=told.append, rounds=2, neighbours=2, chunks=1, nearness=0.6)
  noises = [3.0, 0.6 * 3 + 0.8 * 4, 0.6 * 3 + 0.8 * 5, 0.6 * 5.8 + 0.8 * 6, 0.6 * 5.8 + 0.8 * 0]
  np.testing.assert_allclose([each.score for each in told], np.array(noises) / 2, rtol=1e-6)
  assert [each.seed for each in told] == [3, 4, 5, 6, 7]
  assert [each.kept for each in told] == [False, False, False, True, False]
  assert {each[:2] + each[-1:] for each in told} == {(0, 1, 1)}
  # The trace names the seed that the kept noise was drawn from, and the video's own in later chunks.
  assert [int(trace.candidates.seed.item()) for trace in traces[:2]] == [6, _SEED + 1000]
  chunk, expected = noises[3] / 2, [noises[3] / 2]
  for index in range(1, _CHUNKS):
    chunk = 1.5 * chunk + 0.5 * draw_noise(_SEED + 1000 * index).fresh.item()
    expected.append(chunk)
  np.testing.assert_allclose(_chunks(traces), expected, rtol=1e-6)


@pytest.mark.parametrize("numbers", [{"rounds": 0}, {"rounds": 1, "neighbours": 2, "chunks": 2, "nearness": 1.0}])
def test_without_rounds_and_at_the_pivot_it_is_plain_streaming(numbers):
  chex.assert_trees_all_equal(_searched(_NOISY, **numbers), _plain(_NOISY))


def test_another_video_compiles_nothing():
  """Which seeds are drawn and which beginning is kept are data."""
  run = lambda seed: restarts.zero_order(*_inputs(_NOISY), num_chunks=_CHUNKS, seed=seed, chunks=2)
  list(run(_SEED))
  with CompileCounter() as compiles:
    list(run(_SEED + 20))
  assert compiles.count == 0


def test_longer_tries_are_judged_whole_and_more_rounds_are_never_worse():
  best = []
  for rounds in (1, 2, 3):
    told = []
    traces = _searched(_NOISY, tell=told.append, rounds=rounds, neighbours=2, chunks=3, nearness=0.5)
    (kept,) = (each for each in told if each.kept)
    assert len(told) == 1 + 2 * rounds
    assert kept.score == max(each.score for each in told)
    # The toy's reward is the sum of the chunks that it sees.
    assert kept.score == pytest.approx(_chunks(traces)[:3].sum(), rel=1e-5)
    assert kept.judged_frames == 3
    best.append(kept.score)
  assert best == sorted(best)


def test_a_neighbour_whose_noise_is_not_finite_is_never_kept():
  draw = lambda seed: draw_noise(seed)._replace(fresh=jnp.where(seed == _SEED + 2, jnp.nan, draw_noise(seed).fresh))
  told = []
  assert np.isfinite(_chunks(_searched(dataclasses.replace(MODELS, draw_noise=draw), tell=told.append, rounds=1))).all()
  assert [bool(np.isnan(each.score)) for each in told] == [False, False, True, False, False]
  assert sum(each.kept for each in told) == 1


def test_states_are_those_of_the_chunks_and_a_search_goes_on_from_each():
  run = lambda **more: restarts.zero_order(*_inputs(_NOISY), num_chunks=_CHUNKS, seed=_SEED, chunks=2, **more)
  whole = [trace for _, trace in run()]
  for stop in (1, 2, 3):
    steps = run()
    for _ in range(stop):
      state, _ = next(steps)
    assert state.chunk_index == stop
    steps.close()
    chex.assert_trees_all_equal([trace for _, trace in run(state=state)], whole[stop:])


@pytest.mark.parametrize("switch", [1, 2, 3])
def test_prompts_change_where_they_would(switch):
  """The toy reads no prompt; which prompt is in force is seen by the condition that comes back."""
  other, seen = _inputs()[1]._replace(num_chunks=jnp.int32(_CHUNKS + 1)), []

  def border(state, condition):
    seen.append((int(state.chunk_index), int(condition.num_chunks)))
    return state, other if state.chunk_index >= switch else condition

  told = []
  options = {"num_chunks": _CHUNKS, "seed": _SEED, "border": border, "tell": told.append}
  steps = restarts.zero_order(*_inputs(_NOISY), chunks=3, **options)
  chex.assert_trees_all_equal([trace for _, trace in steps], _searched(_NOISY, chunks=3))
  assert sorted({index for index, _ in seen}) == [0, 1, 2, 3]
  # Chunks of the best beginning that the video does not have, because their prompt had changed.
  assert [(each.begin, each.chunks) for each in told if each.begin] == ([(switch, 3 - switch)] if switch < 3 else [])
  assert [number for index, number in seen if index > switch] == [_CHUNKS + 1] * (3 - switch)


@pytest.mark.parametrize(
  ("numbers", "fragments"),
  [
    ({"rounds": -1}, ["rounds", "-1"]),
    ({"neighbours": 0}, ["neighbours", "0"]),
    ({"chunks": 1.5}, ["chunks", "1.5"]),
    ({"distance": 1.5}, ["distance", "nearness"]),
    ({"nearness": 1.1}, ["nearness", "1.1"]),
    ({"rounds": 31, "neighbours": 30}, ["900", "930"]),
  ],
)
def test_impossible_numbers(numbers, fragments):
  with pytest.raises(ConfigError) as error:
    tries.of_numbers(restarts.ZeroOrder, numbers)
  for fragment in fragments:
    assert fragment in str(error.value)
