"""Policies: who survives, the same with every driver, and nothing else of the search changes."""

import dataclasses
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.chunk_step import Step
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.drivers import SearchError
from streamt1_jax.io import config_json
from streamt1_jax.policies import POLICIES, Choice, KeepBeams, Scores, TopK, selection_key
from streamt1_jax.state import Condition
from tests import small_search as small
from tests import toy_generator as toy

NUM_CHUNKS = 5
# Every chunk is worth remembering, so that a beam that moved wrongly would show in its memory.
SEARCH = dataclasses.replace(small.SEARCH, short_threshold=-10.0)


def _stream(search, seed=0):
  arguments = small.params(), small.condition(NUM_CHUNKS), small.models(), search
  return [jax.device_get(trace) for trace in drivers.stream(*arguments, num_chunks=NUM_CHUNKS, seed=seed)]


def _toy(search, run=drivers.stream, seed=0, models=toy.MODELS):
  """The same of one number per chunk: programs that compile in no time."""
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
    chex.assert_trees_all_equal(_stream(SEARCH), _stream(dataclasses.replace(SEARCH, policy=TopK())))

  def test_beams_never_mix(self):
    search = dataclasses.replace(SEARCH, beam_size=3, policy=KeepBeams())
    for trace in _toy(search):
      own = np.argmax(trace.candidates.hybrid, axis=1)
      np.testing.assert_array_equal(trace.survivor, np.arange(2) * 3 + own)
      np.testing.assert_array_equal(trace.score, trace.candidates.hybrid[np.arange(2), own])

  def test_drivers_agree(self):
    search = dataclasses.replace(SEARCH, policy=KeepBeams())
    for trace, other in zip(_toy(search), _toy(search, drivers.rollout), strict=True):
      np.testing.assert_array_equal(trace.survivor, other.survivor)
      np.testing.assert_array_equal(trace.latents, other.latents)

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
    later = "policy", "judges", "sink_distance", "reward_codec"
    assert stored == {name: value for name, value in dataclasses.asdict(SearchConfig()).items() if name not in later}

  def test_every_policy_has_its_type(self):
    """Without fields they would all look the same."""
    stored = [config_json.to_json_value(SearchConfig(policy=policy()))["policy"] for policy in POLICIES.values()]
    assert stored == [{"type": "KeepBeams"}, {"type": "TopK"}]

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
