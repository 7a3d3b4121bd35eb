"""A policy from outside the package: in a search, in what a search is stored as, and across a stop."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from streamt1_jax import drivers
from streamt1_jax.execution import Execution
from streamt1_jax.io import config_json
from streamt1_jax.parallel.mesh import MESH_AXES
from streamt1_jax.state import Condition
from tests import toy_generator as toy
from tests.extending.policy import SEARCH, Cumulative

NUM_CHUNKS = 6


TOY_SEARCH = dataclasses.replace(SEARCH, beam_size=3, noise_sigma=0.0, sliding_window=1)


def _states(search, **options):
  condition = Condition((), (), (), jnp.int32(NUM_CHUNKS))
  states = drivers.stream_states(toy.PARAMS, condition, toy.MODELS, search, num_chunks=NUM_CHUNKS, seed=3, **options)
  # The next chunk takes the state's buffers.
  return [(jax.tree.map(np.array, state), jax.device_get(trace)) for state, trace in states]


@pytest.fixture(scope="module")
def searched():
  return _states(TOY_SEARCH)


def test_survivors_are_the_best_lineages(searched):
  sums = [0.0, 0.0]
  for state, trace in searched:
    total = [0.8 * sums[parent] + float(trace.candidates.hybrid[parent, i]) for parent in range(2) for i in range(3)]
    expected = sorted(range(6), key=lambda n: -total[n])[:2]
    np.testing.assert_array_equal(trace.survivor, expected)
    sums = [total[n] for n in expected]
    np.testing.assert_allclose(trace.score, sums, rtol=1e-6)
    np.testing.assert_array_equal(state.policy, trace.score)


def test_it_decides_otherwise_than_the_default(searched):
  usual = _states(dataclasses.replace(TOY_SEARCH, policy=None))
  assert any((trace.survivor != other.survivor).any() for (_, trace), (_, other) in zip(searched, usual, strict=True))


def test_both_drivers_agree(searched):
  condition = Condition((), (), (), jnp.int32(NUM_CHUNKS))
  rolled = drivers.rollout(toy.PARAMS, condition, toy.MODELS, TOY_SEARCH, num_chunks=NUM_CHUNKS, seed=3)
  for (_, trace), other in zip(searched, rolled, strict=True):
    np.testing.assert_array_equal(trace.survivor, other.survivor)
    np.testing.assert_allclose(trace.score, other.score, rtol=1e-6)


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_search_goes_on_with_its_carry(searched, chunks):
  """Also the negative control: without what the policy carried, the rest of the search is another."""
  state = searched[chunks - 1][0]
  abstract = drivers.abstract_state(toy.PARAMS, toy.MODELS, TOY_SEARCH, 3, num_chunks=NUM_CHUNKS)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  again = lambda state: [trace.score for _, trace in _states(TOY_SEARCH, state=jax.tree.map(jnp.array, state))]
  usual = [trace.score for _, trace in searched[chunks:]]
  np.testing.assert_array_equal(again(state), usual)
  assert not np.array_equal(again(state._replace(policy=np.zeros(2, np.float32))), usual)


def test_same_winners_on_several_devices():
  """The carry lies where its beams lie, and every device ranks by all of it."""
  search = dataclasses.replace(TOY_SEARCH, beam_size=2)
  mesh = jax.make_mesh((1, 2, 2, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:4])
  models = dataclasses.replace(toy.MODELS, execution=Execution(mesh=mesh))
  condition = Condition((), (), (), jnp.int32(NUM_CHUNKS))
  options = {"num_chunks": NUM_CHUNKS, "seed": 3}
  divided = drivers.stream_states(toy.PARAMS, condition, models, search, **options)
  whole = drivers.stream(toy.PARAMS, condition, toy.MODELS, search, **options)
  for (state, trace), other in zip(divided, whole, strict=True):
    np.testing.assert_array_equal(trace.survivor, other.survivor)
    np.testing.assert_allclose(trace.score, other.score, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(state.policy, trace.score)
    assert not state.policy.sharding.is_fully_replicated


@dataclasses.dataclass(frozen=True)
class Lots(Cumulative):
  """Draws the survivors by lot, and counts in its carry what a lineage was worth."""

  def select(self, carry, scores, key, chunk_index, num_chunks):
    choice = super().select(carry, scores, key, chunk_index, num_chunks)
    drawn = jax.random.permutation(key, scores.hybrid.size)[: len(carry)].astype(jnp.int32)
    return choice._replace(survivor=drawn, carry=choice.carry + drawn)


@pytest.mark.parametrize("policy", [SEARCH.policy, Lots()], ids=["carry", "key_and_carry"])
def test_every_prompt_in_lockstep_has_its_own_carry_and_key(policy):
  search, seeds = dataclasses.replace(TOY_SEARCH, policy=policy), [3, 11]
  condition = Condition((), (), (), jnp.int32(NUM_CHUNKS))
  arguments = toy.MODELS, search
  together = drivers.stream_states(
    toy.PARAMS, drivers.stack_conditions([condition] * 2), *arguments, num_chunks=NUM_CHUNKS, seed=seeds
  )
  together = [(np.array(state.policy), jax.device_get(trace)) for state, trace in together]
  for index, seed in enumerate(seeds):
    alone = drivers.stream_states(toy.PARAMS, condition, *arguments, num_chunks=NUM_CHUNKS, seed=seed)
    for (carry, traces), (state, trace) in zip(together, alone, strict=True):
      np.testing.assert_array_equal(drivers.of_prompt(traces, index).survivor, trace.survivor)
      np.testing.assert_allclose(carry[index], state.policy, rtol=1e-6)
  assert not np.array_equal(together[0][1].survivor[0], together[0][1].survivor[1])


def test_stored_with_its_type_and_fields():
  stored = json.loads(json.dumps(config_json.to_json_value(SEARCH)))
  assert stored["policy"] == {"type": "Cumulative", "discount": 0.8}
