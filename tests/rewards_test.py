"""The prompt-free rewards: clean clips of the shapes world score above the same clips with one defect."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.data import shapes
from streamt1_jax.rewards import coherence, quality
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.coherence import TemporalCoherence
from streamt1_jax.rewards.quality import ImageQuality

_NUM_SCENES = 6
_PAST, _CHUNK, _CAPACITY = 24, 12, 36
_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))


@functools.cache
def _scenes() -> shapes.Scene:
  return shapes.sample_scenes(jax.random.key(3), _NUM_SCENES, "test")


_render_all = jax.jit(jax.vmap(shapes.render, (0, None)))


def _render(scenes: shapes.Scene, times: np.ndarray) -> np.ndarray:
  """`[N, T, 64, 64, 3]` in 0..1."""
  return np.asarray(_render_all(scenes, jnp.asarray(times, jnp.int32)))


def _to_bytes(frames: np.ndarray) -> jax.Array:
  return jnp.asarray(np.clip(np.round(255.0 * frames), 0, 255), jnp.uint8)


def _moved(scenes: shapes.Scene, x: int, y: int) -> shapes.Scene:
  return scenes._replace(start=scenes.start + jnp.array([[x, y]]))


@jax.jit
def _image_scores(clips):
  return jax.vmap(lambda clip: ImageQuality()({}, {}, clip, _INFO))(clips)


@jax.jit
def _window_score(window):
  return TemporalCoherence()({}, {}, window, _INFO)


def _window(clip: jax.Array, num_past: int, padding: int) -> FrameWindow:
  past = jnp.concatenate([clip[:num_past], jnp.full((padding, *clip.shape[1:]), 90, jnp.uint8)])
  return FrameWindow(past, jnp.int32(num_past), clip[num_past:])


@jax.jit
def _video_scores(clips):
  score = lambda clip: TemporalCoherence()({}, {}, _window(clip, _PAST, _CAPACITY - _PAST), _INFO)
  return jax.vmap(score)(clips)


def _blurred(frames):
  kernel = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
  for axis in (2, 3):
    frames = sum(w * np.roll(frames, shift, axis) for w, shift in zip(kernel, range(-2, 3)))
  return frames


_IMAGE_DEFECTS = {
  "ghost": lambda scenes, clean: 0.6 * clean + 0.4 * _render(_moved(scenes, 9, 9), np.arange(4)),
  "blur": lambda scenes, clean: _blurred(clean),
  "noise": lambda scenes, clean: clean + np.random.default_rng(0).normal(0.0, 0.03, clean.shape),
  "contrast": lambda scenes, clean: 0.5 + 0.6 * (clean - 0.5),
  "empty": lambda scenes, clean: np.broadcast_to(np.median(clean, (2, 3), keepdims=True), clean.shape),
}


@pytest.mark.parametrize("defect", _IMAGE_DEFECTS)
def test_image_quality_prefers_clean_frames(defect):
  scenes = _scenes()
  clean = _render(scenes, np.arange(4))
  losses = _image_scores(_to_bytes(clean)) - _image_scores(_to_bytes(_IMAGE_DEFECTS[defect](scenes, clean)))
  assert losses.min() > 0.05


def _spliced(clean, other):
  """The clip until the middle of the chunk, then another one."""
  return np.concatenate([clean[:, : _PAST + _CHUNK // 2], other[:, _PAST + _CHUNK // 2 :]], axis=1)


def _times():
  return np.arange(_PAST + _CHUNK)


def _flicker(scenes, clean):
  gain = np.ones(_PAST + _CHUNK)
  gain[_PAST:] += np.random.default_rng(0).uniform(-0.2, 0.2, _CHUNK)
  return clean * gain[None, :, None, None, None] + 0.2 * (gain - 1.0)[None, :, None, None, None]


_VIDEO_DEFECTS = {
  "vanish": lambda scenes, clean: _spliced(
    clean, np.broadcast_to(np.median(clean, (2, 3), keepdims=True), clean.shape)
  ),
  "jump": lambda scenes, clean: _spliced(clean, _render(_moved(scenes, 11, 7), _times())),
  "color": lambda scenes, clean: _spliced(clean, _render(scenes._replace(color=(scenes.color + 1) % 6), _times())),
  "shape": lambda scenes, clean: _spliced(clean, _render(scenes._replace(shape=(scenes.shape + 1) % 3), _times())),
  "background": lambda scenes, clean: _spliced(
    clean, _render(scenes._replace(background=(scenes.background + 1) % 4), _times())
  ),
  "reverse": lambda scenes, clean: _spliced(clean, clean[:, ::-1]),
  "freeze": lambda scenes, clean: _spliced(clean, np.broadcast_to(clean[:, _PAST + 6, None], clean.shape)),
  "still": lambda scenes, clean: np.broadcast_to(clean[:, :1], clean.shape),
  "flicker": _flicker,
}


@pytest.mark.parametrize("defect", _VIDEO_DEFECTS)
def test_temporal_coherence_prefers_clean_windows(defect):
  scenes = _scenes()
  clean = _render(scenes, _times())
  losses = _video_scores(_to_bytes(clean)) - _video_scores(_to_bytes(_VIDEO_DEFECTS[defect](scenes, clean)))
  assert losses.min() > 0.02
  if defect == "still":
    assert losses.max() < 0.4  # not moving is a blemish; vanishing costs several times as much


@pytest.mark.parametrize("num_past", [0, 3, _PAST])
def test_unused_rows_of_the_past_mean_nothing(num_past):
  clip = _to_bytes(_render(_scenes(), np.arange(num_past + _CHUNK))[0])
  window = _window(clip, num_past, _CAPACITY - num_past)
  unused = np.arange(_CAPACITY)[:, None, None, None] >= num_past
  garbage = np.random.default_rng(1).integers(0, 256, window.past.shape, np.uint8)
  spoiled = window._replace(past=jnp.where(unused, garbage, window.past))
  assert _window_score(window) == _window_score(spoiled)


def test_the_capacity_for_the_past_means_nothing():
  clip = _to_bytes(_render(_scenes(), _times())[0])
  scores = [_window_score(_window(clip, _PAST, padding)) for padding in (0, _CAPACITY - _PAST)]
  np.testing.assert_allclose(*scores, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize(("height", "width", "length", "capacity"), [(16, 16, 2, 0), (37, 50, 3, 5)])
def test_flat_frames_have_finite_scores(value, height, width, length, capacity):
  chunk = jnp.full((length, height, width, 3), value, jnp.uint8)
  past = jnp.full((capacity, height, width, 3), value, jnp.uint8)
  video = _window_score(FrameWindow(past, jnp.int32(capacity // 2), chunk))
  for score in (_image_scores(chunk[None])[0], video):
    chex.assert_shape(score, ())
    chex.assert_type(score, jnp.float32)
    assert np.isfinite(score)


def test_a_flat_window_is_not_coherent():
  flat = jnp.full((1, _PAST + _CHUNK, 64, 64, 3), 128, jnp.uint8)
  moving = _to_bytes(_render(_scenes(), _times()))
  assert _video_scores(flat)[0] < _video_scores(moving).min() - 0.5


def test_rewards_are_static_arguments_and_share_the_past():
  for reward in (ImageQuality(), TemporalCoherence()):
    assert hash(reward) == hash(dataclasses.replace(reward))
  clip = _to_bytes(_render(_scenes(), _times())[0])
  window = _window(clip, _PAST, 0)
  chunks = jnp.stack([window.chunk, window.chunk[::-1]])
  together = jax.vmap(_window_score, in_axes=(FrameWindow(None, None, 0),))(window._replace(chunk=chunks))
  alone = [_window_score(window._replace(chunk=chunk)) for chunk in chunks]
  np.testing.assert_allclose(together, alone, atol=1e-5)


def test_local_range_of_a_single_bright_pixel():
  frame = jnp.zeros((8, 8, 3)).at[4, 4].set(jnp.array([0.6, 0.8, 0.0]))
  expected = np.zeros((6, 6))
  expected[2:5, 2:5] = 1.0  # every 3 x 3 window that holds the pixel; the norm of (0.6, 0.8)
  np.testing.assert_allclose(quality.local_range(frame), expected, atol=1e-6)


def test_concentration_and_strength_by_hand():
  np.testing.assert_allclose(quality.concentration(jnp.eye(4)[:1]), 1.0, atol=1e-6)
  np.testing.assert_allclose(quality.concentration(jnp.ones((4, 4))), 0.0, atol=1e-6)
  # (2 - 7 / 5) / (2 - 1) for the values 3, 4, 0, 0.
  np.testing.assert_allclose(quality.concentration(jnp.array([[3.0, 4.0, 0.0, 0.0]])), 0.6, atol=1e-6)
  np.testing.assert_allclose(quality.edge_strength(jnp.array([1.0, 2.0])), 9.0 / 5.0, atol=1e-6)


def test_quality_of_unequal_frames_by_hand():
  """The mean over frames of 16x16: two flat ones, and one with a red pixel, around which 9 of 196 ranges are 1."""
  chunk = np.zeros((3, 16, 16, 3), np.uint8)
  chunk[2, 5, 6, 0] = 255
  flat = 0.4 * np.log(0.1) + 1.25 * np.log(0.003**0.5)
  variance = (1 / 256) * (255 / 256)
  dot = 3.5 * (14 - 9 / 3) / 13 + 0.4 * np.log(1.1) + 1.25 * np.log((variance + 0.003) ** 0.5)
  np.testing.assert_allclose(_image_scores(jnp.asarray(chunk)[None])[0], (2 * flat + dot) / 3, rtol=0, atol=1e-5)


def test_color_signature_ignores_where_things_are():
  thumbnail = jnp.asarray(np.random.default_rng(2).uniform(size=(8, 12, 3)), jnp.float32)
  moved = jnp.roll(thumbnail, (3, 5), axis=(0, 1))
  np.testing.assert_allclose(coherence.color_signature(thumbnail), coherence.color_signature(moved), atol=1e-5)


def test_correlation_peaks_at_the_displacement():
  frame = jnp.asarray(np.random.default_rng(3).uniform(size=(1, 16, 24, 3)), jnp.float32)
  surface = coherence.correlation(frame, jnp.roll(frame, (3, 5), axis=(1, 2)))[0]
  assert np.unravel_index(np.argmax(surface), surface.shape) == (3, 5)
  np.testing.assert_allclose(surface[3, 5], 1.0, atol=0.01)  # the variance floor takes 0.002


def test_motion_surprise_counts_the_jump_alone():
  frame = jnp.asarray(np.random.default_rng(4).uniform(size=(16, 16, 3)), jnp.float32)
  columns = [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14]
  surprise = coherence.motion_surprise(jnp.stack([jnp.roll(frame, x, axis=1) for x in columns]))
  # Frames 5 and 6 come after the jump but their predecessors before it; 7 and 8 are compared with that motion.
  np.testing.assert_array_equal(surprise > 0.5, [False, True, True, True, True, False, False])
