"""Finite or not, by the bits: every number of 16 bits, and those at the edges of the wider types."""

import ml_dtypes
import numpy as np
import pytest

from streamt1_jax.io.finite import is_finite


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_number_of_16_bits(dtype):
  numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
  found = [is_finite(numbers[i : i + 1]) for i in range(len(numbers))]
  np.testing.assert_array_equal(found, np.isfinite(numbers))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_one_among_many(dtype):
  values = np.random.default_rng(0).standard_normal((30, 7)).astype(dtype)
  values[0, :4] = [ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 0.0, -0.0]
  assert is_finite(values)
  for bad in (np.nan, -np.nan, np.inf, -np.inf):
    for at in ((0, 0), (17, 3), (29, 6)):
      changed = values.copy()
      changed[at] = bad
      assert not is_finite(changed)
      assert is_finite(changed[1:17, 1::2])  # A view that holds none of them.


def test_integers_scalars_and_nothing():
  assert is_finite(np.array([-1, 2**31 - 1, -(2**31)], np.int32))
  assert is_finite(np.zeros((0, 3), np.float32))
  assert is_finite(np.array(1.0, np.float32))
  assert not is_finite(np.array(np.nan, np.float32))
