"""Scores of the coherence reward, by hand.

A frame of one colour, one of the six levels of a channel, has a histogram with a single one in it: frames of two such
colours are at distance 1, and of one at 0. Nothing in them correlates, so they are no motion: the surprise is 1, and
nothing counts as still.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.rewards import coherence
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow

_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))
SURPRISE, DRIFT, FLICKER, STILLNESS = 1.3, 0.4, 0.6, 0.3
"""The weights."""


def _flat(*levels: int) -> jnp.ndarray:
  frames = np.zeros((len(levels), 16, 16, 3), np.uint8)
  frames[..., 0] = 51 * np.array(levels).reshape(-1, 1, 1)
  return jnp.asarray(frames)


@jax.jit
def _reward(window: FrameWindow) -> jax.Array:
  return coherence.TemporalCoherence()({}, (), window, _INFO)


def _score(past: jnp.ndarray, num_past: int, chunk: jnp.ndarray) -> float:
  return float(_reward(FrameWindow(past, jnp.int32(num_past), chunk)))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
  ("past", "chunk", "expected"),
  [
    # Too short for a motion. The first half is frame 0, and the end frames 1 and 2. One change in two steps.
    ([], [0, 1, 1], 1 - DRIFT - FLICKER * (1 / 2) ** 0.5),
    # If the number is even, the end is more than half: two of its three frames are the first half's colour.
    ([], [0, 0, 0, 1], 1 - DRIFT / 3 - FLICKER * (1 / 3) ** 0.5),
    # Motion ends in frames 4 to 6. The end is the last four frames, and one of them has the old colour.
    ([], [0, 0, 0, 0, 1, 1, 1], 1 - SURPRISE - DRIFT * 0.75 - FLICKER * (1 / 6) ** 0.5),
    # The first half is both frames of the past with level 0. The step into the chunk counts.
    ([0, 0, 1], [1, 2], 1 - SURPRISE - DRIFT - FLICKER * (1 / 2) ** 0.5),
    ([0, 0, 1], [2, 2], 1 - SURPRISE - DRIFT - FLICKER * (1 / 2) ** 0.5),
    # The first half is the past and frame 0 of the chunk, levels 0 and 1; the end is the last three frames.
    ([0], [1, 1, 1, 2], 1 - SURPRISE - DRIFT * (1 / 2 + (2 / 3 - 1 / 2) + 1 / 3) / 2 - FLICKER * (2 / 4) ** 0.5),
  ],
  ids=str,
)
def test_flat_frames(past, chunk, expected, padding):
  """`padding` unused rows of the past have a third colour."""
  frames = _flat(*past, *[5] * padding)
  np.testing.assert_allclose(_score(frames, len(past), _flat(*chunk)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("length", "still"), [(3, False), (5, True), (6, True), (7, True)])
def test_frames_that_never_change(length, still):
  """Half black, half white: variance 3/4 beside the floor of 5e-4, so the correlation is 0.75 / 0.7505.

  What lacks to 1 counts as surprise and as change. Before the fifth frame there is neither.
  """
  frames = np.zeros((length, 16, 16, 3), np.uint8)
  frames[:, :, 8:] = 255
  change = 1 - 0.75 / 0.7505
  expected = 1 - SURPRISE * change - STILLNESS * (1 - change / 0.15) if still else 1.0
  np.testing.assert_allclose(_score(_flat(), 0, jnp.asarray(frames)), expected, rtol=0, atol=2e-6)


def test_a_negative_correlation_is_a_surprise_of_one():
  """What was bright turns dark in place: correlation -1, which counts as none."""
  bright = np.zeros((16, 16, 3), np.float32)
  bright[4, 7] = 1.0
  frames = jnp.asarray(np.stack([bright] * 4 + [1 - bright] * 2))
  assert jax.jit(coherence.correlation)(frames[3:4], frames[4:5])[0, 0, 0] < -0.8
  np.testing.assert_array_equal(jax.jit(coherence.motion_surprise)(frames), [1.0, 1.0])
