"""Samplers: the released one by hand, and another one that needs no more than a function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig
from streamt1_jax.sampling import SAMPLERS, renoise
from streamt1_jax.state import Condition
from tests import toy_generator as toy


def test_renoise_by_hand():
  """(1 - 1/4) 8 + 1/4 * -4 = 5, whatever the input was; and after the last step x0 itself."""
  value = lambda x: jnp.full((1, 2, 1, 1), x)
  assert SAMPLERS["renoise"] is renoise
  np.testing.assert_array_equal(renoise(value(100.0), value(8.0), value(-4.0), 0.5, 0.25), value(5.0))
  np.testing.assert_array_equal(renoise(value(100.0), value(8.0), value(0.0), 0.25, 0.0), value(8.0))


def euler(x, x0, noise, sigma, next_sigma):
  """x' = x0 + (sigma' / sigma) (x - x0): a step along the flow, without fresh noise."""
  return x0 + next_sigma / sigma * (x - x0)


def test_another_sampler():
  """x0 = last + x, so from 1 to 1/2 x becomes x + last / 2, and a chunk is 1.5 last + noise."""
  search = SearchConfig(beam_size=1, top_k=1, noise_sigma=0.0, first_candidate="fresh")
  models, condition = dataclasses.replace(toy.MODELS, sampler=euler), Condition((), (), (), jnp.int32(3))
  traces = drivers.stream(toy.PARAMS, condition, models, search, num_chunks=3, seed=2)
  # Seeds 2, 1002 and 2002 leave 2, 1 and 0.
  assert [float(jax.device_get(trace.latents).item()) for trace in traces] == [2.0, 4.0, 6.0]
