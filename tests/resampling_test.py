"""Draws by weight: how often each is drawn, and what no weight, one weight and no number do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.policies import resampling

WEIGHT = np.array([0.1, 0.0, 0.45, 0.2, 0.25], np.float32)
LOG_WEIGHT = jnp.log(jnp.asarray(WEIGHT)) + 3.0
KEYS = jax.random.split(jax.random.key(7), 10_000)
# The 99.9th percentile of chi square, by degrees of freedom.
_RARE = {3: 16.27, 11: 31.26}


def _counts(draws, size):
  return np.stack([np.bincount(draw, minlength=size) for draw in np.asarray(draws)])


class TestSize(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_of_normalised_weights(self):
    np.testing.assert_allclose(jnp.exp(self.variant(resampling.log_normalise)(LOG_WEIGHT)), WEIGHT, rtol=1e-6)
    size = self.variant(resampling.effective_size)
    np.testing.assert_allclose(size(LOG_WEIGHT), 1 / (WEIGHT**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(size(jnp.array([-jnp.inf, -900.0, -jnp.inf])), 1.0, rtol=1e-6)
    np.testing.assert_allclose(size(jnp.full(4, 1e4)), 4.0, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_without_any_weight(self):
    np.testing.assert_allclose(self.variant(resampling.effective_size)(jnp.full(4, -jnp.inf)), 4.0, rtol=1e-6)


class TestSystematic:
  def test_counts(self):
    """Each is drawn floor or ceil of what it should be, and over many keys as often as it should be."""
    draws = jax.vmap(lambda key: resampling.systematic(key, LOG_WEIGHT, 12))(KEYS)
    assert (np.diff(draws, axis=1) >= 0).all()
    counts, expected = _counts(draws, 5), 12 * WEIGHT
    assert ((counts == np.floor(expected)) | (counts == np.ceil(expected))).all()
    # A count is floor or floor + 1, a Bernoulli draw: its mean over 10,000 keys has a deviation of at most .005.
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.02)
    assert not counts[:, 1].any()

  def test_equal_weights_are_drawn_once_each(self):
    draws = jax.vmap(lambda key: resampling.systematic(key, jnp.full(7, -50.0), 7))(KEYS[:500])
    np.testing.assert_array_equal(draws, np.tile(np.arange(7), (500, 1)))

  @pytest.mark.parametrize("place", [0, 3, 6])
  def test_one_that_has_all(self, place):
    log_weight = jnp.full(7, -jnp.inf).at[place].set(-3e4)
    draws = jax.vmap(lambda key: resampling.systematic(key, log_weight, 4))(KEYS[:200])
    assert (np.asarray(draws) == place).all()

  def test_without_any_weight(self):
    np.testing.assert_array_equal(resampling.systematic(KEYS[0], jnp.full(3, -jnp.inf), 3), [0, 1, 2])

  def test_what_has_no_weight_is_never_drawn(self):
    """Weights of many sizes, every third of them 0: sums round, and no draw may fall into a gap."""
    spread = jax.random.normal(jax.random.key(1), (1000,)) * 8
    log_weight = jnp.where(jnp.arange(1000) % 3 == 0, -jnp.inf, spread)
    draws = jax.vmap(lambda key: resampling.systematic(key, log_weight, 1000))(KEYS[:200])
    assert (np.asarray(draws) % 3 != 0).all()


class TestGumbelTopK:
  def _draw(self, scores, usable, count, temperature=0.5, keys=KEYS):
    draw = lambda key: resampling.gumbel_top_k(key, jnp.asarray(scores), jnp.asarray(usable), temperature, count)
    return np.asarray(jax.vmap(draw)(keys))

  def test_probabilities_without_replacement(self):
    """Two of four, by hand: P(i, j) = p_i p_j / (1 - p_i), with p ~ exp(score / temperature)."""
    scores = np.array([0.0, 0.3, -0.2, 0.6], np.float32)
    p = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
    draws = self._draw(scores, [True] * 4, 2)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    found = np.array([((draws == pair).all(axis=1)).sum() for pair in pairs])
    expected = np.array([p[i] * p[j] / (1 - p[i]) for i, j in pairs]) * len(draws)
    assert found.sum() == len(draws)
    assert ((found - expected) ** 2 / expected).sum() < _RARE[11]

  def test_single_draw_is_a_softmax(self):
    draws = self._draw([0.0, 0.3, -0.2, 0.6], [True] * 4, 1)[:, 0]
    p = np.exp(np.array([0.0, 0.3, -0.2, 0.6]) / 0.5)
    expected = p / p.sum() * len(draws)
    assert ((np.bincount(draws, minlength=4) - expected) ** 2 / expected).sum() < _RARE[3]

  def test_without_temperature_it_is_the_best(self):
    draws = self._draw([1.0, 3.0, 2.0, 3.0], [True] * 4, 3, temperature=0.0, keys=KEYS[:20])
    np.testing.assert_array_equal(draws, [[1, 3, 2]] * 20)

  def test_what_is_not_usable(self):
    draws = self._draw([9.0, float("nan"), 1.0, float("inf")], [False, False, True, False], 2, keys=KEYS[:20])
    np.testing.assert_array_equal(draws, [[2, 2]] * 20)


class TestRanks(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    scores, usable = jnp.array([5.0, 1.0, 5.0, jnp.nan, 7.0, 0.0]), jnp.array([True, True, True, False, True, False])
    ranks = self.variant(resampling.ranks)(scores, usable)
    np.testing.assert_array_equal(ranks, [1.5, 0.0, 1.5, -np.inf, 3.0, -np.inf])

  @chex.variants(with_jit=True, without_jit=True)
  def test_candidates_in_another_order(self):
    scores, usable = jax.random.normal(KEYS[0], (9,)), jnp.arange(9) != 4
    order = jax.random.permutation(KEYS[1], 9)
    ranks = self.variant(resampling.ranks)
    np.testing.assert_array_equal(ranks(scores[order], usable[order]), ranks(scores, usable)[order])
