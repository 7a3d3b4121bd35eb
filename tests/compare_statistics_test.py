"""The statistics of comparisons: against enumeration, simulation and formulas by hand."""

import itertools

import numpy as np
import pytest

from streamt1_jax.evaluation import decisions
from streamt1_jax.evaluation.compare import statistics

_RNG = np.random.default_rng


def test_differences_are_paired():
  """Both methods pass half of the prompts; on which ones decides the interval of the difference."""
  passed = np.arange(100) < 50
  found = [statistics.interval(passed * 1.0 - other, range(100)) for other in (passed, ~passed)]
  assert found[0] == {"mean": 0.0, "low": 0.0, "high": 0.0}
  # Differences of 1 and -1: the mean of 100 has the standard deviation 0.1.
  assert found[1]["mean"] == 0.0
  np.testing.assert_allclose([found[1]["low"], found[1]["high"]], [-0.196, 0.196], atol=0.03)


def test_interval_of_a_share():
  """p = .25, n = 400: plus and minus 1.96 sqrt(p (1 - p) / n) = .0424."""
  found = statistics.interval(np.repeat([1.0, 0.0], [100, 300]), range(400))
  assert found["mean"] == 0.25
  np.testing.assert_allclose([found["low"], found["high"]], [0.2076, 0.2924], atol=0.006)


def test_prompts_of_one_caption_are_not_independent():
  """Each of 400 verdicts four times over is worth 400, not 1600."""
  once = statistics.interval(np.repeat([1.0, 0.0], [100, 300]), range(400))
  assert statistics.interval(np.repeat([1.0, 0.0], [400, 1200]), np.repeat(range(400), 4)) == once


def test_captions_count_by_their_cases():
  """The mean is over cases, so a caption with three of them weighs three times."""
  assert statistics.interval(np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"])["mean"] == 0.75


def test_simultaneous_intervals_are_wider_and_hold_together():
  """Five independent columns: the largest |t| of five exceeds 2.57 in 5 %, one alone 1.96."""
  values = _RNG(0).standard_normal((300, 5))
  together = statistics.simultaneous(values, range(300))
  width = np.array([found["high"] - found["low"] for found in together]) / 2
  np.testing.assert_allclose(width, 2.57 / np.sqrt(300) * values.std(axis=0), rtol=0.05)
  assert [found["mean"] for found in together] == pytest.approx(values.mean(axis=0), abs=1e-4)
  (alone,) = statistics.simultaneous(values[:, :1], range(300))
  single = statistics.interval(values[:, 0], range(300))
  assert alone["high"] == pytest.approx(single["high"], abs=0.01)
  constant = statistics.simultaneous(np.stack([values[:, 0], np.ones(300)], axis=1), range(300))
  assert constant[1] == {"mean": 1.0, "low": 1.0, "high": 1.0}
  assert constant[0] == alone


def test_ratio_of_means():
  """A half of each denominator, so every resample has the same ratio; and none where the denominator may be 0."""
  denominator = np.arange(1.0, 51.0)
  found = statistics.ratio_interval(denominator / 2, denominator, range(50))
  assert found == {"mean": 0.5, "low": 0.5, "high": 0.5}
  assert statistics.ratio_interval(np.ones(50), np.zeros(50), range(50)) is None
  assert statistics.ratio_interval(np.ones(50), np.eye(50)[0], range(50)) is None


@pytest.mark.parametrize("scores", [[0.3, 0.1, 0.5, 0.2], [0.3, 0.3, 0.5, 0.3, 0.5], [1.0, 1.0, 1.0]])
def test_probabilities_of_picks_by_enumeration(scores):
  """All subsets of n, each equally probable; of equal scores in a subset each wins as often."""
  scores = np.array(scores)
  for n in range(1, len(scores) + 1):
    subsets = [np.array(subset) for subset in itertools.combinations(range(len(scores)), n)]
    won = np.zeros(len(scores))
    for subset in subsets:
      best = subset[scores[subset] == scores[subset].max()]
      won[best] += 1 / len(best) / len(subsets)
    np.testing.assert_allclose(statistics.pick_probabilities(scores, n), won, atol=1e-12)


def test_between_whole_numbers_it_is_interpolated():
  scores = np.array([0.3, 0.1, 0.5, 0.2])
  two, three = (statistics.pick_probabilities(scores, n) for n in (2, 3))
  np.testing.assert_allclose(statistics.pick_probabilities(scores, 2.25), 0.75 * two + 0.25 * three)


def test_a_score_that_is_not_finite_is_the_lowest():
  found = statistics.pick_probabilities(np.array([np.nan, 0.1, np.inf]), 2)
  np.testing.assert_allclose(found, [1 / 6, 2 / 3, 1 / 6])
  np.testing.assert_allclose(statistics.pick_probabilities(np.array([np.nan, 0.1, np.nan]), 3), [0, 1, 0])


@pytest.mark.parametrize("n", [0.5, 4.5])
def test_more_than_the_pool_or_less_than_one_is_refused(n):
  with pytest.raises(ValueError, match=r"1\.\.4"):
    statistics.pick_probabilities(np.arange(4.0), n)


def test_wins_ties_and_losses_by_hand():
  """The first passes; the second in three of four."""
  sure, often = (np.array([1.0]), np.array([1.0])), (np.array([1.0, 0.0]), np.array([0.75, 0.25]))
  assert statistics.decided(sure, often) == (0.25, 0.75, 0.0)
  assert statistics.decided(often, sure) == (0.0, 0.75, 0.25)
  assert statistics.decided(often, often) == (0.1875, 0.625, 0.1875)


def test_order():
  scores = np.array([0.1, 0.4, 0.2, 0.3])
  assert decisions.same_order(scores, 2 * scores) == 1.0
  assert decisions.same_order(scores, -scores) == 0.0
  # One of six pairs changes places: the last two.
  assert decisions.same_order(scores, np.array([0.1, 0.4, 0.3, 0.2])) == pytest.approx(5 / 6)


def test_shares_of_decisions():
  decision = lambda survivors, short: decisions.Decision(np.array(survivors), np.array(short))
  whole = decision([2, 1], [0.0, 0.5, 1.0])
  decided = [[whole, decision([1, 2], [0.0, 1.0, 0.5])], [whole, decision([2, 0], [0.0, 0.5, 1.0])]]
  found = decisions.agreement(decided, [12, 1])
  assert found[12] == {"chunks": 2, "same_best": 1.0, "same_survivors": 1.0, "same_order": 1.0}
  assert found[1] == {"chunks": 2, "same_best": 0.5, "same_survivors": 0.5, "same_order": round(5 / 6, 3)}
