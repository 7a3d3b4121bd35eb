"""Looking ahead: candidates are ranked by what follows them, and nothing of that stays."""

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
from streamt1_jax.policies import TopK
from streamt1_jax.state import Condition
from tests import small_search as small
from tests import toy_generator as toy

NUM_CHUNKS, SEED, CAP = 5, 3, 0.4
SEARCH = SearchConfig(
  beam_size=3, noise_sigma=0.0, first_candidate="fresh", fusion_cap=CAP, sliding_window=3, look_ahead=2
)
CONDITION = Condition((), (), (), jnp.int32(NUM_CHUNKS))


def _states(search=SEARCH, models=toy.MODELS, condition=CONDITION, **options):
  options = {"num_chunks": NUM_CHUNKS, "seed": SEED, **options}
  states = drivers.stream_states(toy.PARAMS, condition, models, search, **options)
  # The next chunk takes the state's buffers.
  return [(jax.tree.map(np.array, state), jax.device_get(trace)) for state, trace in states]


@pytest.fixture(scope="module")
def searched():
  return _states()


def _seed(chunk, beam, place):
  return SEED + 3 * beam + place if chunk == 0 else SEED + 1000 * chunk + 100 * beam + place


def _spoiled(seed):
  draws = toy.draw_noise(seed)
  return draws._replace(fresh=jnp.where(seed == _seed(1, 0, 0), jnp.nan, draws.fresh))


def _chunk(last, seed):
  return last + (last + seed % 7) / 2


def _hybrid(chunk, video):
  weight = min(chunk / (NUM_CHUNKS - 1), CAP)
  return weight * video[-1] + (1 - weight) * sum(video[-3:])


