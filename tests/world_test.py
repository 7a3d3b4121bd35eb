"""The world of one or two objects: captions, splits, what happens in it, and how frames are drawn."""

import itertools
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import Description, Thing

# Size, colour, shape, speed, direction.
RED = Thing(0, 0, 0, 1, 0)
BLUE = Thing(1, 2, 1, 0, 2)
SENTENCE = "a small red circle moves quickly left and a large blue square moves slowly up over a gray background"
BOTH = Description((RED, BLUE), 3)
ONE = Description((RED,), 3)


def test_captions_are_parsed_back():
  assert world.caption(BOTH) == SENTENCE
  assert world.parse(SENTENCE) == BOTH
  assert world.parse(world.caption(ONE)) == world.of_attributes(shapes.parse_caption(world.caption(ONE))) == ONE
  silences = [(size, speed) for size in (False, True) for speed in (False, True)]
  for omit in itertools.product(silences, silences):
    silent = world.without(BOTH, omit)
    assert [thing.size is None for thing in silent.things] == [size for size, _ in omit]
    assert [thing.speed is None for thing in silent.things] == [speed for _, speed in omit]
    assert world.parse(world.caption(silent)) == silent


@pytest.mark.parametrize(
  "text",
  [
    "a cat",
    SENTENCE.replace("blue", "red"),
    SENTENCE.replace(" and ", ", "),
    SENTENCE.replace(" over", " and a white circle moves left over"),
    SENTENCE.replace("gray", "pink"),
    "and" + SENTENCE,
  ],
)
def test_other_texts_are_no_captions(text):
  with pytest.raises(ConfigError, match="not a caption"):
    world.parse(text)


def test_no_combination_of_a_held_out_scene_is_trained():
  rng = np.random.default_rng(0)
  drawn = {split: [world.draw_description(rng, split, 2) for _ in range(60)] for split in shapes.SPLITS}
  for split, scenes in drawn.items():
    parts = {shapes.split_of(world.attributes_of(scene, index)) for scene in scenes for index in range(2)}
    assert parts == {"train"} if split == "train" else "train" in parts <= {"train", split}
    for scene in scenes:
      # Which one is in front decides nothing.
      assert world.split_of(scene) == world.split_of(scene._replace(things=scene.things[::-1])) == split
  assert world.split_of(ONE) == shapes.split_of(world.attributes_of(ONE))
  # Trained models depend on the splits: a change of the hash would leak what is held out.
  every = shapes.all_scenes()
  pairs = [(a, b) for a, b in zip(every, every[300:], strict=False) if a.color != b.color]
  splits = [world.split_of(Description((Thing(*a[:-1]), Thing(*b[:-1])), a.background)) for a, b in pairs]
  assert Counter(splits) == {"train": 631, None: 139, "test": 41, "tune": 41}


def test_held_out_captions():
  captions = world.held_out_captions("test", 20, seed=1)
  assert captions == world.held_out_captions("test", 20, seed=1) != world.held_out_captions("test", 20, seed=2)
  assert len(set(captions)) == 20
  assert all(len(world.parse(text).things) == 2 and world.split_of(world.parse(text)) == "test" for text in captions)
  assert world.held_out_captions("tune", 3, 0, num_objects=1) == shapes.held_out_captions("tune", 3, 0)


def test_events_change_one_thing():
  """By hand: of each of two objects 1 size, 4 colours, 2 shapes, 1 speed, 3 directions; 3 backgrounds; one leaves."""
  assert len(world.neighbours(BOTH)) == len(set(world.neighbours(BOTH))) == 2 * 11 + 3 + 2
  # One object has 5 other colours, and any of 5 * 48 objects of another colour may appear.
  assert len(set(world.neighbours(ONE))) == 12 + 3 + 5 * 48
  kinds = {world.kind_of_event(BOTH, new) for new in world.neighbours(BOTH)}
  assert kinds == {"size", "color", "shape", "speed", "direction", "background", "leaves"}
  assert {world.kind_of_event(ONE, new) for new in world.neighbours(ONE)} == kinds - {"leaves"} | {"appears"}


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_timelines_stay_in_their_split(split):
  rng = np.random.default_rng(0)
  for _ in range(5):
    timeline = world.draw_timeline(rng, split, 5)
    assert len(timeline) == 5
    assert {world.split_of(description) for description in timeline} == {split}
    assert all(before != after for before, after in itertools.pairwise(timeline))


def play(*timeline, begins=(0,), times=tuple(range(20)), starts=((10, 20), (40, 50))):
  return world.play(timeline, begins, np.array(starts), np.array(times))


def test_objects_move_on_the_torus():
  states = play(BOTH, times=(0, 1, 30))
  # The red one moves left by 2 a frame, the blue one up by 1.
  np.testing.assert_array_equal(states.center[:, 0], [(10, 20), (8, 20), (14, 20)])
  np.testing.assert_array_equal(states.center[:, 1], [(40, 50), (40, 49), (40, 20)])


def test_objects_keep_their_places_when_something_happens():
  turned = BOTH._replace(things=(RED._replace(direction=3), BLUE))
  states = play(BOTH, turned, begins=(0, 5))
  np.testing.assert_array_equal(states.center[4:7, 0], [(2, 20), (2, 22), (2, 24)])
  np.testing.assert_array_equal(states.center[4:7, 1], [(40, 46), (40, 45), (40, 44)])


def test_objects_appear_and_leave():
  states = play(ONE, BOTH, Description((BLUE,), 3), begins=(0, 5, 8))
  assert states.present.tolist() == 5 * [[True, False]] + 3 * [[True, True]] + 12 * [[True, False]]
  # It appears half a world away from where the other was, and moves at once; the one that remains is in front.
  np.testing.assert_array_equal(states.center[5:8, 1], [(34, 51), (34, 50), (34, 49)])
  np.testing.assert_array_equal(states.center[8:10, 0], [(34, 48), (34, 47)])
  assert states.color[8, 0] == BLUE.color


def test_one_object_is_drawn_as_ever():
  frames = world.draw(play(ONE))
  scene = shapes.Scene(*map(jnp.int32, world.attributes_of(ONE)), start=jnp.array([10, 20]))
  np.testing.assert_allclose(frames, shapes.render(scene, jnp.arange(20)), atol=1e-6)


def test_the_first_object_is_in_front():
  frames = np.asarray(world.draw(play(BOTH, starts=((32, 32), (36, 32)), times=(0,))))[0] * 255
  np.testing.assert_allclose(frames[32, 32], shapes.COLORS["red"], atol=1e-3)
  np.testing.assert_allclose(frames[32, 42], shapes.COLORS["blue"], atol=1e-3)
  np.testing.assert_allclose(frames[5, 5], shapes.BACKGROUNDS["gray"], atol=1e-3)
  # 7 pixels around the red centre belong to it: of the blue square, 19.5 wide, that much is hidden.
  alone = np.asarray(world.draw(play(Description((BLUE,), 3), starts=((36, 32), (0, 0)), times=(0,))))[0] * 255
  is_blue = lambda image: (np.abs(image - shapes.COLORS["blue"]) < 1).all(axis=-1)
  rows, columns = np.nonzero(is_blue(alone) & ~is_blue(frames))
  assert np.hypot(rows + 0.5 - 32, columns + 0.5 - 32).max() < 8.5


def test_a_video_is_of_complete_captions():
  with pytest.raises(ConfigError, match="size and speed"):
    play(world.without(ONE, [(False, True)]))
