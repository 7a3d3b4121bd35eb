"""Policies: who survives, the same with every driver, and nothing else of the search changes."""

import dataclasses
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from streamt1_jax import drivers
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.drivers import SearchError
from streamt1_jax.execution import Execution
from streamt1_jax.io import config_json
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.parallel.mesh import MESH_AXES
from streamt1_jax.policies import (
  ByScore,
  Choice,
  KeepBeams,
  Particles,
  PerBeam,
  ProbabilisticTopK,
  RankEnsemble,
  Scores,
  TopK,
  selection_key,
)
from streamt1_jax.state import Condition
from streamt1_jax.step import Step
from tests import small_search as small
from tests import toy_generator as toy

NUM_CHUNKS = 5
SEARCH = small.SEARCH

_WEIGHED, _DRAWN = Particles(4.0, score="long"), Particles(4.0, score="long", returns="draw")
EVERY = (
  TopK(),
  TopK(cumulative=True),
  KeepBeams(),
  PerBeam(0.5),
  ProbabilisticTopK(2.0),
  RankEnsemble(),
  ByScore("short"),
  ByScore("long"),
  Particles(4.0, score="sum"),
  _WEIGHED,
  _DRAWN,
)
WITHOUT_STATE = TopK, KeepBeams, RankEnsemble, ByScore
STATEFUL = [policy for policy in EVERY if not isinstance(policy, WITHOUT_STATE) or policy == TopK(cumulative=True)]
"""Those with a carry or a key."""
# One search of all: what is compiled for one test is there for the next.
WIDE, WIDE_SEED = dataclasses.replace(SEARCH, beam_size=4), 3


def _cases(policies, *slow):
  """Those that are `slow` decide as others of their kind do, as far as the test can see."""
  return [pytest.param(each, id=repr(each), marks=pytest.mark.slow if each in slow else ()) for each in policies]


def _toy(search, run=drivers.stream, seed=0, models=toy.MODELS):
  """A search of one number per chunk: programs that compile in no time."""
  search = dataclasses.replace(search, noise_sigma=0.0, first_candidate="fresh")
  condition = Condition((), (), (), jnp.int32(NUM_CHUNKS))
  traces = run(toy.PARAMS, condition, models, search, num_chunks=NUM_CHUNKS, seed=seed)
  return [jax.device_get(trace) for trace in traces]


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
  """Whatever the scores are, always the same choice."""

  choice: Choice

  def init(self, search):
    return None

  def select(self, carry, scores, key, chunk_index, num_chunks):
    return self.choice


