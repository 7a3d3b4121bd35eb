"""Noise fusion and the seed rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.noise_propagation import candidate_seeds, fuse_noise, gaussian_noise

SIGMA = -0.1
SHAPE = (3, 16, 64, 64)  # 196,608 numbers: their variance is known to about 0.003


def _seeds(parents, chunk, beam_size, first_candidate, base=42):
  return candidate_seeds(
    jnp.int32(base),
    jnp.asarray(parents, jnp.int32),
    jnp.int32(chunk),
    beam_size=beam_size,
    first_candidate=first_candidate,
  )


class TestSeeds:
  """K = 2, B = 3, base seed 42."""

  @pytest.mark.parametrize("first_candidate", ["reuse", "fresh"])
  def test_first_chunk(self, first_candidate):
    np.testing.assert_array_equal(_seeds([0, 0], 0, 3, first_candidate), [[42, 43, 44], [45, 46, 47]])

  @pytest.mark.parametrize(
    ("chunk", "parents", "expected"),
    [
      (1, [44, 45], [[44, 1043, 1044], [45, 1143, 1144]]),
      (7, [6143, 42], [[6143, 7043, 7044], [42, 7143, 7144]]),
    ],
  )
  def test_reuse(self, chunk, parents, expected):
    np.testing.assert_array_equal(_seeds(parents, chunk, 3, "reuse"), expected)

  @pytest.mark.parametrize(
    ("chunk", "expected"),
    [(1, [[1042, 1043, 1044], [1142, 1143, 1144]]), (7, [[7042, 7043, 7044], [7142, 7143, 7144]])],
  )
  def test_fresh(self, chunk, expected):
    np.testing.assert_array_equal(_seeds([44, 45], chunk, 3, "fresh"), expected)

  def test_fresh_seeds_are_distinct_at_the_largest_search(self):
    seeds = [_seeds([0] * 10, chunk, 100, "fresh") for chunk in range(4)]
    assert np.unique(seeds).size == 4 * 10 * 100

  def test_dtype(self):
    assert _seeds([1], 3, 2, "reuse").dtype == jnp.int32


class TestDraws:
  def test_equal_seeds_equal_noise(self):
    draw = jax.jit(gaussian_noise((3, 2, 4, 4), 4))
    first, again, other = draw(jnp.int32(7)), draw(jnp.int32(7)), draw(jnp.int32(8))
    for name in ("fresh", "renoise"):
      np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
      assert np.abs(getattr(first, name) - getattr(other, name)).max() > 0.1

  def test_equal_seeds_equal_noise_under_vmap(self):
    draw = gaussian_noise((3, 2, 4, 4), 2)
    np.testing.assert_array_equal(jax.vmap(draw)(jnp.array([5, 6, 5])).fresh[2], draw(jnp.int32(5)).fresh)

  def test_shapes(self):
    draws = gaussian_noise((3, 2, 4, 5), 4)(jnp.int32(0))
    assert draws.fresh.shape == (3, 2, 4, 5)
    assert draws.renoise.shape == (3, 3, 2, 4, 5)

  def test_all_draws_of_a_candidate_are_independent_and_normal(self):
    draws = gaussian_noise(SHAPE, 3)(jnp.int32(0))
    rows = np.concatenate([draws.fresh[None], draws.renoise]).reshape(3, -1)
    np.testing.assert_allclose(np.cov(rows), np.eye(3), atol=0.015)
    np.testing.assert_allclose((rows**4).mean(axis=1), 3.0, atol=0.15)


class TestFusion:
  def test_by_hand(self):
    np.testing.assert_allclose(fuse_noise(jnp.array([2.0, -1.0]), jnp.array([1.0, 5.0]), 0.6), [2.0, 3.4], rtol=1e-6)

  def test_zero_sigma_forgets_the_parent(self):
    np.testing.assert_array_equal(fuse_noise(jnp.array([9.0]), jnp.array([0.25]), 0.0), [0.25])

  def _lineage(self, first_candidate, chunks=6):
    """Fused noise of a lineage in which candidate 0 wins every chunk."""
    draw = gaussian_noise(SHAPE, 1)
    seed, noise, fused = jnp.int32(0), None, []
    for chunk in range(chunks):
      seed = _seeds([seed], chunk, 2, first_candidate, base=0)[0, 0]
      fresh = draw(seed).fresh
      noise = fresh if noise is None else fuse_noise(noise, fresh, SIGMA)
      fused.append(np.asarray(noise, np.float64))
    return fused

  def test_independent_draws_keep_unit_variance(self):
    fused = self._lineage("fresh")
    np.testing.assert_allclose([x.var() for x in fused], 1.0, atol=0.015)
    # Neighbours on a lineage are correlated by sigma, second neighbours by its square.
    np.testing.assert_allclose(np.mean(fused[2] * fused[3]), SIGMA, atol=0.01)
    np.testing.assert_allclose(np.mean(fused[2] * fused[4]), SIGMA**2, atol=0.01)

  def test_reused_seed_shrinks_the_noise(self):
    """Parent and fresh noise are one array e: c' = sigma c + sqrt(1 - sigma^2), so c = 0.895, 0.905, ... 0.9045."""
    fused = self._lineage("reuse")
    np.testing.assert_allclose(fused[1].var(), (SIGMA + 0.99**0.5) ** 2, atol=0.01)
    np.testing.assert_allclose([x.var() for x in fused[2:]], 0.99 / (1 - SIGMA) ** 2, atol=0.01)
    np.testing.assert_allclose([x.std() for x in fused[1:]], 0.90, atol=0.01)
