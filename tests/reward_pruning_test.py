"""Hybrid score, survivors and routing flags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import SearchConfig
from streamt1_jax.reward_pruning import (
  ScoreHistory,
  empty_history,
  extend_history,
  fusion_weight,
  hybrid_score,
  prune,
  route_flags,
)


def _weight(chunk, num_chunks, cap=0.4):
  return float(fusion_weight(jnp.int32(chunk), jnp.int32(num_chunks), cap))


class TestHybrid:
  @pytest.mark.parametrize(("chunk", "expected"), [(0, 0.0), (1, 1 / 9), (3, 3 / 9), (4, 0.4), (9, 0.4)])
  def test_weight_grows_to_the_cap(self, chunk, expected):
    assert _weight(chunk, 10) == pytest.approx(expected, abs=1e-7)

  @pytest.mark.parametrize(("cap", "expected"), [(0.0, 0.0), (1.0, 1.0)])
  def test_extreme_caps_at_the_last_chunk(self, cap, expected):
    assert _weight(4, 5, cap) == expected

  def test_weight_counts_latent_frames(self):
    """min(frame / (frames - F), cap), here with 3 frames a chunk and 21 in all."""
    assert _weight(2, 7) == pytest.approx(6 / (21 - 3))

  def test_single_chunk_video(self):
    assert _weight(0, 1) == 0.0

  def test_dtype(self):
    assert fusion_weight(jnp.int32(1), jnp.int32(3), 0.4).dtype == jnp.float32

  def test_score_by_hand(self):
    assert float(hybrid_score(jnp.float32(2.0), jnp.float32(-1.0), jnp.float32(0.25))) == -0.25


def _prune(scores, usable=None, top_k=2):
  scores = np.asarray(scores, np.float32)
  usable = np.isfinite(scores) if usable is None else np.asarray(usable)
  index, kept = jax.jit(prune, static_argnums=2)(scores, usable, top_k)
  return list(np.asarray(index)), list(np.asarray(kept))


class TestPrune:
  def test_best_first(self):
    assert _prune([0.5, 2.0, -1.0, 1.0]) == ([1, 3], [2.0, 1.0])

  def test_earlier_candidate_wins_ties(self):
    assert _prune([1.0, 3.0, 3.0, 1.0], top_k=3) == ([1, 2, 0], [3.0, 3.0, 1.0])
    assert _prune([0.0] * 6, top_k=3)[0] == [0, 1, 2]

  @pytest.mark.parametrize("seed", range(5))
  def test_random_scores_with_many_ties(self, seed):
    generator = np.random.default_rng(seed)
    scores, usable = generator.integers(-2, 3, 20).astype(np.float32), generator.random(20) < 0.6
    expected = [n for n in np.argsort(-scores, kind="stable") if usable[n]][:4]
    assert _prune(scores, usable, 4)[0] == expected

  @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
  def test_bad_scores_never_survive(self, bad):
    assert _prune([bad, -7.0, bad, -9.0]) == ([1, 3], [-7.0, -9.0])

  def test_finite_score_of_bad_latents_never_survives(self):
    assert _prune([5.0, -7.0, 6.0, -9.0], [False, True, False, True]) == ([1, 3], [-7.0, -9.0])

  def test_the_best_fills_the_beams(self):
    assert _prune([np.nan, -3.0, np.inf, np.nan], top_k=3) == ([1, 1, 1], [-3.0] * 3)
    assert _prune([1.0, np.nan, 4.0, np.nan], top_k=4) == ([2, 0, 2, 2], [4.0, 1.0, 4.0, 4.0])

  def test_all_candidates_survive(self):
    assert _prune([1.0, 2.0, 0.0], top_k=3)[0] == [1, 0, 2]


def _history(shorts, longs, search):
  history = empty_history(search)
  for short, long in zip(shorts, longs, strict=True):
    history = extend_history(history, jnp.float32(short), jnp.float32(long))
  return history


def _flags(short, long, history, search):
  flags = route_flags(jnp.float32(short), jnp.float32(long), history, search)
  return bool(flags.ema), bool(flags.append)


class TestFlags:
  """Past image scores 1 and 2, so the baseline is 1.5; last video score 4. Thresholds 0.25 and 0.5."""

  SEARCH = SearchConfig(short_threshold=0.25, long_threshold=0.5, sliding_window=4)

  @pytest.mark.parametrize(
    ("short", "long", "ema", "append"),
    [
      (2.0, 4.0, True, False),  # up, no drop
      (2.0, 3.0, False, True),  # up, drop
      (1.0, 3.0, False, False),  # drop alone
      (1.0, 4.0, False, False),  # neither
      (2.0, 9.0, True, False),  # up, and the window became better
      (1.75, 4.0, False, False),  # up by the threshold is not enough
      (2.0, 3.5, True, False),  # a drop by the threshold is none
    ],
  )
  @pytest.mark.parametrize("baseline", ["history", "window"])
  def test_truth_table(self, baseline, short, long, ema, append):
    search = SearchConfig(short_threshold=0.25, long_threshold=0.5, sliding_window=4, short_baseline=baseline)
    history = _history([1.0, 2.0], [-5.0, 4.0], search)
    assert _flags(short, long, history, search) == (ema, append)

  def test_first_chunk_gets_none(self):
    for long in (-100.0, 100.0):
      assert _flags(100.0, long, empty_history(self.SEARCH), self.SEARCH) == (False, False)

  def test_history_of_one_chunk_window(self):
    search = SearchConfig(sliding_window=1)
    history = _history([1.0, 5.0], [0.0, 0.0], search)
    assert history.recent.shape == (1,)  # Not empty, so that it can be saved; nothing reads it.
    assert _flags(3.5, 0.0, history, search) == (True, False)
    assert _flags(2.5, 0.0, history, search) == (False, False)

  @pytest.mark.parametrize("baseline", ["history", "window"])
  @pytest.mark.parametrize("window", [2, 4, 30])
  def test_random_lineage(self, baseline, window):
    """Against a loop over plain lists."""
    search = SearchConfig(sliding_window=window, short_baseline=baseline, short_threshold=0.1, long_threshold=0.2)
    generator = np.random.default_rng(window)
    short, long = generator.standard_normal((2, 25)).astype(np.float32)
    step = jax.jit(lambda s, l, h: (route_flags(s, l, h, search), extend_history(h, s, l)))
    history, seen = empty_history(search), set()
    for chunk in range(25):
      past = [float(x) for x in short[:chunk]]
      past = past if baseline == "history" else past[-(window - 1) :]
      up = chunk > 0 and float(short[chunk]) - sum(past) / len(past) > 0.1
      drop = chunk > 0 and float(long[chunk - 1]) - float(long[chunk]) > 0.2
      flags, history = step(short[chunk], long[chunk], history)
      assert (bool(flags.ema), bool(flags.append)) == (up and not drop, up and drop), chunk
      seen.add((up, drop))
    assert len(seen) == 4

  def test_baselines_differ_once_the_window_has_moved(self):
    """Old scores of 10 weigh on the history, not on a window that has left them behind."""
    shorts, longs = [10.0, 10.0, 0.0, 0.0], [0.0] * 4
    for baseline, expected in (("history", (False, False)), ("window", (True, False))):
      search = SearchConfig(sliding_window=3, short_baseline=baseline)
      assert _flags(1.0, 0.0, _history(shorts, longs, search), search) == expected

  def test_history_is_a_record(self):
    history = _history([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], SearchConfig(sliding_window=3))
    assert isinstance(history, ScoreHistory)
    np.testing.assert_array_equal(history.recent, [3.0, 4.0])
    assert (float(history.short_sum), int(history.count), float(history.long)) == (10.0, 4, 8.0)
