"""Rounds: many candidates, some at a time; when to stop, and what is left for later chunks."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from streamt1_jax import drivers
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.parallel.mesh import MESH_AXES
from streamt1_jax.policies import ProbabilisticTopK, Reject
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.rounds import expected_gain
from streamt1_jax.state import Condition
from streamt1_jax.trace import describe_chunk
from tests import toy_generator as toy

NUM_CHUNKS, SEED = 6, 3
SEARCH = SearchConfig(
  beam_size=6, top_k=1, noise_sigma=0.0, first_candidate="fresh", sliding_window=1, fusion_cap=0.0, round_size=2
)
"""One beam, whose candidates score what they are."""
ADAPTIVE = dataclasses.replace(SEARCH, top_k=2, accept=1.0, least_gain=0.3, round_budget=2)


def draw_noise(seed):
  """From -9 to 1."""
  return toy.draw_noise(seed)._replace(fresh=jnp.full(toy.SHAPE, seed * 5 % 11 - 9, jnp.float32))


MODELS = dataclasses.replace(toy.MODELS, draw_noise=draw_noise)
CONDITION = Condition((), (), (), jnp.int32(NUM_CHUNKS))


def _states(search=SEARCH, models=MODELS, condition=CONDITION, **options):
  options = {"num_chunks": NUM_CHUNKS, "seed": SEED, **options}
  states = drivers.stream_states(toy.PARAMS, condition, models, search, **options)
  # The next chunk takes the state's buffers.
  return [(jax.tree.map(np.array, state), jax.device_get(trace)) for state, trace in states]


def _without_counts(states):
  return [(state._replace(spare=None), trace._replace(rounds=None)) for state, trace in states]


def _by_hand(accept, budget=0):
  """Per chunk: rounds drawn, the winning place, and the chunk."""
  last, spare, found = 0.0, 0, []
  for chunk in range(NUM_CHUNKS):
    values = [last + (last + (SEED + 1000 * chunk + place) * 5 % 11 - 9) / 2 for place in range(6)]
    limit, rounds = min(3, budget + spare) if budget else 3, 0
    while rounds < limit and (rounds == 0 or max(values[: 2 * rounds]) < accept):
      rounds += 1
    spare += budget - rounds
    place = int(np.argmax(values[: 2 * rounds]))
    last = values[place]
    found.append((rounds, place, last))
  return found


class TestRounds:
  @pytest.mark.parametrize(
    "search",
    [
      dataclasses.replace(SEARCH, top_k=2, sliding_window=3, fusion_cap=0.4, judge_every=2),
      dataclasses.replace(SEARCH, top_k=2, policy=ProbabilisticTopK(1.0)),
    ],
  )
  def test_three_rounds_are_one_of_all(self, search):
    several, one, none = (_without_counts(_states(dataclasses.replace(search, round_size=size))) for size in (2, 6, 0))
    chex.assert_trees_all_equal(several, one)
    chex.assert_trees_all_equal(several, none)

  @pytest.mark.parametrize(("accept", "budget"), [(2.0, 0), (2.0, 2), (1e6, 1)])
  def test_by_hand(self, accept, budget):
    search = dataclasses.replace(SEARCH, accept=accept, round_budget=budget)
    for (_, trace), (rounds, place, value) in zip(_states(search), _by_hand(accept, budget), strict=True):
      assert (int(trace.rounds), trace.survivor.item(), trace.latents.item()) == (rounds, place, value)
      assert trace.candidates.usable[0].tolist() == [each < 2 * rounds for each in range(6)]

  def test_the_case_by_hand_takes_what_is_left(self):
    assert [rounds for rounds, *_ in _by_hand(2.0, 2)] == [2, 2, 2, 2, 1, 3]

  def test_what_is_left_does_not_expire(self):
    """Four chunks take one round of their two each; four more take all of their eight and of the four that are left."""
    easy = lambda seed: draw_noise(seed)._replace(fresh=jnp.full(toy.SHAPE, jnp.where(seed < SEED + 4000, 1e2, -1e6)))
    search = dataclasses.replace(SEARCH, accept=0.0, round_budget=2)
    options = {"num_chunks": 8, "condition": CONDITION._replace(num_chunks=jnp.int32(8))}
    states = _states(search, dataclasses.replace(MODELS, draw_noise=easy), **options)
    assert [int(trace.rounds) for _, trace in states] == [1, 1, 1, 1, 3, 3, 3, 3]
    assert [int(state.spare) for state, _ in states] == [1, 2, 3, 4, 3, 2, 1, 0]

  def test_one_candidate_is_plain_streaming(self):
    plain = dataclasses.replace(SEARCH, beam_size=1, round_size=0, judges=False)
    alone = dataclasses.replace(SEARCH, beam_size=1, round_size=1)
    for (_, trace), (_, other) in zip(_states(alone), _states(plain), strict=True):
      np.testing.assert_array_equal(trace.latents, other.latents)

  def test_the_gain_of_one_more_by_hand(self):
    """The mean over one more draw of what it adds to the best, by quadrature."""
    scores = np.array([[1.0, 4.0, np.nan], [2.0, 2.5, 9.0]], np.float32)
    usable = np.array([[True, True, False], [True, True, False]])
    known = scores[usable]
    x = np.linspace(-20.0, 30.0, 200_001)
    density = np.exp(-np.square((x - known.mean()) / known.std(ddof=1)) / 2) / (known.std(ddof=1) * np.sqrt(2 * np.pi))
    for top_k in (1, 2):
      last = np.sort(known)[-top_k]
      wanted = np.trapezoid(np.maximum(x - last, 0.0) * density, x)
      np.testing.assert_allclose(expected_gain(jnp.asarray(scores), jnp.asarray(usable), top_k), wanted, rtol=1e-5)
    assert expected_gain(jnp.asarray(scores), jnp.asarray(usable), 4) == np.inf
    assert expected_gain(jnp.full((1, 3), 2.0), jnp.ones((1, 3), bool), 1) == 0.0

  @pytest.mark.parametrize(("gain", "drawn"), [(0.01, 3), (0.2, 2), (1e3, 1)])
  def test_stops_where_one_more_gains_too_little(self, gain, drawn):
    search = dataclasses.replace(SEARCH, least_gain=gain)
    assert {int(trace.rounds) for _, trace in _states(search)} == {drawn}
    for _, trace in _states(search):
      scores = jax.tree.map(jnp.asarray, trace.candidates)
      gains = [float(expected_gain(scores.hybrid[:, :n], scores.usable[:, :n], 1)) for n in (2, 4, 6)]
      enough = [each < gain for each in gains]
      assert int(trace.rounds) == (enough.index(True) + 1 if any(enough) else 3)

  def test_nan_is_not_good_enough(self):
    bad = lambda seed: draw_noise(seed)._replace(fresh=jnp.where(seed <= SEED + 1, jnp.nan, draw_noise(seed).fresh))
    _, trace = _states(dataclasses.replace(SEARCH, accept=-1e6), dataclasses.replace(MODELS, draw_noise=bad))[0]
    assert (int(trace.rounds), int(trace.survivor[0]) in (2, 3)) == (2, True)

  def test_rewards_know_which_candidate_they_judge(self):
    class Number(Promptless):
      def __call__(self, params, condition, window, info):
        return info.candidate_index.astype(jnp.float32)

    models = dataclasses.replace(MODELS, video_reward=Number())
    for _, trace in _states(dataclasses.replace(SEARCH, top_k=2), models):
      assert trace.candidates.long.ravel().tolist() == list(range(12))

  def test_only_what_was_drawn_is_told(self):
    search = dataclasses.replace(SEARCH, accept=-1e6)
    told = describe_chunk(1, _states(search)[1][1], search)
    assert told["rounds"] == 1
    assert [each["candidate"] for each in told["candidates"]] == [0, 1]


@pytest.fixture(scope="module")
def searched():
  return _states(ADAPTIVE)


class TestDrivers:
  def test_rollout(self, searched):
    rolled = drivers.rollout(toy.PARAMS, CONDITION, MODELS, ADAPTIVE, num_chunks=NUM_CHUNKS, seed=SEED)
    for (_, trace), other in zip(searched, rolled, strict=True):
      chex.assert_trees_all_close(trace, other, rtol=1e-6)
      np.testing.assert_array_equal(trace.survivor, other.survivor)

  def test_across_a_stop(self, searched):
    assert any(state.spare > 0 for state, _ in searched)
    again = _states(ADAPTIVE, state=jax.tree.map(np.array, searched[1][0]))
    chex.assert_trees_all_equal(again, searched[2:])

  def test_prompts_in_lockstep_on_several_devices(self, searched):
    mesh = jax.make_mesh((1, 2, 2, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:4])
    models = dataclasses.replace(MODELS, execution=Execution(mesh=mesh, decoding="in_turn"))
    options = {"condition": drivers.stack_conditions([CONDITION] * 2, mesh), "seed": [12, SEED]}
    for (states, traces), (state, trace) in zip(_states(ADAPTIVE, models, **options), searched, strict=True):
      np.testing.assert_array_equal(traces.survivor[1], trace.survivor)
      assert (traces.rounds[1], states.spare[1]) == (trace.rounds, state.spare)

  def test_nothing_compiles_in_another_video(self, searched):
    with CompileCounter() as compiles:
      _states(ADAPTIVE, seed=5)
    assert compiles.count == 0


class TestRefusal:
  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"round_size": 4}, "round_size must divide beam_size 6, got 4"),
      ({"round_size": -1}, "round_size must be at least 0, got -1"),
      ({"round_size": 0, "accept": 0.0}, "round_size must be above 0, got 0"),
      ({"round_size": 0, "least_gain": 1.0}, "round_size must be above 0, got 0"),
      ({"least_gain": 0.0}, r"least_gain must be a finite score above 0, got 0\.0"),
      ({"round_budget": 4}, r"round_budget must be in 0\.\.3 rounds, got 4"),
      ({"accept": float("inf")}, "accept must be a finite score, got inf"),
      ({"look_ahead": 1}, "look_ahead must be 0, got 1"),
    ],
  )
  def test_values(self, fields, message):
    with pytest.raises(ConfigError, match=message):
      dataclasses.replace(SEARCH, **fields)

  def test_searches(self):
    with pytest.raises(ConfigError, match="round_size must be 0, got 2"):
      _states(dataclasses.replace(SEARCH, policy=Reject(start=8)))

  def test_mesh(self):
    mesh = jax.make_mesh((1, 1, 4, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:4])
    models = dataclasses.replace(MODELS, execution=Execution(mesh=mesh))
    with pytest.raises(ConfigError, match="multiple of the 4 devices of a beam's candidates, got 2"):
      _states(models=models)
