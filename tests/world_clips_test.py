"""Clips as the training of the DiT draws them."""

import dataclasses

import numpy as np

from streamt1_jax.data import shapes, world
from streamt1_jax.training import world_clips
from streamt1_jax.training.world_clips import ClipShares

CHUNKS, FIRST, LATER = 7, 9, 12
PLAIN = ClipShares(two_objects=0.5, early=0.0, late=0.0, still=0.0, far=0.0, anywhere=0.5, crossing=0.0)


def _drawn(shares, count=40):
  rng = np.random.default_rng(0)
  return [world_clips.training_clip(rng, shares, CHUNKS, FIRST, LATER, "train") for _ in range(count)]


def _moved(clip, begin, end):
  """How far the first object moves between two frames, on the torus."""
  return (clip.states.center[end, 0] - clip.states.center[begin, 0]) % shapes.FRAME_SIZE


def test_a_plain_clip_goes_on_as_it_began():
  for clip in _drawn(PLAIN):
    assert (clip.switch, clip.late, clip.gap) == (0, False, 0)
    assert clip.sink == clip.description
    assert len(clip.states.background) == FIRST + LATER * (CHUNKS - 1)
    steps = [_moved(clip, frame, frame + 1) for frame in range(FIRST + 2)]
    np.testing.assert_array_equal(steps, np.broadcast_to(steps[0], (FIRST + 2, 2)))


def test_behind_a_far_sink_the_world_has_gone_on():
  clips = _drawn(dataclasses.replace(PLAIN, far=1.0))
  assert {clip.gap for clip in clips} >= {1, 15}
  assert all(1 <= clip.gap < world_clips.PERIOD for clip in clips)
  for clip in clips:
    step = _moved(clip, 0, 1)
    np.testing.assert_array_equal(_moved(clip, FIRST - 1, FIRST), step * (1 + LATER * clip.gap) % shapes.FRAME_SIZE)
    np.testing.assert_array_equal(_moved(clip, FIRST, FIRST + 1), step)


def test_clips_in_which_an_object_hides_the_other():
  """Drawn: after the first chunk, fewer pixels have the second object's colour than if it were alone."""
  for clip in _drawn(dataclasses.replace(PLAIN, crossing=1.0), 8):
    states = clip.states
    alone = states._replace(present=states.present & np.array([False, True]))
    color = shapes.palette(shapes.COLORS)[states.color[:, 1]][:, None, None]
    shown, all_of_it = ((np.abs(world.draw(s) - color).max(-1) < 0.02).sum((1, 2)) for s in (states, alone))
    assert (all_of_it - shown)[FIRST:].max() >= 10


def test_the_world_repeats_after_the_period():
  (clip,) = _drawn(PLAIN, 1)
  frames = LATER * world_clips.PERIOD
  starts = world.starts_of(shapes.START_POSITIONS[0])
  begin, end = world.play([clip.description], [0], starts, np.array([0, frames])).center
  np.testing.assert_array_equal(begin, end)
