"""What is measured of previews, by hand and on numbers that a preview knows or does not know."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.evaluation import previews
from streamt1_jax.noise_propagation import NoiseDraws
from streamt1_jax.state import Condition
from tests import toy_generator as toy


@pytest.mark.parametrize(
  ("a", "b", "expected"),
  [
    ([1.0, 2.0, 3.0, 4.0], [10.0, 11.0, 12.0, 99.0], 1.0),
    ([1.0, 2.0, 3.0, 4.0], [0.0, -1.0, -2.0, -3.0], -1.0),
    # Differences of places 0, 1, 1, 2: 1 - 6 * 6 / (4 * 15).
    ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 4.0, 2.0], 0.4),
    # Places 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5).
    ([1.0, 2.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0], 4.5 / (4.5 * 5) ** 0.5),
    ([1.0, 1.0], [1.0, 2.0], 0.0),
  ],
)
def test_rank_correlation(a, b, expected):
  assert previews.rank_correlation(np.array(a), np.array(b)) == pytest.approx(expected)


def test_agreement_by_hand():
  """The best of the first chunk, 8, is kept by half and not by the quarter; that of the second is rejected by both."""
  first = previews.Look({"hybrid": np.array([8.0, 0.0, 4.0, 0.0])}, {"light": np.array([[2.0, 1.0, 3.0, 0.0]])}, {}, {})
  second = first._replace(previews={"light": np.array([[0.0, 1.0, 3.0, 2.0]])})
  found = previews.agreement([first, second], "light", 0)
  # The mean candidate has 3. Kept are 8 and 4 by half, 4 and 4 by the quarter; at best 8 and 8.
  assert found["best_rejected_half"] == 0.5
  assert found["best_rejected_quarter"] == 1.0
  assert found["gain_kept_half"] == pytest.approx((5 + 1) / 10)
  assert found["gain_kept_quarter"] == pytest.approx((1 + 1) / 10)


def _draw(seed):
  """Both parts depend on the seed: whole numbers at the start, and eighths between the steps."""
  return NoiseDraws(jnp.full(toy.SHAPE, seed * 5 % 13, jnp.float32), jnp.full((1, *toy.SHAPE), seed % 8 / 8))


def test_looks():
  """A chunk is last + (last + noise + noise between) / 2; the first step knows the first noise alone."""
  models = dataclasses.replace(toy.MODELS, draw_noise=_draw)
  condition = Condition((), (), (), jnp.int32(3))
  last = 0.0
  for chunk, look in enumerate(previews.look(toy.PARAMS, condition, models, candidates=8, chunks=3, seed=200)):
    seeds = 200 + 1000 * chunk + np.arange(8)
    start, between = seeds * 5 % 13, seeds % 8 / 8
    short = last + (last + start + between) / 2
    np.testing.assert_allclose(look.final["short"], short, rtol=1e-6)
    np.testing.assert_allclose(look.same_start["short"], last + (last + start[0] + between) / 2, rtol=1e-6)
    np.testing.assert_allclose(look.same_between["short"], last + (last + start + between[0]) / 2, rtol=1e-6)
    for name in (previews.LIGHT, previews.LARGE):
      np.testing.assert_allclose(look.previews[name], [last + start, short], rtol=1e-6)
    np.testing.assert_allclose(look.previews[previews.FULL][1], look.final["hybrid"], rtol=1e-6)
    last = short.max()
