"""The schedule's tables, against fractions and the float format itself."""

import math
import struct
from fractions import Fraction

import numpy as np

from streamt1_jax.backbone import schedule
from streamt1_jax.config import ScheduleConfig

CONFIG = ScheduleConfig()
"""1000 training timesteps, shift 5, steps 1000, 750, 500 and 250."""


def _sigma(index: int, shift: int = 5) -> Fraction:
  s = 1 - Fraction(index, 1000)
  return shift * s / (1 + (shift - 1) * s)


def _in_float32(number: float) -> float:
  return struct.unpack("f", struct.pack("f", number))[0]


def test_sigmas():
  """Index 0 is pure noise; 5 * 0.75 / 4 = 15/16, 5 * 0.5 / 3 = 5/6, 5 * 0.25 / 2 = 5/8."""
  table = schedule.sigma_table(CONFIG)
  # The last ones are what is left of 1: they are as exact as 1 is.
  np.testing.assert_allclose(table, [float(_sigma(index)) for index in range(1000)], rtol=1e-15, atol=1e-15)
  tables = schedule.denoising_schedule(CONFIG, 8)
  np.testing.assert_allclose(tables.sigmas, [1, 15 / 16, 5 / 6, 5 / 8], rtol=1e-15)
  np.testing.assert_allclose(schedule.sigma_table(ScheduleConfig(shift=1.0))[[0, 250]], [1, 0.75], rtol=1e-15)


def test_timesteps_are_rounded_to_float32():
  """1000 * 5/6 = 833.33 has no end in binary: 24 bits of it are kept, and the sinusoids are those of what is kept."""
  tables = schedule.denoising_schedule(CONFIG, 8)
  expected = [_in_float32(1000 * float(sigma)) for sigma in map(_sigma, (0, 250, 500, 750))]
  assert expected[2] != 1000 * float(_sigma(500))
  assert tables.timesteps.tolist() == expected
  angles = [[t * 10.0**-power for power in range(4)] for t in expected]
  features = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
  # A quarter of a unit in the last place of 1: the timestep that is not rounded differs by 30 times as much.
  np.testing.assert_allclose(tables.features, features, rtol=0, atol=6.1e-8)
  assert abs(math.cos(1000 * float(_sigma(500))) - features[2][0]) > 1e-6


def test_sinusoids_by_hand():
  """w = 1, 1/10, 1/100, 1/1000 for 8 numbers; the clean pass is at timestep 0."""
  features = schedule.time_features(np.array([0.0, 10.0]), 8)
  assert features.dtype == np.float32
  np.testing.assert_array_equal(features[0], [1, 1, 1, 1, 0, 0, 0, 0])
  np.testing.assert_allclose(features[1, [1, 5]], [0.5403023, 0.8414710], rtol=0, atol=1e-7)
  np.testing.assert_array_equal(schedule.denoising_schedule(CONFIG, 8).context_features, features[0])
  later = ScheduleConfig(context_timestep=10.0)
  np.testing.assert_array_equal(schedule.denoising_schedule(later, 8).context_features, features[1])
