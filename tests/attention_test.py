"""All implementations of attention over memory slots, against one softmax over all keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.backbone.attention import MemoryView, attend, attend_with_memory
from streamt1_jax.nn import rotary

LAYERS, SLOTS, HEADS, TOKENS, WIDTH = 2, 5, 3, 7, 8
LAYER = 1
DISTANCES = np.array([9, 0, 237, -6, 3], np.int32)
"""Latent frames from each slot to the chunk. A chunk that is made anew under another prompt sees later ones, too."""

every = pytest.mark.parametrize("implementation", ["fold", "flash", "triton"])


def _random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _inputs():
  q, k, v = (_random(seed, TOKENS, HEADS, WIDTH) for seed in range(3))
  cache_k, cache_v = (_random(seed, LAYERS, SLOTS, HEADS, TOKENS, WIDTH) for seed in (3, 4))
  return 3.0 * q, k, v, cache_k, cache_v  # Queries of this size make peaked distributions.


def _moved_back(keys, frames):
  """Keys [..., D] (pairs as halves) turned by -frames; two pairs are time's, and space's stay."""
  half = keys.shape[-1] // 2
  angles = -frames * np.array([1.0, 10000.0**-0.5, 0.0, 0.0])
  turned = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(1j * angles)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def _softmax_over_all(q, k, v, cache_k, cache_v, count):
  """float64 attention to the concatenation of the chunk's own keys and the first `count` slots.

  A key that lies `DISTANCES` frames behind the chunk is turned back by as many: scores depend on differences.
  """
  q, k, v, cache_k, cache_v = (np.asarray(x, np.float64) for x in (q, k, v, cache_k, cache_v))
  slots = [_moved_back(keys, frames) for keys, frames in zip(cache_k[LAYER, :count], DISTANCES)]
  k = np.concatenate([k.swapaxes(0, 1), *slots], axis=1)
  v = np.concatenate([v.swapaxes(0, 1), *cache_v[LAYER, :count]], axis=1)
  logits = np.einsum("qad,akd->aqk", q, k) / WIDTH**0.5
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return np.einsum("aqk,akd->qad", weights / weights.sum(axis=-1, keepdims=True), v)


def _attend(implementation, q, k, v, cache_k, cache_v, count, order=None):
  turns = rotary.turns_of(
    rotary.frame_turns(WIDTH, 237), jnp.asarray(DISTANCES if order is None else DISTANCES[list(order)])
  )
  memory = MemoryView(cache_k, cache_v, jnp.asarray(count), turns)
  return attend_with_memory(q, k, v, memory, jnp.int32(LAYER), implementation)


_attend = jax.jit(_attend, static_argnums=0, static_argnames="order")


@every
@pytest.mark.parametrize("count", range(SLOTS + 1))
def test_equals_one_softmax(implementation, count):
  inputs = _inputs()
  out = _attend(implementation, *inputs, count)
  np.testing.assert_allclose(out, _softmax_over_all(*inputs, count), rtol=0, atol=1e-6)


@every
@pytest.mark.parametrize("huge", [1e30, -1e30])
def test_slots_that_are_not_valid_hold_anything(implementation, huge):
  """A beam with fewer slots visits as many as the fullest one."""
  q, k, v, cache_k, cache_v = _inputs()
  beams = jax.vmap(functools.partial(_attend, implementation), in_axes=(None, None, None, 0, 0, 0))
  run = lambda: beams(q, k, v, np.stack([cache_k] * 2), np.stack([cache_v] * 2), np.array([2, SLOTS]))[0]
  expected = run()
  np.testing.assert_allclose(expected, _softmax_over_all(q, k, v, cache_k, cache_v, 2), rtol=0, atol=1e-6)
  cache_k[:, 2:], cache_v[:, 2:] = huge, huge
  np.testing.assert_array_equal(run(), expected)


@every
def test_slots_in_any_order(implementation):
  q, k, v, cache_k, cache_v = _inputs()
  order = np.array([3, 0, 4, 2, 1])
  shuffled = _attend(implementation, q, k, v, cache_k[:, order], cache_v[:, order], SLOTS, order=tuple(order))
  expected = _attend(implementation, q, k, v, cache_k, cache_v, SLOTS)
  np.testing.assert_allclose(shuffled, expected, rtol=0, atol=1e-6)


@every
def test_large_logits_do_not_overflow(implementation):
  """The running peak moves far up and then stays: exp of these logits is infinite in float32."""
  q, k, v, cache_k, cache_v = _inputs()
  cache_k[:, 1] *= 40.0
  expected = _softmax_over_all(q, k, v, cache_k, cache_v, SLOTS)
  # Logits of some hundreds carry an error of 1e-5 in float32, and so do their exponentials.
  out = _attend(implementation, q, k, v, cache_k, cache_v, SLOTS)
  np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


@every
def test_bfloat16(implementation):
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in _inputs()]
  out = _attend(implementation, *inputs, 4)
  assert out.dtype == jnp.bfloat16
  expected = _softmax_over_all(*inputs, 4)
  assert np.linalg.norm(np.asarray(out, np.float64) - expected) < 0.02 * np.linalg.norm(expected)


@every
def test_the_chunk_and_one_layer_are_read(implementation):
  """Other layers change nothing; a slot of this layer does."""
  q, k, v, cache_k, cache_v = _inputs()
  expected = np.asarray(_attend(implementation, q, k, v, cache_k, cache_v, 3))
  cache_k[1 - LAYER], cache_v[1 - LAYER] = 5.0, 5.0
  np.testing.assert_array_equal(_attend(implementation, q, k, v, cache_k, cache_v, 3), expected)
  cache_v[LAYER, 2] += 1.0
  assert np.abs(_attend(implementation, q, k, v, cache_k, cache_v, 3) - expected).max() > 1e-3


@every
def test_candidates_share_the_slots(implementation):
  """Under vmap over queries the memory stays unbatched, and every candidate gets what it would get alone."""
  q, k, v, cache_k, cache_v = _inputs()
  q, k, v = (np.stack([x, _random(seed, *x.shape)]) for seed, x in zip((5, 6, 7), (q, k, v), strict=True))
  run = functools.partial(_attend, implementation)
  together = jax.vmap(run, in_axes=(0, 0, 0, None, None, None))(q, k, v, cache_k, cache_v, 3)
  for candidate in range(2):
    expected = _softmax_over_all(q[candidate], k[candidate], v[candidate], cache_k, cache_v, 3)
    np.testing.assert_allclose(together[candidate], expected, rtol=0, atol=1e-6)


@every
def test_beams_have_memories_of_their_own(implementation):
  """Beams over candidates, as in a search: [K, B, ...] queries, [K, ...] memories and counts."""
  counts = np.array([1, 4, 0])
  q, k, v = (_random(seed, 3, 2, TOKENS, HEADS, WIDTH) for seed in (5, 6, 7))
  cache_k, cache_v = (_random(seed, 3, LAYERS, SLOTS, HEADS, TOKENS, WIDTH) for seed in (8, 9))
  candidates = jax.vmap(functools.partial(_attend, implementation), in_axes=(0, 0, 0, None, None, None))
  together = jax.vmap(candidates)(q, k, v, cache_k, cache_v, counts)
  for beam, count in enumerate(counts):
    for i in range(2):
      expected = _softmax_over_all(q[beam, i], k[beam, i], v[beam, i], cache_k[beam], cache_v[beam], count)
      np.testing.assert_allclose(together[beam, i], expected, rtol=0, atol=1e-6)


def test_attention_without_memory():
  """Cross-attention: as many keys as there are text tokens."""
  q, k, v = _random(0, TOKENS, HEADS, WIDTH), _random(1, HEADS, 4, WIDTH), _random(2, HEADS, 4, WIDTH)
  weights = np.exp(np.einsum("qad,akd->aqk", q, k) / WIDTH**0.5)
  expected = np.einsum("aqk,akd->qad", weights / weights.sum(axis=-1, keepdims=True), v)
  np.testing.assert_allclose(attend(*map(jnp.asarray, (q, k, v))), expected, rtol=0, atol=1e-6)


@every
def test_slots_that_are_not_visited_are_not_read(implementation):
  """The cost follows the slots in use: NaN in the others would show, whatever its weight."""
  q, k, v, cache_k, cache_v = _inputs()
  expected = _attend(implementation, q, k, v, cache_k, cache_v, 2)
  cache_k[:, 2:], cache_v[:, 2:] = np.nan, np.nan
  np.testing.assert_array_equal(_attend(implementation, q, k, v, cache_k, cache_v, 2), expected)
