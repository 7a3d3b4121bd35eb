"""Hybrid score, survivors and routing flags."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from streamt1_jax.config import SearchConfig
from streamt1_jax.reward_pruning import (
  Flags,
  ScoreHistory,
  empty_history,
  extend_history,
  fusion_weight,
  hybrid_score,
  prune,
  route_flags,
)


class TestHybrid(chex.TestCase):
  def _weight(self, chunk, num_chunks, cap=0.4):
    weight = self.variant(functools.partial(fusion_weight, cap=cap))(jnp.int32(chunk), jnp.int32(num_chunks))
    assert weight.dtype == jnp.float32
    return float(weight)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    # The weight grows to the cap.
    (0, 10, 0.4, 0.0),
    (1, 10, 0.4, 1 / 9),
    (3, 10, 0.4, 3 / 9),
    (4, 10, 0.4, 0.4),
    (9, 10, 0.4, 0.4),
    # Extreme caps at the last chunk.
    (4, 5, 0.0, 0.0),
    (4, 5, 1.0, 1.0),
    # min(frame / (frames - F), cap), here with 3 frames a chunk and 21 in all.
    (2, 7, 0.4, 6 / (21 - 3)),
    # A video of a single chunk.
    (0, 1, 0.4, 0.0),
  )
  def test_weight(self, chunk, num_chunks, cap, expected):
    assert self._weight(chunk, num_chunks, cap) == pytest.approx(expected, abs=1e-7)

  @chex.variants(with_jit=True, without_jit=True)
  def test_score_by_hand(self):
    """All candidates at once, with one weight."""
    score = self.variant(jax.vmap(hybrid_score, in_axes=(0, 0, None)))
    hybrid = score(jnp.array([2.0, 0.0, 4.0]), jnp.array([-1.0, 8.0, 4.0]), jnp.float32(0.25))
    chex.assert_trees_all_equal(hybrid, jnp.array([-0.25, 6.0, 4.0]))


class TestPrune(chex.TestCase):
  def _prune(self, scores, usable=None, top_k=2):
    scores = np.asarray(scores, np.float32)
    usable = np.isfinite(scores) if usable is None else np.asarray(usable)
    index, kept = self.variant(functools.partial(prune, top_k=top_k))(jnp.array(scores), jnp.array(usable))
    chex.assert_shape((index, kept), (top_k,))
    return index.tolist(), kept.tolist()

  @chex.variants(with_jit=True, without_jit=True)
  def test_best_first(self):
    assert self._prune([0.5, 2.0, -1.0, 1.0]) == ([1, 3], [2.0, 1.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_earlier_candidate_wins_ties(self):
    assert self._prune([1.0, 3.0, 3.0, 1.0], top_k=3) == ([1, 2, 0], [3.0, 3.0, 1.0])
    assert self._prune([0.0] * 6, top_k=3)[0] == [0, 1, 2]

  @chex.variants(with_jit=True, without_jit=True)
  def test_random_scores_with_many_ties(self):
    generator = np.random.default_rng(0)
    for _ in range(5):
      scores, usable = generator.integers(-2, 3, 20).astype(np.float32), generator.random(20) < 0.6
      expected = [n for n in np.argsort(-scores, kind="stable") if usable[n]][:4]
      assert self._prune(scores, usable, 4)[0] == expected

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_bad_scores_never_survive(self, bad):
    assert self._prune([bad, -7.0, bad, -9.0]) == ([1, 3], [-7.0, -9.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_finite_score_of_bad_latents_never_survives(self):
    assert self._prune([5.0, -7.0, 6.0, -9.0], [False, True, False, True]) == ([1, 3], [-7.0, -9.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_the_best_fills_the_beams(self):
    assert self._prune([np.nan, -3.0, np.inf, np.nan], top_k=3) == ([1, 1, 1], [-3.0] * 3)
    assert self._prune([1.0, np.nan, 4.0, np.nan], top_k=4) == ([2, 0, 2, 2], [4.0, 1.0, 4.0, 4.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_prompts_under_vmap(self):
    """All candidates survive, each prompt by its own scores."""
    scores = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 2.0]])
    index, kept = self.variant(jax.vmap(functools.partial(prune, top_k=3)))(scores, jnp.isfinite(scores))
    np.testing.assert_array_equal(index, [[1, 0, 2], [2, 1, 0]])
    np.testing.assert_array_equal(kept, [[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])


def _history(shorts, longs, search):
  """Scores of a lineage, one after the other."""
  history = empty_history(search)
  for short, long in zip(shorts, longs, strict=True):
    history = extend_history(history, jnp.float32(short), jnp.float32(long))
  return history


def _flags(short, long, history, search, transform=jax.jit):
  flags = transform(functools.partial(route_flags, search=search))(jnp.float32(short), jnp.float32(long), history)
  return bool(flags.ema), bool(flags.append)


class TestFlags(chex.TestCase):
  """Past image scores 1 and 2, so the baseline is 1.5; last video score 4. Thresholds 0.25 and 0.5."""

  SEARCH = SearchConfig(short_threshold=0.25, long_threshold=0.5, sliding_window=4)
  TRUTH = (
    (2.0, 4.0, True, False),  # up, no drop
    (2.0, 3.0, False, True),  # up, drop
    (1.0, 3.0, False, False),  # drop alone
    (1.0, 4.0, False, False),  # neither
    (2.0, 9.0, True, False),  # up, and the window became better
    (1.75, 4.0, False, False),  # up by the threshold is not enough
    (2.0, 3.5, True, False),  # a drop by the threshold is not one
  )

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters("history", "window")
  def test_truth_table(self, baseline):
    """Candidates of one beam share its history. They are judged by themselves, and together under vmap."""
    search = dataclasses.replace(self.SEARCH, short_baseline=baseline)
    history = _history([1.0, 2.0], [-5.0, 4.0], search)
    short, long, ema, append = (np.array(column) for column in zip(*self.TRUTH, strict=True))
    for row in self.TRUTH:
      assert _flags(*row[:2], history, search, self.variant) == row[2:]
    rule = jax.vmap(functools.partial(route_flags, search=search), in_axes=(0, 0, None))
    flags = self.variant(rule)(short.astype(np.float32), long.astype(np.float32), history)
    chex.assert_trees_all_equal(jax.device_get(flags), Flags(ema, append))

  @chex.variants(with_jit=True, without_jit=True)
  def test_first_chunk_gets_none(self):
    for long in (-100.0, 100.0):
      assert _flags(100.0, long, empty_history(self.SEARCH), self.SEARCH, self.variant) == (False, False)

  @chex.variants(with_jit=True, without_jit=True)
  def test_history_of_one_chunk_window(self):
    search = SearchConfig(sliding_window=1)
    history = _history([1.0, 5.0], [0.0, 0.0], search)
    assert history.recent.shape == (1,)  # Not empty, so that it can be saved; nothing reads it.
    assert _flags(3.5, 0.0, history, search, self.variant) == (True, False)
    assert _flags(2.5, 0.0, history, search, self.variant) == (False, False)

  @parameterized.product(baseline=("history", "window"), window=(2, 4, 30))
  def test_random_lineage(self, baseline, window):
    """Against a loop over plain lists. All chunks run what the first one traced."""
    search = SearchConfig(sliding_window=window, short_baseline=baseline, short_threshold=0.1, long_threshold=0.2)
    generator = np.random.default_rng(window)
    short, long = generator.standard_normal((2, 25)).astype(np.float32)
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(route_flags, n=1)
    step = jax.jit(lambda s, l, h: (counted(s, l, h, search), extend_history(h, s, l)))
    history, seen = empty_history(search), set()
    for chunk in range(25):
      past = [float(x) for x in short[:chunk]]
      past = past if baseline == "history" else past[-(window - 1) :]
      up = chunk > 0 and float(short[chunk]) - sum(past) / len(past) > 0.1
      drop = chunk > 0 and float(long[chunk - 1]) - float(long[chunk]) > 0.2
      before = history
      flags, history = step(short[chunk], long[chunk], history)
      chex.assert_trees_all_equal_shapes_and_dtypes(history, before)
      assert (bool(flags.ema), bool(flags.append)) == (up and not drop, up and drop), chunk
      seen.add((up, drop))
    assert len(seen) == 4

  def test_baselines_differ_once_the_window_has_moved(self):
    """Old scores of 10 weigh on the history, not on a window that has left them behind."""
    shorts, longs = [10.0, 10.0, 0.0, 0.0], [0.0] * 4
    for baseline, expected in (("history", (False, False)), ("window", (True, False))):
      search = SearchConfig(sliding_window=3, short_baseline=baseline)
      assert _flags(1.0, 0.0, _history(shorts, longs, search), search) == expected

  @chex.variants(with_jit=True, without_jit=True)
  def test_history_is_a_record(self):
    search = SearchConfig(sliding_window=3)
    history, extend = empty_history(search), self.variant(extend_history)
    for short in (1.0, 2.0, 3.0, 4.0):
      history = extend(history, jnp.float32(short), jnp.float32(short + 4.0))
    expected = ScoreHistory(jnp.float32(10.0), jnp.array([3.0, 4.0]), jnp.int32(4), jnp.float32(8.0))
    chex.assert_trees_all_equal(history, expected, strict=True)


def test_fusion_weight_of_two_chunks():
  """The second of two chunks is the last one: nothing but the cap bounds its weight."""
  assert fusion_weight(1, 2, 1.0) == 1.0
