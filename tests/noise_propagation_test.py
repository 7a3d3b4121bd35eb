"""Noise fusion and the seed rule."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from streamt1_jax.noise_propagation import candidate_seeds, fuse_noise, gaussian_noise

SIGMA = -0.1
SHAPE = (3, 16, 64, 64)  # 196,608 numbers: their variance is known to about 0.003


def _seeds(parents, chunk, beam_size, first_candidate, base=42, transform=jax.jit):
  rule = functools.partial(candidate_seeds, beam_size=beam_size, first_candidate=first_candidate)
  return transform(rule)(jnp.int32(base), jnp.asarray(parents, jnp.int32), jnp.int32(chunk))


class TestSeeds(chex.TestCase):
  """K = 2, B = 3, base seed 42."""

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    ([0, 0], 0, "reuse", [[42, 43, 44], [45, 46, 47]]),
    ([0, 0], 0, "fresh", [[42, 43, 44], [45, 46, 47]]),
    ([44, 45], 1, "reuse", [[44, 1043, 1044], [45, 1143, 1144]]),
    ([6143, 42], 7, "reuse", [[6143, 7043, 7044], [42, 7143, 7144]]),
    ([44, 45], 1, "fresh", [[1042, 1043, 1044], [1142, 1143, 1144]]),
    ([44, 45], 7, "fresh", [[7042, 7043, 7044], [7142, 7143, 7144]]),
  )
  def test_by_hand(self, parents, chunk, first_candidate, expected):
    seeds = _seeds(parents, chunk, 3, first_candidate, transform=self.variant)
    chex.assert_trees_all_equal(np.asarray(seeds), np.array(expected, np.int32), strict=True)

  def test_prompts_under_vmap(self):
    """Every prompt has a base seed and parents of its own; the chunk is the same."""
    rule = functools.partial(candidate_seeds, beam_size=3, first_candidate="reuse")
    parents = jnp.array([[44, 45], [1, 2]], jnp.int32)
    seeds = jax.jit(jax.vmap(rule, in_axes=(0, 0, None)))(jnp.array([42, 0], jnp.int32), parents, jnp.int32(1))
    expected = [[[44, 1043, 1044], [45, 1143, 1144]], [[1, 1001, 1002], [2, 1101, 1102]]]
    np.testing.assert_array_equal(seeds, expected)

  def test_one_trace_for_all_chunks(self):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(candidate_seeds, n=1)
    rule = jax.jit(functools.partial(counted, beam_size=2, first_candidate="fresh"))
    for chunk in range(3):
      rule(jnp.int32(chunk), jnp.zeros(2, jnp.int32), jnp.int32(chunk))

  def test_fresh_seeds_are_distinct_at_the_largest_search(self):
    seeds = [_seeds([0] * 10, chunk, 100, "fresh") for chunk in range(4)]
    assert np.unique(seeds).size == 4 * 10 * 100


class TestDraws(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_equal_seeds_equal_noise(self):
    draw = self.variant(gaussian_noise((3, 2, 4, 4), 4))
    first, again, other = draw(jnp.int32(7)), draw(jnp.int32(7)), draw(jnp.int32(8))
    chex.assert_trees_all_equal(first, again)
    assert all(np.abs(x - y).max() > 0.1 for x, y in zip(first, other, strict=True))

  @chex.variants(with_jit=True, without_jit=True)
  def test_candidates_under_vmap(self):
    draw = gaussian_noise((3, 2, 4, 5), 4)
    together = self.variant(jax.vmap(draw))(jnp.array([5, 6, 5]))
    chex.assert_tree_shape_prefix(together, (3,))
    for index, seed in enumerate((5, 6, 5)):
      alone = self.variant(draw)(jnp.int32(seed))
      chex.assert_trees_all_equal(jax.tree.map(lambda x, i=index: x[i], together), alone)

  def test_shapes(self):
    draws = jax.eval_shape(gaussian_noise((3, 2, 4, 5), 4), jnp.int32(0))
    assert draws.fresh.shape == (3, 2, 4, 5)
    assert draws.renoise.shape == (3, 3, 2, 4, 5)

  def test_all_draws_of_a_candidate_are_independent_and_normal(self):
    draws = gaussian_noise(SHAPE, 3)(jnp.int32(0))
    rows = np.concatenate([draws.fresh[None], draws.renoise]).reshape(3, -1)
    np.testing.assert_allclose(np.cov(rows), np.eye(3), atol=0.015)
    np.testing.assert_allclose((rows**4).mean(axis=1), 3.0, atol=0.15)


class TestFusion(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    ([2.0, -1.0], [1.0, 5.0], 0.6, [2.0, 3.4]),
    ([9.0, 9.0], [0.25, 1.0], 0.0, [0.25, 1.0]),  # Forgets the parent.
  )
  def test_by_hand(self, parent, fresh, sigma, expected):
    fuse = self.variant(functools.partial(fuse_noise, sigma=sigma))
    np.testing.assert_allclose(fuse(jnp.array(parent), jnp.array(fresh)), expected, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_candidates_under_vmap(self):
    """Candidates share their parent's noise."""
    fuse = functools.partial(fuse_noise, sigma=0.6)
    fused = self.variant(jax.vmap(fuse, in_axes=(None, 0)))(jnp.array([2.0, -1.0]), jnp.array([[1.0, 5.0], [0.0, 0.0]]))
    np.testing.assert_allclose(fused, [[2.0, 3.4], [1.2, -0.6]], rtol=1e-6)

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
