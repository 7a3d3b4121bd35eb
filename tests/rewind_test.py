"""Backtracking: what it keeps, what it makes anew and what it counts, on the toy generator with chunks of 3 frames."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.methods import rewind, tries
from streamt1_jax.noise_propagation import gaussian_noise
from streamt1_jax.state import Condition
from tests.toy_generator import MODELS, PARAMS, ToyGenerator

_SHAPE = (3, 1, 2, 2)


@dataclasses.dataclass(frozen=True)
class _Generator(ToyGenerator):
  latent_shape: tuple[int, int, int, int] = _SHAPE

  def init_memory(self, params, search):
    return jnp.zeros(_SHAPE)


_MODELS = dataclasses.replace(
  MODELS, generator=_Generator(), codec=LatentCodec(_SHAPE[1:]), draw_noise=gaussian_noise(_SHAPE, 2)
)
_PLAIN = SearchConfig(beam_size=1, top_k=1, noise_sigma=0.0, first_candidate="fresh", judges=False)
_CHUNKS, _SEED = 5, 11


def _inputs():
  return PARAMS, Condition((), (), (), jnp.int32(_CHUNKS)), _MODELS, _PLAIN


def _made(tell=rewind.silent, border=None, **numbers):
  steps = rewind.backtrack(*_inputs(), num_chunks=_CHUNKS, seed=_SEED, tell=tell, border=border, **numbers)
  return [(int(state.chunk_index), jax.device_get(trace)) for state, trace in steps]


def _follows(traces):
  """Whether every chunk is what the toy makes of the chunk before and the seed that the trace names."""
  last = np.zeros(_SHAPE, np.float32)
  for trace in traces:
    draws = _MODELS.draw_noise(jnp.int32(trace.candidates.seed.item()))
    last = last + 0.5 * (last + draws.fresh) + 0.5 * draws.renoise[0]
    np.testing.assert_allclose(trace.latents[0], last, rtol=1e-5, atol=1e-6)


def _health(traces):
  moved = [np.abs(np.diff(trace.frames[0].astype(np.float64), axis=0)).mean() for trace in traces]
  return [np.inf, *(after / before for before, after in itertools.pairwise(moved))]


@pytest.mark.parametrize("numbers", [{"motion": 0.0, "back": 2}, {"motion": 9.0, "attempts": 0}])
def test_what_never_fails_or_is_never_tried_again_is_plain_streaming(numbers):
  told = []
  made = _made(told.append, **numbers)
  plain = list(drivers.stream(*_inputs(), num_chunks=_CHUNKS, seed=_SEED))
  chex.assert_trees_all_equal([trace for _, trace in made], jax.device_get(plain))
  assert all(each.kept and each.seed == _SEED for each in told)


@pytest.mark.parametrize("back", [1, 2])
def test_the_healthiest_try_is_kept_and_all_are_counted(back):
  """No chunk is healthy enough, so every one but the first is tried as often as may be."""
  told = []
  made = _made(told.append, motion=9.0, back=back, attempts=3)
  assert [index for index, _ in made] == [1, 2, 3, 4, 5] if back == 1 else True
  traces = [trace for _, trace in made]
  assert len(traces) == _CHUNKS
  _follows(traces)
  groups = [told[start : start + 4] for start in range(0, len(told), 4)]
  assert [group[0].begin for group in groups] == [max(0, chunk - back + 1) for chunk in range(1, _CHUNKS)]
  for chunk, group in enumerate(groups, 1):
    assert [each.seed for each in group[1:]] == [rewind.seed_of_attempt(_SEED, chunk, attempt) for attempt in (1, 2, 3)]
    (kept,) = (each for each in group if each.kept)
    assert kept.score == max(each.score for each in group)
    assert {each.chunks for each in group} == {back}
  # The last place was not gone back to any more.
  assert kept.score == pytest.approx(min(_health(traces)[-back:]), rel=1e-4)


def test_another_video_compiles_nothing():
  """How often it goes back, and to which seeds, is data."""
  told = []

  def run(seed, attempts):
    numbers = {"motion": 9.0, "back": 2, "attempts": attempts}
    list(rewind.backtrack(*_inputs(), num_chunks=_CHUNKS, seed=seed, tell=told.append, **numbers))

  run(_SEED, 2)
  assert len(told) == 4 * 3
  with CompileCounter() as compiles:
    run(_SEED + 20, 3)
  assert compiles.count == 0
  assert len(told) == 4 * 3 + 4 * 4


def test_a_try_that_is_healthy_ends_the_search():
  told = []
  made = _made(told.append, motion=1.45, attempts=20)
  traces = [trace for _, trace in made]
  _follows(traces)
  health = _health(traces)
  assert min(health) >= 1.45
  plain = jax.device_get(list(drivers.stream(*_inputs(), num_chunks=_CHUNKS, seed=_SEED)))
  assert min(_health(plain)) < 1.45
  for bad, good in itertools.pairwise(told):
    # Those that failed come first, and what is kept ends its group.
    assert bad.kept or bad.score < 1.45
    assert good.kept == (good.score >= 1.45)


def test_it_does_not_go_back_behind_a_change_of_the_prompt():
  told = []
  other = _inputs()[1]._replace(num_chunks=jnp.int32(_CHUNKS + 1))
  conditions = [_inputs()[1], other]
  border = lambda state, condition: (state, conditions[int(state.chunk_index) >= 3])
  made = _made(told.append, border=border, motion=9.0, back=3, attempts=1)
  _follows([trace for _, trace in made])
  assert [(each.begin, each.chunks) for each in told[::2]] == [(0, 2), (0, 3), (3, 1), (3, 2)]


@pytest.mark.parametrize(
  ("numbers", "fragments"),
  [
    ({"motion": -1.0}, ["motion", "-1"]),
    ({"back": 0}, ["back", "0"]),
    ({"attempts": 0.5}, ["attempts", "0.5"]),
    ({"back": float("inf")}, ["back", "whole", "inf"]),
    ({"attempts": float("nan")}, ["attempts", "whole", "nan"]),
  ],
)
def test_impossible_numbers(numbers, fragments):
  with pytest.raises(ConfigError) as error:
    tries.of_numbers(rewind.Rewind, numbers)
  for fragment in fragments:
    assert fragment in str(error.value)


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_search_that_goes_on_makes_the_same_video(back):
  """From every chunk that it yielded, with the tries that it had not told before."""
  told, steps = [], []
  numbers = {"motion": 9.0, "back": back, "attempts": 2}
  run = lambda tell, **more: rewind.backtrack(*_inputs(), num_chunks=_CHUNKS, seed=_SEED, tell=tell, **numbers, **more)
  for state, trace in run(told.append):
    steps.append((jax.tree.map(jnp.copy, state), jax.device_get(trace), len(told)))
  for stop, (state, newest, before) in enumerate(steps, start=1):
    again = []
    made = [trace for _, trace in run(again.append, state=state, newest=newest)]
    chex.assert_trees_all_equal(jax.device_get(made), [trace for _, trace, _ in steps[stop:]])
    assert again == told[before:]


def test_a_chunk_that_is_not_finite_is_made_anew():
  """Both the seed that the fourth chunk would be drawn from and the first that is tried in its place give NaN."""
  bad = [_SEED + 3000, rewind.seed_of_attempt(_SEED, 3, 1) + 3000]

  def draw(seed):
    draws = _MODELS.draw_noise(seed)
    return draws._replace(fresh=jnp.where((seed == bad[0]) | (seed == bad[1]), jnp.nan, draws.fresh))

  parameters, condition, models, search = _inputs()
  inputs = parameters, condition, dataclasses.replace(models, draw_noise=draw), search
  run = lambda tell, **more: rewind.backtrack(*inputs, num_chunks=_CHUNKS, seed=_SEED, tell=tell, motion=1e-3, **more)
  told = []
  traces = [jax.device_get(trace) for _, trace in run(told.append)]
  _follows(traces)
  assert len(traces) == _CHUNKS
  assert [(each.begin, each.kept) for each in told] == [(3, False), (3, False), (3, True)]
  with pytest.raises(drivers.SearchError, match="chunk 3"):
    list(run(told.append, attempts=1))