def _by_hand(look_ahead):
  """Per chunk: the ranked scores [K, B], the survivors, and the videos that they end."""
  videos, found = [[], []], []
  for chunk in range(NUM_CHUNKS):
    made = [[[*video, _chunk([0, *video][-1], _seed(chunk, k, i))] for i in range(3)] for k, video in enumerate(videos)]
    ranked = np.zeros((2, 3))
    for k, i in np.ndindex(2, 3):
      video, scores = list(made[k][i]), [_hybrid(chunk, made[k][i])]
      for later in range(chunk + 1, min(chunk + look_ahead, NUM_CHUNKS - 1) + 1):
        video.append(_chunk(video[-1], _seed(later, k, 0)))
        scores.append(_hybrid(later, video))
      ranked[k, i] = np.mean(scores)
    survivors = np.argsort(-ranked.ravel(), kind="stable")[:2]
    videos = [made[n // 3][n % 3] for n in survivors]
    found.append((ranked, survivors, videos))
  return found


class TestLookAhead:
  @pytest.mark.parametrize("look_ahead", [1, 2])
  def test_by_hand(self, look_ahead):
    states = _states(dataclasses.replace(SEARCH, look_ahead=look_ahead))
    for chunk, ((_, trace), (ranked, survivors, videos)) in enumerate(zip(states, _by_hand(look_ahead), strict=True)):
      np.testing.assert_allclose(trace.ahead, ranked, rtol=1e-6)
      np.testing.assert_array_equal(trace.survivor, survivors)
      np.testing.assert_allclose(trace.score, ranked.ravel()[survivors], rtol=1e-6)
      np.testing.assert_allclose(trace.latents.ravel(), [video[chunk] for video in videos], rtol=1e-6)
    np.testing.assert_array_equal(trace.ahead, trace.candidates.hybrid)

  def test_it_decides(self):
    """Otherwise the tests here would hold for a search that ignores it."""
    near, far = ([list(survivors) for _, survivors, _ in _by_hand(count)] for count in (0, 2))
    assert near != far

  def test_only_their_own_scores_are_remembered(self, searched):
    sums = np.zeros(2)
    for state, trace in searched:
      sums = sums[trace.survivor // 3] + trace.candidates.short.ravel()[trace.survivor]
      np.testing.assert_allclose(state.beams.history.short_sum, sums, rtol=1e-6)

  def test_one_candidate_is_plain_streaming(self):
    plain = SearchConfig.streaming(small.MODEL)
    alone = dataclasses.replace(plain, judges=True, look_ahead=1)
    for (_, trace), (_, other) in zip(_states(alone), _states(plain), strict=True):
      np.testing.assert_array_equal(trace.latents, other.latents)
      assert trace.survivor.tolist() == [0]

  def test_what_leads_to_nan_does_not_survive(self):
    """Candidate 0 of beam 0 is bad in chunk 1, and all candidates of beam 0 are carried on with its noise."""
    (_, first), (_, second), *_ = _states(models=dataclasses.replace(toy.MODELS, draw_noise=_spoiled))
    assert first.candidates.usable.all()
    assert np.isnan(first.ahead[0]).all()
    assert np.isfinite(first.ahead[1]).all()
    assert first.survivor.min() >= 3
    assert not second.candidates.usable[0, 0]
    everywhere = lambda seed: _spoiled(jnp.where(seed >= 1000, _seed(1, 0, 0), seed))
    models = dataclasses.replace(toy.MODELS, draw_noise=everywhere)
    with pytest.raises(drivers.SearchError, match="chunk 1, seed 3: every candidate is NaN or Inf"):
      _states(models=models)

  @pytest.mark.parametrize("policy", [None, TopK(cumulative=True)])
  def test_where_all_lead_to_nan_their_own_scores_decide(self, policy):
    """With one beam all candidates are carried on with the bad noise. Noise 5 is the best of 3, 4 and 5."""
    models = dataclasses.replace(toy.MODELS, draw_noise=_spoiled)
    (_, first), (_, second), *_ = _states(dataclasses.replace(SEARCH, top_k=1, policy=policy), models)
    assert first.survivor.tolist() == [2]
    np.testing.assert_array_equal(first.ahead, first.candidates.hybrid)
    # What was not known has no part in later choices.
    assert second.candidates.usable.tolist() == [[False, True, True]]
    before = first.score if policy else 0.0
    np.testing.assert_allclose(second.score, before + second.ahead[0, 1:].max(), rtol=1e-6)

  def test_nothing_is_made_that_the_model_cannot_make(self):
    """The toy makes 8 chunks, and a horizon may be farther away."""
    *_, (_, trace) = _states(num_chunks=8, condition=CONDITION._replace(num_chunks=jnp.int32(20)))
    np.testing.assert_array_equal(trace.ahead, trace.candidates.hybrid)

  def test_chunks_that_are_not_judged_do_not_look(self):
    found = [trace.ahead is not None for _, trace in _states(dataclasses.replace(SEARCH, judge_every=2))]
    assert found == [True, False, True, False, True]


class TestDrivers:
  def test_rollout(self, searched):
    rolled = drivers.rollout(toy.PARAMS, CONDITION, toy.MODELS, SEARCH, num_chunks=NUM_CHUNKS, seed=SEED)
    for (_, trace), other in zip(searched, rolled, strict=True):
      chex.assert_trees_all_close(trace, other, rtol=1e-6)
      np.testing.assert_array_equal(trace.survivor, other.survivor)

  def test_across_a_stop(self, searched):
    chex.assert_trees_all_equal(_states(state=jax.tree.map(np.array, searched[1][0])), searched[2:])

  def test_one_after_the_other(self, searched):
    models = dataclasses.replace(toy.MODELS, execution=Execution(decoding="twice"))
    for (_, trace), (_, other) in zip(searched, _states(models=models), strict=True):
      np.testing.assert_array_equal(trace.survivor, other.survivor)
      np.testing.assert_allclose(trace.ahead, other.ahead, rtol=1e-6)

  def test_prompts_in_lockstep_on_several_devices(self, searched):
    mesh = jax.make_mesh((1, 2, 3, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:6])
    models = dataclasses.replace(toy.MODELS, execution=Execution(mesh=mesh, decoding="in_turn"))
    together = _states(models=models, condition=drivers.stack_conditions([CONDITION] * 2, mesh), seed=[11, SEED])
    for (_, traces), (_, trace) in zip(together, searched, strict=True):
      np.testing.assert_array_equal(traces.survivor[1], trace.survivor)
      np.testing.assert_allclose(traces.ahead[1], trace.ahead, rtol=1e-6)

  def test_nothing_compiles_in_another_video(self, searched):
    with CompileCounter() as compiles:
      _states(seed=5)
    assert compiles.count == 0


class TestRefusal:
  def test_longer_than_the_video(self):
    with pytest.raises(ConfigError, match=r"look_ahead must be in 0\.\.4, below the chunks of the video, got 5"):
      _states(dataclasses.replace(SEARCH, look_ahead=5))

  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"look_ahead": -1}, "look_ahead must be at least 0 chunks, got -1"),
      ({"look_ahead": 1, "judges": False, "beam_size": 1}, "look_ahead must be 0, got 1"),
    ],
  )
  def test_values(self, fields, message):
    with pytest.raises(ConfigError, match=message):
      SearchConfig(**fields)
