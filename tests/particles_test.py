"""Particles: what their weights add up to, when they move, and what they are at the ends of their settings."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.between_chunks import switch_prompt
from streamt1_jax.config import ConfigError, SearchConfig, SwitchConfig
from streamt1_jax.finishing import Finishing
from streamt1_jax.policies import KeepBeams, Particles, Scores, alpha_of, resampling
from streamt1_jax.policies.particles import Weights
from streamt1_jax.state import Condition
from tests import small_search as small
from tests import toy_generator as toy

NUM_CHUNKS = 5
INF = float("inf")


def _search(policy, **changes):
  plain = dataclasses.replace(SearchConfig.streaming(small.MODEL), judges=True, sliding_window=NUM_CHUNKS)
  return dataclasses.replace(plain, policy=policy, **changes)


def _states(search, seed=3, run=drivers.stream_states):
  condition = Condition((), (), (), jnp.int32(NUM_CHUNKS))
  found = run(toy.PARAMS, condition, toy.MODELS, search, num_chunks=NUM_CHUNKS, seed=seed)
  return [jax.tree.map(np.array, each) for each in found]


def _traces(search, **options):
  return [trace for _, trace in _states(search, **options)]


def _select(policy, long, usable=None, *, carry=None, chunk=1, num_chunks=4, key=0):
  """One choice: beams by candidates; short-term scores and hybrid scores are the long-term ones."""
  long = jnp.asarray(long, jnp.float32)
  usable = jnp.ones(long.shape, bool) if usable is None else jnp.asarray(usable)
  beams, candidates = long.shape
  search = _search(policy, top_k=beams, beam_size=candidates)
  carry = policy.init(search) if carry is None else carry
  return policy.select(
    carry, Scores(long, long, long, usable), jax.random.key(key), jnp.int32(chunk), jnp.int32(num_chunks)
  )


class TestIdentities:
  def test_infinite_alpha_leaves_every_slot_alone(self):
    """The same videos as of beams that never mix, bit for bit, and equal weights."""
    weighed, alone = (_traces(_search(policy, top_k=4)) for policy in (Particles(INF), KeepBeams()))
    for trace, other in zip(weighed, alone, strict=True):
      np.testing.assert_array_equal(trace.survivor, np.arange(4))
      np.testing.assert_array_equal(trace.latents, other.latents)
      np.testing.assert_array_equal(trace.log_weight, np.zeros((4, 1)))

  def test_one_particle_is_plain_streaming(self):
    plain = _traces(SearchConfig.streaming(small.MODEL))
    for returns in ("argmax", "draw"):
      for trace, other in zip(_traces(_search(Particles(0.1, returns=returns))), plain, strict=True):
        np.testing.assert_array_equal(trace.survivor, other.survivor)
        np.testing.assert_array_equal(trace.latents, other.latents)

  @pytest.mark.parametrize("candidates", [1, 2])
  def test_tiny_alpha_copies_the_best(self, candidates):
    """One beam keeps all, and not the best K: after every chunk but the last."""
    *before, last = _traces(_search(Particles(1e-4), top_k=4, beam_size=candidates))
    for trace in before:
      assert set(trace.survivor.tolist()) == {int(np.argmax(trace.candidates.long))}
    assert len(set(last.survivor.tolist())) == 4

  def test_without_beta_only_whole_videos_are_weighed(self):
    """Importance-sampled best-of-N: beams stay until the end, and then weigh exp(score / alpha)."""
    *before, last = _states(_search(Particles(2.0, beta=0.0), top_k=4))
    for state, trace in before:
      np.testing.assert_array_equal(trace.survivor, np.arange(4))
      np.testing.assert_array_equal(state.policy.log_weight, np.zeros(4))
    np.testing.assert_allclose(last[0].policy.log_weight, last[1].candidates.long[:, 0] / 2.0, rtol=1e-6)

  @pytest.mark.parametrize("beta", [1.0, 0.5])
  @pytest.mark.parametrize("score", ["long", "sum"])
  def test_increments_of_a_lineage_are_the_score_of_its_video(self, score, beta):
    """Resampled or not, what a lineage gained adds up to score / alpha."""
    alpha = 3.0
    found = _states(_search(Particles(alpha, beta=beta, ess_threshold=0.9, score=score), top_k=4))
    before = [np.zeros(4), *(state.policy.log_weight for state, _ in found[:-1])]
    gained = [trace.log_weight[:, 0] - weight for (_, trace), weight in zip(found, before, strict=True)]
    path = drivers.lineage([trace.survivor for _, trace in found], 1)
    moved = [trace.survivor.tolist() != [0, 1, 2, 3] for _, trace in found]
    assert any(moved)
    assert not moved[-1]
    by_hand = np.zeros(4)
    for (_, trace), beams in zip(found, path, strict=True):
      candidate = trace.survivor[beams]
      hybrid, long = trace.candidates.hybrid[candidate, 0], trace.candidates.long[candidate, 0]
      by_hand = by_hand + hybrid / NUM_CHUNKS if score == "sum" else long
    total = sum(each[trace.survivor[beams]] for each, (_, trace), beams in zip(gained, found, path, strict=True))
    np.testing.assert_allclose(total, by_hand / alpha, rtol=1e-5)


class TestSelect:
  def test_beams_stay_where_they_are(self):
    """Not sorted: a beam whose slot changes would draw other noise."""
    choice = _select(Particles(1.0, ess_threshold=0.5), [[0.1], [0.4], [0.2]])
    assert choice.survivor.tolist() == [0, 1, 2]
    np.testing.assert_allclose(choice.carry.log_weight, [0.1, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(choice.score, [0.1, 0.4, 0.2], rtol=1e-6)

  @pytest.mark.parametrize(("threshold", "moves"), [(0.4, False), (0.6, True)])
  def test_they_move_below_the_threshold(self, threshold, moves):
    """Two of four have all the weight: an effective size of 2, half of 4."""
    choice = _select(Particles(0.01, ess_threshold=threshold), [[1.0], [0.0], [0.0], [1.0]])
    assert choice.survivor.tolist() == ([0, 0, 3, 3] if moves else [0, 1, 2, 3])
    assert (choice.carry.log_weight == 0).all() == moves

  def test_two_never_move_at_the_default(self):
    assert _select(Particles(0.001), [[9.0], [0.0]]).survivor.tolist() == [0, 1]

  def test_the_last_chunk_moves_nothing(self):
    choice = _select(Particles(0.01, ess_threshold=1.0), [[1.0], [0.0], [0.0], [1.0]], chunk=3)
    assert choice.survivor.tolist() == [0, 1, 2, 3]

  def test_the_heaviest_candidates_stay_after_the_last_chunk(self):
    choice = _select(Particles(1.0), [[1.0, 4.0], [3.0, 2.0]], chunk=3)
    assert choice.survivor.tolist() == [1, 2]
    np.testing.assert_allclose(choice.carry.log_weight, [4.0, 3.0])

  @pytest.mark.parametrize("chunk", [1, 3])
  def test_what_is_not_usable(self, chunk):
    """It is replaced, and after the last chunk what stands in for it has no weight: none is counted twice."""
    choice = _select(Particles(1.0, returns="draw"), [[math.nan], [2.0], [1.9]], [[False], [True], [True]], chunk=chunk)
    assert 0 not in choice.survivor.tolist()
    if chunk == 3:
      assert choice.survivor.tolist() == [1, 1, 2]
      assert choice.carry.log_weight[0] == -INF
      assert int(np.argmax(choice.score)) != 0

  def test_a_winner_is_drawn_by_weight(self):
    """Three of weights 1, 2 and 5, drawn with 2000 keys."""
    weights = np.array([1.0, 2.0, 5.0])
    log_weight = jnp.log(jnp.asarray(weights, jnp.float32))[:, None]
    scores = Scores(log_weight, log_weight, log_weight, jnp.ones((3, 1), bool))
    policy = Particles(1.0, returns="draw")
    carry = policy.init(_search(policy, top_k=3))
    draw = lambda key: jnp.argmax(policy.select(carry, scores, key, jnp.int32(3), jnp.int32(4)).score)
    won = np.bincount(jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000)), minlength=3)
    expected = weights / 8 * 2000
    # The 99.9th percentile of chi square with two degrees of freedom.
    assert ((won - expected) ** 2 / expected).sum() < 13.82

  def test_what_is_drawn_follows_the_weights(self):
    choice = _select(Particles(1.0), np.log([[1.0, 2.0], [4.0, 9.0]]), key=5)
    key = jax.random.split(jax.random.key(5))[0]
    np.testing.assert_array_equal(choice.survivor, resampling.systematic(key, jnp.log(jnp.array([1.0, 2, 4, 9])), 2))


def test_the_drawn_video_is_shown():
  """With equal weights any video may be drawn, the best or not; a video that is finished chunk by chunk is the same."""
  condition, search = Condition((), (), (), jnp.int32(NUM_CHUNKS)), _search(Particles(INF, returns="draw"), top_k=4)
  others = 0
  for seed in (0, 1, 2):
    traces = _traces(search, seed=seed)
    final = drivers.final_beams(toy.PARAMS, condition, toy.MODELS, search, traces)
    assert final.best == int(np.argmax(traces[-1].score))
    others += final.best != int(np.argmax(final.scores))
    finishing = Finishing(toy.PARAMS, toy.MODELS, search, None)
    for trace in traces:
      finishing.add(trace, drivers.Segment(0, condition))
    assert finishing.end().best == final.best
  assert others


class TestAlpha:
  def test_by_hand(self):
    """From 0 to 10 in steps of 1: p90 - p10 is 8; twice as far apart it is 16."""
    scores = np.stack([np.arange(11.0), 2 * np.arange(11.0)])
    assert alpha_of(scores) == pytest.approx(12 / math.log(1000))

  @pytest.mark.parametrize(
    ("scores", "message"),
    [
      (np.zeros((2, 1)), r"at least two plain videos per prompt, got \[2, 1\]"),
      (np.array([[1.0, np.nan]]), "finite scores"),
      (np.ones((3, 4)), "no scale"),
    ],
  )
  def test_no_scale(self, scores, message):
    with pytest.raises(ConfigError, match=message):
      alpha_of(scores)


class TestRefusal:
  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"alpha": 0.0}, "alpha must be above 0"),
      ({"alpha": math.nan}, "alpha must be above 0"),
      ({"alpha": 1.0, "beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
      ({"alpha": 1.0, "ess_threshold": -0.1}, r"ess_threshold must be in \[0, 1\]"),
      ({"alpha": 1.0, "score": "hybrid"}, "score must be one of"),
    ],
  )
  @pytest.mark.usefixtures("unchecked_types")
  def test_values(self, fields, message):
    with pytest.raises(ConfigError, match=message):
      Particles(**fields)

  @pytest.mark.parametrize(
    ("changes", "message"),
    [({"judges": False}, "judges must be true"), ({"first_candidate": "reuse"}, "first_candidate must be 'fresh'")],
  )
  def test_searches(self, changes, message):
    with pytest.raises(ConfigError, match=message):
      _traces(_search(Particles(1.0), top_k=2, **changes))


class TestSwitch:
  """A new prompt, between two chunks of two particles that scored 5 and 3 under the old one, and then 4 and 4."""

  @pytest.mark.parametrize(("policy", "old"), [(Particles(2.0), 0.0), (Particles(2.0, beta=0.5), 0.5)])
  @pytest.mark.parametrize("prompts", [0, 2])
  def test_scores_under_two_prompts_are_not_subtracted(self, policy, old, prompts):
    """Not even the worse one gains by what it had. What `beta` held back of the old scores counts; lockstep: one of
    two videos switches."""
    search, seed = _search(policy, top_k=2), [3] * prompts or 3
    condition = Condition((), (), (), jnp.int32(NUM_CHUNKS))
    if prompts:
      condition = drivers.stack_conditions([condition] * prompts)
    state = drivers.jitted_init_state(toy.PARAMS, np.asarray(seed, np.int32), toy.MODELS, search, NUM_CHUNKS)
    like = lambda row: jnp.broadcast_to(jnp.array(row), state.policy.score.shape)
    state = state._replace(policy=Weights(like([0.0, 0.0]), like([5.0, 3.0])), chunk_index=jnp.int32(2))
    mask = {"switches": np.array([False, True])} if prompts else {}
    options = toy.MODELS, search, SwitchConfig(), *mask.values()
    carry = switch_prompt(toy.PARAMS, state, condition, *options).policy
    if prompts:
      assert (carry.log_weight[0].tolist(), carry.score[0].tolist()) == ([0.0, 0.0], [5.0, 3.0])
      carry = jax.tree.map(lambda x: x[1], carry)
    weight = _select(policy, [[4.0], [4.0]], carry=carry, chunk=3).log_weight.ravel()
    assert weight[0] - weight[1] == pytest.approx(old * (5.0 - 3.0) / 2.0)

  def test_a_sum_of_scores_goes_on(self):
    carry = Weights(jnp.array([0.5, 0.0]), jnp.array([5.0, 3.0]))
    assert Particles(2.0, score="sum").switched(carry) is carry
