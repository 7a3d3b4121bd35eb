"""The fold over memory slots against one softmax over all keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.backbone.attention import MemoryView, attend, attend_with_memory

LAYERS, SLOTS, HEADS, TOKENS, WIDTH = 2, 5, 3, 7, 8
LAYER = 1


def _random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _inputs():
  q, k, v = (_random(seed, HEADS, TOKENS, WIDTH) for seed in range(3))
  cache_k, cache_v = (_random(seed, LAYERS, SLOTS, HEADS, TOKENS, WIDTH) for seed in (3, 4))
  return 3.0 * q, k, v, cache_k, cache_v  # Queries of this size make peaked distributions.


def _softmax_over_all(q, k, v, cache_k, cache_v, count):
  """float64 attention to the concatenation of the chunk's own keys and the first `count` slots."""
  q, k, v, cache_k, cache_v = (np.asarray(x, np.float64) for x in (q, k, v, cache_k, cache_v))
  k = np.concatenate([k, *cache_k[LAYER, :count]], axis=1)
  v = np.concatenate([v, *cache_v[LAYER, :count]], axis=1)
  weights = np.exp(np.einsum("aqd,akd->aqk", q, k) / WIDTH**0.5)
  return np.einsum("aqk,akd->aqd", weights / weights.sum(axis=-1, keepdims=True), v)


@jax.jit
def _attend(q, k, v, cache_k, cache_v, count, trip_count):
  return attend_with_memory(q, k, v, MemoryView(cache_k, cache_v, count, trip_count), jnp.int32(LAYER))


@pytest.mark.parametrize("count", range(SLOTS + 1))
def test_equals_one_softmax(count):
  inputs = _inputs()
  np.testing.assert_allclose(_attend(*inputs, count, count), _softmax_over_all(*inputs, count), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_longer_fold_changes_nothing(count):
  """Beams with fewer slots run as many trips as the fullest beam."""
  inputs = _inputs()
  np.testing.assert_array_equal(_attend(*inputs, count, SLOTS), _attend(*inputs, count, count))


@pytest.mark.parametrize("huge", [1e30, -1e30])
def test_invalid_slots_hold_anything(huge):
  q, k, v, cache_k, cache_v = _inputs()
  expected = _attend(q, k, v, cache_k, cache_v, 2, SLOTS)
  cache_k[:, 2:], cache_v[:, 2:] = huge, huge
  np.testing.assert_array_equal(_attend(q, k, v, cache_k, cache_v, 2, SLOTS), expected)


def test_slots_in_any_order():
  q, k, v, cache_k, cache_v = _inputs()
  order = np.array([3, 0, 4, 2, 1])
  shuffled = _attend(q, k, v, cache_k[:, order], cache_v[:, order], SLOTS, SLOTS)
  np.testing.assert_allclose(shuffled, _attend(q, k, v, cache_k, cache_v, SLOTS, SLOTS), rtol=0, atol=1e-6)


def test_large_logits_do_not_overflow():
  """The running peak moves far up and then stays, and then the other way round."""
  q, k, v, cache_k, cache_v = _inputs()
  cache_k[:, 1] *= 40.0
  expected = _softmax_over_all(q / 4, k, v, cache_k, cache_v, SLOTS)
  np.testing.assert_allclose(_attend(q / 4, k, v, cache_k, cache_v, SLOTS, SLOTS), expected, rtol=0, atol=1e-5)


def test_bfloat16():
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in _inputs()]
  out = _attend(*inputs, 4, SLOTS)
  assert out.dtype == jnp.bfloat16
  expected = _softmax_over_all(*inputs, 4)
  assert np.linalg.norm(np.asarray(out, np.float64) - expected) < 0.02 * np.linalg.norm(expected)


def test_candidates_share_the_slots():
  """Under vmap over queries the memory stays unbatched, and every candidate gets what it would get alone."""
  q, k, v, cache_k, cache_v = _inputs()
  q, k, v = (np.stack([x, _random(seed, *x.shape)]) for seed, x in zip((5, 6, 7), (q, k, v)))
  together = jax.vmap(_attend, in_axes=(0, 0, 0, None, None, None, None))(q, k, v, cache_k, cache_v, 3, 4)
  for candidate in range(2):
    alone = _attend(q[candidate], k[candidate], v[candidate], cache_k, cache_v, 3, 4)
    np.testing.assert_allclose(together[candidate], alone, rtol=0, atol=1e-6)


def test_beams_have_counts_of_their_own():
  q, k, v, cache_k, cache_v = _inputs()
  counts = jnp.array([1, 4, 0])
  attend_beam = functools.partial(_attend, q, k, v, cache_k, cache_v)
  together = jax.vmap(attend_beam, in_axes=(0, None))(counts, jnp.int32(4))
  for beam, count in enumerate((1, 4, 0)):
    expected = _softmax_over_all(q, k, v, cache_k, cache_v, count)
    np.testing.assert_allclose(together[beam], expected, rtol=0, atol=1e-6)


def test_attention_without_memory():
  """Cross-attention: as many keys as there are text tokens."""
  q, k, v = _random(0, HEADS, TOKENS, WIDTH), _random(1, HEADS, 4, WIDTH), _random(2, HEADS, 4, WIDTH)
  weights = np.exp(np.einsum("aqd,akd->aqk", q, k) / WIDTH**0.5)
  expected = np.einsum("aqk,akd->aqd", weights / weights.sum(axis=-1, keepdims=True), v)
  np.testing.assert_allclose(attend(q, k, v), expected, rtol=0, atol=1e-6)
