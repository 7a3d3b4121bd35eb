"""The bound on how long beams may differ in a chunk."""

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
from streamt1_jax.finishing import shared_ancestor
from streamt1_jax.parallel.mesh import MESH_AXES
from streamt1_jax.policies import KeepBeams, Particles, ProbabilisticTopK, RankEnsemble, TopK
from streamt1_jax.state import Condition
from tests import small_search as small
from tests import toy_generator as toy
from tests.small_session import TWO_BEAMS, session

NUM_CHUNKS = 8
CONDITION = Condition((), (), (), jnp.int32(NUM_CHUNKS))
SEARCH = dataclasses.replace(
  small.SEARCH, top_k=3, noise_sigma=0.0, first_candidate="fresh", policy=KeepBeams(), settle_within=2
)
"""`KeepBeams` alone would never let a beam go."""
POLICIES = (KeepBeams(), TopK(), ProbabilisticTopK(2.0), RankEnsemble(), Particles(40.0, score="sum"))


def _states(search=SEARCH, models=toy.MODELS, condition=CONDITION, **options):
  options = {"num_chunks": NUM_CHUNKS, "seed": 3, **options}
  states = drivers.stream_states(toy.PARAMS, condition, models, search, **options)
  # The next chunk takes the state's buffers.
  return [(jax.tree.map(np.array, state), jax.device_get(trace)) for state, trace in states]


def _survivors(search):
  return [trace.survivor for _, trace in _states(search)]


def _longest_lag(survivors, beam_size):
  """Most chunks that were made after a chunk before all beams shared it; those that none did count to the end."""
  lags = []
  for chunk in range(len(survivors)):
    shared = (shared_ancestor(survivors[chunk:end], beam_size) for end in range(chunk + 1, len(survivors) + 1))
    lags.append(next((lag for lag, ancestor in enumerate(shared) if ancestor is not None), len(survivors)))
  # How long the last ones would have taken is not known.
  return max(lags[: len(survivors) - SEARCH.settle_within])


class TestBound:
  def test_beams_differ_without_it(self):
    assert _longest_lag(_survivors(dataclasses.replace(SEARCH, settle_within=0)), 2) == NUM_CHUNKS

  @pytest.mark.parametrize("policy", POLICIES, ids=repr)
  def test_all_share_what_is_older(self, policy):
    search = dataclasses.replace(SEARCH, policy=policy)
    if policy == KeepBeams():
      assert _longest_lag(_survivors(search), 2) == 2
    assert _longest_lag(_survivors(search), 2) <= 2

  def test_of_one_chunk(self):
    """All survivors are then children of one beam."""
    for survivor in _survivors(dataclasses.replace(SEARCH, top_k=2, settle_within=1, policy=TopK()))[1:]:
      assert len(set((survivor // 2).tolist())) == 1

  def test_the_best_survivor_stays(self):
    """By hand: three beams that keep their own; chunk 2 is the first that must drop those that differ in chunk 0."""
    states = _states()
    first, second, third = (trace for _, trace in states[:3])
    assert (first.survivor // 2).tolist() == (second.survivor // 2).tolist() == [0, 1, 2]
    best = int(np.argmax(third.candidates.hybrid.max(axis=1)))
    assert third.survivor.tolist() == [2 * best + int(np.argmax(third.candidates.hybrid[best]))] * 3
    assert states[2][0].beams.lineage.tolist() == [[second.survivor[best], third.survivor[0]]] * 3

  def test_weights_are_those_of_all_candidates(self):
    for _, trace in _states(dataclasses.replace(SEARCH, beam_size=1, policy=Particles(40.0, score="sum"))):
      assert np.isfinite(trace.log_weight).all()

  def test_a_bound_that_no_video_reaches_changes_nothing(self):
    for policy in POLICIES:
      usual, bounded = (
        _states(dataclasses.replace(SEARCH, policy=policy, settle_within=within)) for within in (0, NUM_CHUNKS)
      )
      for (state, trace), (other, same) in zip(usual, bounded, strict=True):
        chex.assert_trees_all_equal(trace, same)
        chex.assert_trees_all_equal(state.beams, other.beams._replace(lineage=None))

  def test_the_next_judged_chunk_decides(self):
    """Chunks 0, 3 and 6 are judged: beams that differ in chunk 0 go on until chunk 3."""
    survivors = _survivors(dataclasses.replace(SEARCH, judge_every=3))
    assert [len(set((survivor // 2).tolist())) for survivor in survivors[:4]] == [3, 3, 3, 1]

  def test_a_candidate_that_is_not_usable_is_not_the_best(self):
    """All of beam 2 are NaN in chunk 2."""
    bad = lambda seed: (seed // 1000 == 2) & (seed % 1000 // 100 == 2)
    poisoned = lambda seed: toy.draw_noise(seed)._replace(
      fresh=toy.draw_noise(seed).fresh + jnp.where(bad(seed), jnp.nan, 0.0)
    )
    for _, trace in _states(models=dataclasses.replace(toy.MODELS, draw_noise=poisoned)):
      assert trace.candidates.usable.ravel()[trace.survivor].all()


class TestDrivers:
  def test_rollout(self):
    rolled = drivers.rollout(toy.PARAMS, CONDITION, toy.MODELS, SEARCH, num_chunks=NUM_CHUNKS, seed=3)
    for (_, trace), other in zip(_states(), rolled, strict=True):
      np.testing.assert_array_equal(trace.survivor, other.survivor)
      np.testing.assert_array_equal(trace.latents, other.latents)

  @pytest.mark.parametrize("chunks", [1, 4])
  def test_across_a_stop(self, chunks):
    usual = _states()
    again = _states(state=jax.tree.map(np.array, usual[chunks - 1][0]))
    chex.assert_trees_all_equal(again, usual[chunks:])

  def test_prompts_in_lockstep_on_several_devices(self):
    search = dataclasses.replace(SEARCH, top_k=2)
    mesh = jax.make_mesh((1, 2, 2, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:4])
    models = dataclasses.replace(toy.MODELS, execution=Execution(mesh=mesh))
    together = _states(search, models, drivers.stack_conditions([CONDITION] * 2, mesh), seed=[11, 3])
    for (state, traces), (alone, trace) in zip(together, _states(search), strict=True):
      np.testing.assert_array_equal(traces.survivor[1], trace.survivor)
      np.testing.assert_array_equal(state.beams.lineage[1], alone.beams.lineage)

  def test_a_session_lags_by_no_more(self):
    """Both beams are the best one once more after every third chunk: it and the two before it are shown together."""
    search = dataclasses.replace(TWO_BEAMS, policy=KeepBeams(), settle_within=2)
    assert [chunk.lag for chunk in session(search=search)] == [2, 1, 0, 2, 1, 0]


class TestBadInput:
  def test_a_negative_bound(self):
    with pytest.raises(ConfigError, match="settle_within must be at least 0 chunks, got -1"):
      SearchConfig(settle_within=-1)

  def test_rounds(self):
    with pytest.raises(ConfigError, match="rounds stop by .*settle_within must be 0, got 2"):
      SearchConfig(beam_size=4, round_size=2, settle_within=2)

  def test_copies_that_would_never_differ(self):
    with pytest.raises(ConfigError, match="first_candidate must be 'fresh' for settle_within 2 .*got 'reuse'"):
      SearchConfig(beam_size=1, top_k=2, settle_within=2)

  def test_a_search_that_chooses_nothing(self):
    with pytest.raises(ConfigError, match="judges=False .*settle_within must be 0, got 2"):
      SearchConfig(beam_size=1, judges=False, settle_within=2)
