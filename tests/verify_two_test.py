"""The verifiers of two objects and of timelines, and the continuous verdicts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.data import closeness, shapes, sight, verify, verify_timeline, world
from streamt1_jax.data.world import Description, Thing
from streamt1_jax.evaluation.metrics import period
from tests.compiler import OPTIMISED
from tests.verify_test import _degrade as degrade

LARGE_RED = Thing(1, 0, 0, 1, 0)  # a large red circle moves quickly left
SMALL_BLUE = Thing(0, 2, 1, 0, 2)  # a small blue square moves slowly up
BOTH = Description((LARGE_RED, SMALL_BLUE), 3)
STARTS = np.array([(60, 20), (20, 50)])
"""The red circle passes the blue square in frames 14 to 26, and hides nearly all of it."""
FRAMES = 49


@functools.cache
def _draw():
  return jax.jit(world.draw, compiler_options=OPTIMISED)


def drawn(states: world.FrameStates) -> np.ndarray:
  return np.asarray(jnp.round(255.0 * _draw()(states))).astype(np.uint8)


def clip(description=BOTH, starts=STARTS, times=range(FRAMES)):
  return drawn(world.play([description], [0], starts, np.array(times)))


def changed(index, **changes):
  things = [thing._replace(**changes) if i == index else thing for i, thing in enumerate(BOTH.things)]
  return BOTH._replace(things=tuple(things))


def failed(frames, index, description=BOTH):
  return {name for name, holds in verify.verify_objects(frames, description)[index].items() if not holds}


def test_true_clips_are_accepted():
  """28 of them, half of them blurred and noisy, with crossings of all kinds.

  What moves alike starts apart, as in the world: of two objects that always touch, the hidden one cannot be judged.
  """
  rng = np.random.default_rng(0)
  for number in range(28):
    description = world.draw_description(rng, "train", 2)
    starts = rng.integers(64, size=(2, 2))
    alike = len({(thing.speed, thing.direction) for thing in description.things}) == 1
    frames = clip(description, world.starts_of(starts[0]) if alike else starts)
    if number % 2:
      frames = degrade(frames, seed=number)
    verdicts = verify.verify(frames, description)
    assert verdicts["all_at_once"], (world.caption(description), verdicts)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
  ("changes", "verdict"),
  [
    ({"color": 4}, "color"),
    ({"shape": 2}, "shape"),
    ({"direction": 3}, "motion"),
    ({"direction": 1}, "motion"),
  ],
)
def test_only_the_wrong_attribute_of_one_object_is_rejected(index, changes, verdict):
  frames = degrade(clip(changed(index, **changes)))
  assert failed(frames, index) == {verdict}
  assert not failed(frames, 1 - index)
  assert not verify.verify(frames, BOTH)["all_at_once"]


@pytest.mark.parametrize("index", [0, 1])
def test_size_and_speed_of_one_object(index):
  thing = BOTH.things[index]
  for field in ("size", "speed"):
    frames = clip(changed(index, **{field: 1 - getattr(thing, field)}))
    assert failed(frames, index) == {{"size": "size", "speed": "motion"}[field]}
    assert not failed(frames, 1 - index)
    silent = world.without(BOTH, [(field == "size", field == "speed")] * 2)
    assert verify.verify(frames, silent)["all_at_once"]


def without_object(index, times):
  """The clip, in which an object is missing at some times."""
  states = world.play([BOTH], [0], STARTS, np.arange(FRAMES))
  present = np.array(states.present)
  present[times, index] = False
  return drawn(states._replace(present=present))


def in_front(index):
  """The clip with the object at `index` in front."""
  order = [index, 1 - index]
  states = world.play([BOTH], [0], STARTS, np.arange(FRAMES))
  pick = lambda field: field[:, order]
  return drawn(world.FrameStates(*(pick(f) if f.ndim > 1 else f for f in states)))


def test_the_color_of_what_is_mostly_hidden_does_not_count():
  """A codec mixes what is left of the square with the circle in front of it."""
  frames = clip(times=range(8, 33))
  seen = sight.look(frames, BOTH).objects[1]
  mixed = np.mean([shapes.COLORS["red"], shapes.COLORS["blue"]], axis=0).astype(np.uint8)
  hidden = (seen.visible_area > 20) & (seen.visible_area < 0.6 * seen.nominal)
  assert 0.1 < hidden.mean() < 0.5
  painted = (seen.coverage > 0.5) & hidden[:, None, None]
  assert "color" not in failed(np.where(painted[..., None], mixed, frames), 1)
  shown = (seen.coverage > 0.5) & ~hidden[:, None, None]
  assert "color" in failed(np.where(shown[..., None], mixed, frames), 1)


def test_what_must_be_hidden_is_judged():
  assert not failed(in_front(0), 0) | failed(in_front(0), 1)
  assert "permanence" in failed(in_front(1), 0) & failed(in_front(1), 1)


@pytest.mark.parametrize("index", [0, 1])
def test_an_object_that_is_missing_for_a_moment(index):
  assert failed(without_object(index, slice(40, 44)), index) == {"permanence"}
  assert failed(without_object(index, slice(0, FRAMES)), index) >= {"color", "motion", "shape", "permanence"}


def test_a_hidden_object_may_not_stay_away():
  """The blue square is hidden in frame 20; it must come back."""
  assert "permanence" in failed(without_object(1, slice(20, 35)), 1)


@pytest.mark.parametrize("color", [LARGE_RED.color, 4])
def test_a_third_object_is_rejected(color):
  third = drawn(world.play([Description((Thing(0, color, 2, 0, 3),), 3)], [0], STARTS + 30, np.arange(FRAMES)))
  frames = clip()
  there = np.any(third != third[0, 0, 0], axis=-1, keepdims=True)
  assert not verify.verify(np.where(there, third, frames), BOTH)["permanence"]


# Timelines: chunks of 9 and then 12 frames. The red circle turns with chunk 3, frame 33; it is alone from chunk 5 on.
TURNED = changed(0, direction=3)
ALONE = Description((TURNED.things[0],), 3)
TIMELINE, BEGINS = [BOTH, TURNED, ALONE], [0, 3, 5]
END = 9 + 12 * 7


def timeline_clip(begins):
  frames_of = [0, *(9 + 12 * (chunk - 1) for chunk in begins[1:])]
  return drawn(world.play(TIMELINE, frames_of, STARTS, np.arange(END)))


@pytest.mark.parametrize(("turns", "until"), [(3, 0), (4, 1)])
def test_chunks_until_a_caption_holds(turns, until):
  segments = verify_timeline.verify_timeline(timeline_clip([0, turns, 5]), TIMELINE, BEGINS, 9, 12)
  # What turns late goes on under the old caption, which does not hold that long.
  assert [segment.chunks_until for segment in segments] == [0, until, 0]
  assert verify_timeline.all_hold(segments)


def test_a_caption_that_never_holds():
  segments = verify_timeline.verify_timeline(timeline_clip([0, 3, 7]), TIMELINE, BEGINS, 9, 12)
  late = verify_timeline.verify_timeline(clip(times=range(END)), TIMELINE, BEGINS, 9, 12)
  assert [segment.chunks_until for segment in segments] == [0, 0, 2]
  assert [segment.chunks_until for segment in late] == [0, None, None]
  assert not late[1].verdicts["motion"]
  assert not verify_timeline.all_hold(late)


def test_a_true_clip_is_its_own_nearest_ideal():
  silent = world.without(BOTH, [(True, True), (False, True)])
  found = closeness.closeness(clip(), [silent], [0])
  assert found.psnr == 99.0
  assert found.color == 0.0
  # A pixel that is half covered may be on either side of an outline.
  assert found.outline < 0.01
  np.testing.assert_array_equal(found.ideal.center[0], STARTS)


def test_nearest_ideal_of_a_timeline():
  """The blue square appears somewhere else than the world would have it."""
  states = world.play([ALONE, TURNED], [0, 33], STARTS, np.arange(60))
  center = np.array(states.center)
  center[33:, 1] += (5, 9)
  found = closeness.closeness(drawn(states._replace(center=center % 64)), [ALONE, TURNED], [0, 33])
  assert found.psnr == 99.0


def test_closeness_counts_pixels():
  """In a clip that is 10 of 255 too dark, and in one where the blue square is missing."""
  starts = np.array([(40, 20), (20, 60)])
  frames = clip(starts=starts, times=range(2)).astype(int)
  dimmed = np.clip(frames - 10, 0, 255).astype(np.uint8)
  found = closeness.closeness(dimmed, [BOTH], [0])
  mse = np.square(dimmed.astype(float) - frames).mean()
  np.testing.assert_allclose(found.psnr, 10 * np.log10(255**2 / mse), atol=1e-6)
  assert found.outline < 0.05
  # Each of three channels is 10 lower, where it can be; all channels of both colours are 30 or more.
  np.testing.assert_allclose(found.color, 10 * 3**0.5, atol=1e-3)
  alone = clip(Description((LARGE_RED,), 3), starts, range(2))
  found = closeness.closeness(alone, [BOTH], [0])
  np.testing.assert_array_equal(found.ideal.center[0, 0], starts[0])
  # 12 x 12 pixels of the blue square are covered by more than half; nothing is wrong with the red circle.
  np.testing.assert_allclose(found.outline, 12**2 / (2 * np.pi * 7) / 2, rtol=1e-6)


def test_the_world_repeats():
  """Every 64 frames, so that a world's video that drifts by whole pixels has a phase error and no other."""
  perfect = clip(times=range(193))
  assert [each[1:3] for each in period.measure(perfect, 64)] == [(0.0, 0.0)] * 3
  drifting = np.stack([np.roll(frame, t // 64 * 3, axis=1) for t, frame in enumerate(perfect)])
  assert [each[1:3] for each in period.measure(drifting, 64)] == [(0.0, 3.0), (0.0, 6.0), (0.0, 9.0)]


def test_nothing_that_is_trained_or_searches_knows_the_verifiers(pytestconfig):
  """Otherwise a verdict would be no evidence."""
  package = pytestconfig.rootpath / "streamt1_jax"
  allowed = {"data", "evaluation", "measuring", "cli"}
  names = ("data.verify", "import verify", ", verify", "closeness", "data.sight", "import sight", ", sight")
  for path in package.rglob("*.py"):
    if path.relative_to(package).parts[0] not in allowed:
      assert not any(name in path.read_text() for name in names), path