class TestKeepBeams(chex.TestCase):
  """Three beams of two candidates; candidates 2 and 3 are of beam 1."""

  def _select(self, hybrid, usable):
    zeros = jnp.zeros((3, 2))
    scores = Scores(zeros, zeros, jnp.array(hybrid), jnp.array(usable))
    choice = self.variant(KeepBeams().select)(None, scores, jax.random.key(0), jnp.int32(1), jnp.int32(4))
    assert choice.carry is None
    return choice.survivor.tolist(), choice.score.tolist()

  @chex.variants(with_jit=True, without_jit=True)
  def test_best_of_its_own(self):
    every = [[True, True]] * 3
    assert self._select([[1.0, 2.0], [9.0, 8.0], [3.0, 3.0]], every) == ([1, 2, 4], [2.0, 9.0, 3.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_a_bad_candidate_never_survives(self):
    usable = [[True, False], [False, False], [True, True]]
    nan = float("nan")
    assert self._select([[1.0, 7.0], [nan, 9.0], [5.0, 3.0]], usable) == ([0, 4, 4], [1.0, 5.0, 5.0])


class TestInASearch:
  def test_default_is_top_k_bit_for_bit(self):
    chex.assert_trees_all_equal(_toy(SEARCH), _toy(dataclasses.replace(SEARCH, policy=TopK())))

  def test_beams_never_mix(self):
    search = dataclasses.replace(SEARCH, beam_size=3, policy=KeepBeams())
    for trace in _toy(search):
      own = np.argmax(trace.candidates.hybrid, axis=1)
      np.testing.assert_array_equal(trace.survivor, np.arange(2) * 3 + own)
      np.testing.assert_array_equal(trace.score, trace.candidates.hybrid[np.arange(2), own])

  @pytest.mark.parametrize("judges", [True, False])
  def test_one_candidate_each_is_best_of_n(self, judges):
    """Three beams of one candidate are three videos that need no other: the first is plain streaming of its seeds."""
    alone = SearchConfig.streaming(small.MODEL)
    together = dataclasses.replace(alone, top_k=3, policy=KeepBeams(), judges=judges)
    several = _toy(together)
    for one, three in zip(_toy(alone), several, strict=True):
      np.testing.assert_array_equal(three.survivor, [0, 1, 2])
      np.testing.assert_array_equal(three.latents[0], one.latents[0])
    assert several[-1].latents[1] != several[-1].latents[0]

  def test_no_policy_lets_a_bad_candidate_survive(self):
    """Candidate 2 of every chunk is NaN. The default passes over it, and a policy that insists on it is stopped."""

    def draw_noise(seed):
      draws = toy.draw_noise(seed)
      return draws._replace(fresh=jnp.where((seed == 2) | (seed % 1000 == 100), jnp.nan, draws.fresh))

    @dataclasses.dataclass(frozen=True)
    class Stubborn(TopK):
      def select(self, carry, scores, key, chunk_index, num_chunks):
        return Choice(jnp.array([0, 2]), jnp.zeros(2), carry)

    models = dataclasses.replace(toy.MODELS, draw_noise=draw_noise)
    assert all(2 not in trace.survivor for trace in _toy(SEARCH, models=models))
    with pytest.raises(SearchError, match="chunk 0, seed 0: the policy chose a candidate that is NaN or Inf"):
      _toy(dataclasses.replace(SEARCH, policy=Stubborn()), models=models)

  @pytest.mark.usefixtures("unchecked_types")
  @pytest.mark.parametrize(
    ("survivor", "score", "found"),
    [
      (jnp.array([0]), jnp.zeros(1), r"survivors are int32\[1\], its scores \[1\]"),
      (jnp.array([0, 1, 2]), jnp.zeros(3), r"survivors are int32\[3\], its scores \[3\]"),
      (jnp.array([[0, 1]]), jnp.zeros(2), r"survivors are int32\[1, 2\], its scores \[2\]"),
      (jnp.array([0, 1]), jnp.zeros((2, 2)), r"survivors are int32\[2\], its scores \[2, 2\]"),
      (jnp.array([0.0, 1.0]), jnp.zeros(2), r"survivors are float32\[2\], its scores \[2\]"),
    ],
  )
  def test_a_choice_that_does_not_fit(self, survivor, score, found):
    with pytest.raises(ConfigError, match=r"policy Fixed must choose integers of shape \(2,\).*" + found):
      _toy(dataclasses.replace(SEARCH, policy=Fixed(Choice(survivor, score, None))))

  @pytest.mark.parametrize("survivor", [[0, 4], [-1, 0]])
  def test_a_survivor_that_is_not_there(self, survivor):
    """Arrays clip what lies outside of them, so that the search would go on with another candidate."""
    search = dataclasses.replace(SEARCH, policy=Fixed(Choice(jnp.array(survivor), jnp.zeros(2), None)))
    with pytest.raises(SearchError, match=r"chunk 0, seed 0: the policy chose a candidate that is not one of 0\.\.3"):
      _toy(search)

  def test_a_policy_that_counts_as_false(self):
    class Empty(typing.NamedTuple):
      def init(self, search):
        return None

      def select(self, carry, scores, key, chunk_index, num_chunks):
        return Choice(jnp.array([1, 2]), jnp.zeros(2), carry)

    assert not Empty()
    assert [trace.survivor.tolist() for trace in _toy(dataclasses.replace(SEARCH, policy=Empty()))] == [[1, 2]] * 5

  def test_a_policy_is_traced_once_per_program(self):
    """The law of no recompilation: one program for the first chunk and one for all others, however many there are."""
    counted = chex.assert_max_traces(TopK().select, n=2)

    @dataclasses.dataclass(frozen=True)
    class Counted(TopK):
      def select(self, *arguments) -> Choice:
        return counted(*arguments)

    search = dataclasses.replace(SEARCH, policy=Counted())
    for seed in (0, 1):
      _toy(search, seed=seed)


def _states(search, seed=0, models=toy.MODELS, condition=None, **options):
  """Survivors, latents, the policy's carry and the whole state after every chunk."""
  search = dataclasses.replace(search, noise_sigma=0.0, first_candidate="fresh")
  condition = Condition((), (), (), jnp.int32(NUM_CHUNKS)) if condition is None else condition
  options = {"num_chunks": NUM_CHUNKS, "seed": seed, **options}
  states = drivers.stream_states(toy.PARAMS, condition, models, search, **options)
  # The next chunk takes the state's buffers.
  return [(jax.tree.map(np.array, state), jax.device_get(trace)) for state, trace in states]


def _assert_same(found, expected, prompt=None):
  for (state, trace), (other, usual) in zip(found, expected, strict=True):
    trace = trace if prompt is None else drivers.of_prompt(trace, prompt)
    carry = state.policy if prompt is None else jax.tree.map(lambda x: x[prompt], state.policy)
    np.testing.assert_array_equal(trace.survivor, usual.survivor)
    np.testing.assert_array_equal(trace.latents, usual.latents)
    chex.assert_trees_all_close(carry, other.policy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", _cases(EVERY, ByScore("long"), _WEIGHED, _DRAWN))
class TestEveryPolicy:
  """On numbers that are sums of small integers, so that latents are the same to the bit in any program."""

  def test_one_beam_and_one_candidate_are_plain_streaming(self, policy):
    plain = SearchConfig.streaming(small.MODEL)
    for (_, trace), other in zip(
      _states(dataclasses.replace(plain, policy=policy, judges=True)), _toy(plain), strict=True
    ):
      np.testing.assert_array_equal(trace.survivor, [0])
      np.testing.assert_array_equal(trace.latents, other.latents)

  def test_the_same_with_every_driver_and_across_a_stop(self, policy):
    """`rollout` decides as `stream` does, and a search that goes on after chunk 1 or 4 decides what it would have."""
    search = dataclasses.replace(WIDE, policy=policy)
    usual = _states(search, WIDE_SEED)
    for (_, trace), other in zip(usual, _toy(search, drivers.rollout, WIDE_SEED), strict=True):
      np.testing.assert_array_equal(trace.survivor, other.survivor)
      np.testing.assert_array_equal(trace.latents, other.latents)
    with CompileCounter() as compiles:
      for chunks in (1, 4):
        begun = jax.tree.map(np.array, usual[chunks - 1][0])
        _assert_same(_states(search, WIDE_SEED, state=begun), usual[chunks:])
    assert compiles.count == 0


@pytest.mark.parametrize("policy", _cases([*STATEFUL, KeepBeams(), RankEnsemble()], _WEIGHED, _DRAWN))
def test_the_same_for_prompts_in_lockstep_on_several_devices(policy):
  search = dataclasses.replace(WIDE, policy=policy)
  mesh = jax.make_mesh((1, 2, 2, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:4])
  models = dataclasses.replace(toy.MODELS, execution=Execution(mesh=mesh))
  condition = drivers.stack_conditions([Condition((), (), (), jnp.int32(NUM_CHUNKS))] * 2, mesh)
  together = _states(search, seed=[3, 11], models=models, condition=condition)
  for index, seed in enumerate((3, 11)):
    _assert_same(together, _states(search, seed=seed), prompt=index)


def test_policies_decide_otherwise():
  """What has a carry or a key decides otherwise than the default in some chunk, so that the tests above test it."""
  run = lambda policy: _toy(dataclasses.replace(WIDE, policy=policy), seed=WIDE_SEED)
  decide = lambda policy: [trace.survivor.tolist() for trace in run(policy)]
  usual = decide(TopK())
  assert all(decide(policy) != usual for policy in STATEFUL)


class TestChoices:
  """Two beams of two candidates each."""

  def _select(self, policy, hybrid, *, short=None, long=None, usable=None, carry=None, key=0):
    array = lambda x: jnp.asarray(hybrid if x is None else x, jnp.float32)
    usable = jnp.ones((2, 2), bool) if usable is None else jnp.array(usable)
    scores = Scores(array(short), array(long), array(hybrid), usable)
    return policy.select(carry, scores, jax.random.key(key), jnp.int32(1), jnp.int32(4))

  def test_cumulative(self):
    """4 + 1 and 4 + 2 of the first beam pass 0 + 5 of the second in part."""
    choice = self._select(TopK(cumulative=True), [[1.0, 2.0], [5.0, 3.0]], carry=jnp.array([4.0, 0.0]))
    assert choice.survivor.tolist() == [1, 0]
    np.testing.assert_array_equal(choice.carry, [6.0, 5.0])
    np.testing.assert_array_equal(choice.score, choice.carry)

  @pytest.mark.parametrize(("epsilon", "survivors"), [(0.0, [0, 1]), (1.0, [0, 3])])
  def test_per_beam(self, epsilon, survivors):
    assert self._select(PerBeam(epsilon), [[9.0, 8.0], [1.0, 2.0]]).survivor.tolist() == survivors

  def test_per_beam_with_its_probability(self):
    draws = [self._select(PerBeam(0.3), [[9.0, 8.0], [1.0, 2.0]], key=key).survivor.tolist() for key in range(200)]
    assert all(draw in ([0, 1], [0, 3]) for draw in draws)
    # 60 of 200 are expected; the deviation is 6.5.
    assert 40 < draws.count([0, 3]) < 80

  def test_probabilistic(self):
    """Cold it is the best two; hot it is anything but a candidate that is not usable."""
    scores, usable = [[9.0, 8.0], [1.0, 2.0]], [[True, True], [True, False]]
    assert self._select(ProbabilisticTopK(1e-6), scores).survivor.tolist() == [0, 1]
    drawn = [self._select(ProbabilisticTopK(1e6), scores, usable=usable, key=key) for key in range(40)]
    assert {n for choice in drawn for n in choice.survivor.tolist()} == {0, 1, 2}
    for choice in drawn:
      np.testing.assert_array_equal(choice.score, np.ravel(scores)[choice.survivor])

  def test_rank_ensemble(self):
    """Places 3 2 1 0 by the image reward, 0 2 3 1 by the video reward, whose scores are a thousand times as large."""
    scores = {"short": [[0.4, 0.3], [0.2, 0.1]], "long": [[-900.0, 20.0], [400.0, 10.0]]}
    choice = self._select(RankEnsemble(), [[0.0, 0.0], [0.0, 0.0]], **scores)
    assert choice.survivor.tolist() == [1, 2]
    np.testing.assert_array_equal(choice.score, [2.0, 2.0])

  @pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [
      (PerBeam, {"epsilon": 1.1}, r"epsilon must be in \[0, 1\], got 1.1"),
      (ProbabilisticTopK, {"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ],
  )
  def test_values_that_mean_nothing(self, policy, fields, message):
    with pytest.raises(ConfigError, match=message):
      policy(**fields)


class TestKey:
  def test_of_seed_chunk_and_event_alone(self):
    keys = [
      selection_key(jnp.int32(seed), jnp.int32(chunk), event) for seed in (0, 1) for chunk in (0, 1) for event in (0, 1)
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 8
    again = jax.jit(selection_key)(jnp.int32(1), jnp.int32(1), 1)
    np.testing.assert_array_equal(jax.random.key_data(again), jax.random.key_data(keys[-1]))


def test_exploring_changes_nothing():
  """Twice on one opened state, with the seeds once and once in another order: candidates change places, no more."""
  models, params = small.models(), small.params()
  state = drivers.jitted_init_state(params, 0, models, SEARCH)
  condition = small.condition(NUM_CHUNKS)

  @jax.jit
  def explore(state, order):
    step = Step(params, state, condition, models, SEARCH, first=True)
    beams, _ = step.open()
    seed = step.seeds(beams)
    return step.explore(beams, seed)[0].latents, step.explore(beams, seed[:, order])[0].latents, beams.memory

  once, again, memory = explore(state, jnp.array([1, 0]))
  np.testing.assert_allclose(again, once[:, ::-1], rtol=0, atol=1e-6)
  chex.assert_trees_all_equal(memory, state.beams.memory)


class TestStored:
  def test_default_leaves_no_trace(self):
    """What was stored before there were these fields still means the same."""
    stored = config_json.to_json_value(SearchConfig())
    later = "policy", "judges", "sink_distance", "reward_codec", "judge_every", "look_ahead"
    later += "round_size", "accept", "least_gain", "round_budget", "settle_within"
    assert stored == {name: value for name, value in dataclasses.asdict(SearchConfig()).items() if name not in later}

  def test_every_policy_has_its_type(self):
    """Without fields they would all look the same."""
    stored = [config_json.to_json_value(SearchConfig(policy=policy))["policy"] for policy in EVERY]
    assert stored == [
      {"type": "TopK"},
      {"type": "TopK", "cumulative": True},
      {"type": "KeepBeams"},
      {"type": "PerBeam", "epsilon": 0.5},
      {"type": "ProbabilisticTopK", "temperature": 2.0},
      {"type": "RankEnsemble"},
      {"type": "ByScore", "score": "short"},
      {"type": "ByScore", "score": "long"},
      {"type": "Particles", "alpha": 4.0, "beta": 1.0, "ess_threshold": 0.5, "score": "sum"},
      {"type": "Particles", "alpha": 4.0, "beta": 1.0, "ess_threshold": 0.5, "score": "long"},
      {"type": "Particles", "alpha": 4.0, "beta": 1.0, "ess_threshold": 0.5, "score": "long", "returns": "draw"},
    ]

  @pytest.mark.parametrize("kind", ["name", "class", "no_hash"])
  def test_no_policy(self, kind):
    class NoHash(TopK):
      __hash__ = None  # As a dataclass has it that is not frozen.

    policy = {"name": "keep_beams", "class": KeepBeams, "no_hash": NoHash()}[kind]
    with pytest.raises(ConfigError, match="policy must have init and select and be an instance of a frozen dataclass"):
      SearchConfig(policy=policy)


def test_selection_key_by_hand():
  """A search that is replayed must draw what it drew: 2^20 + chunk is folded into the seed, then the event."""
  expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 1048576 + 7), 0)
  np.testing.assert_array_equal(jax.random.key_data(selection_key(3, 7)), jax.random.key_data(expected))
