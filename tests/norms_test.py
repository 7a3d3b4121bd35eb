"""Norms in bfloat16: they compute in float32 and round where they say."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from streamt1_jax.nn.norms import RMSNorm, layer_norm

EPS = 1e-6


def _inputs() -> np.ndarray:
  """Rows far from zero: their mean and their squares do not fit into eight bits."""
  numbers = np.random.default_rng(0).normal(3.0, 1.0, (32, 64))
  return numbers.astype(ml_dtypes.bfloat16)


def _round(x: np.ndarray) -> np.ndarray:
  return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def _assert_same_bits(found, expected: np.ndarray) -> None:
  """But for a number in a thousand, where float32 and float64 lie on two sides of a tie."""
  assert found.dtype == jnp.bfloat16
  assert (np.asarray(found, np.float64) == expected).mean() >= 0.999


def test_layer_norm():
  x = _inputs().astype(np.float64)
  centered = x - x.mean(axis=1, keepdims=True)
  expected = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + EPS)
  _assert_same_bits(layer_norm(jnp.asarray(_inputs()), EPS), _round(expected))


def test_rms_norm():
  """Rounded before the scale, and once more after it."""
  x, scale = _inputs().astype(np.float64), np.linspace(0.5, 1.5, 64).astype(ml_dtypes.bfloat16)
  norm = RMSNorm(64, EPS)
  norm.scale = nnx.Param(jnp.asarray(scale))
  unit = _round(x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS))
  _assert_same_bits(norm(jnp.asarray(_inputs())), _round(unit * scale.astype(np.float64)))


def test_epsilon():
  """Mean square 1 beside an epsilon of 3: halves."""
  signs = jnp.array([[1.0, -1.0]])
  np.testing.assert_array_equal(layer_norm(signs, 3.0), signs / 2)
  np.testing.assert_array_equal(RMSNorm(2, 3.0)(signs), signs / 2)
