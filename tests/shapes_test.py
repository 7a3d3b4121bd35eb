"""The shapes world: drawing, captions, splits, stored data sets and prompt files."""

import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from streamt1_jax.config import ConfigError
from streamt1_jax.data import closeness, shapes, shapes_dataset, world
from streamt1_jax.text import prompts

# "a small red circle moves quickly left over a dark blue background"
ATTRIBUTES = shapes.Attributes(size=0, color=0, shape=0, speed=1, direction=0, background=1)
SENTENCE = "a small red circle moves quickly left over a dark blue background"


def _scene(start=(8, 24), **changes):
  return shapes.Scene(*map(jnp.int32, ATTRIBUTES._replace(**changes)), start=jnp.asarray(start, jnp.int32))


def _coverage(frames):
  """`[T, 64, 64]` of frames of a white object on black."""
  return np.asarray(frames[..., 0]) * 255 / 250


def test_render_colors_and_range():
  frames = jax.jit(shapes.render)(_scene(), jnp.arange(5))
  chex.assert_shape(frames, (5, 64, 64, 3))
  chex.assert_type(frames, jnp.float32)
  np.testing.assert_allclose(frames[0, 24, 8], np.array([230, 30, 30]) / 255, atol=1e-6)
  np.testing.assert_allclose(frames[0, 50, 50], np.array([0, 0, 110]) / 255, atol=1e-6)
  assert frames.min() >= 0.0
  assert frames.max() <= 1.0


@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize(("size", "radius"), [(0, 7.0), (1, 11.0)])
def test_shapes_of_one_size_have_one_area_and_their_centroid_at_the_center(shape, size, radius):
  scene = _scene(start=(24, 40), shape=shape, size=size, color=5, background=0)
  coverage = _coverage(shapes.render(scene, jnp.array([0])))[0]
  np.testing.assert_allclose(coverage.sum(), np.pi * radius**2, rtol=0.01)
  pixel_centers = np.arange(64) + 0.5
  # The antialiased apex of the triangle is a little heavier than the true one.
  np.testing.assert_allclose(coverage.sum(axis=0) @ pixel_centers / coverage.sum(), 24.0, atol=0.02)
  np.testing.assert_allclose(coverage.sum(axis=1) @ pixel_centers / coverage.sum(), 40.0, atol=0.1)


def test_outlines():
  """Extents in pixels of the large shapes, from their geometry."""
  area = np.pi * 11.0**2
  side = (4 * area / 3**0.5) ** 0.5
  expected = {0: (22.0, 22.0), 1: (area**0.5, area**0.5), 2: (side, side * 3**0.5 / 2)}
  for shape, (width, height) in expected.items():
    scene = _scene(start=(24, 24), shape=shape, size=1, color=5, background=0)
    coverage = _coverage(shapes.render(scene, jnp.array([0])))[0]
    np.testing.assert_allclose(coverage.max(axis=0).sum(), width, atol=1.0)
    np.testing.assert_allclose(coverage.max(axis=1).sum(), height, atol=1.0)
  bottom_heavy = coverage.sum(axis=1)
  assert bottom_heavy[:24].max() < bottom_heavy[24:].max()


@pytest.mark.parametrize(
  ("direction", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)]
)
@pytest.mark.parametrize(("speed", "pixels"), [("slowly", 1), ("quickly", 2)])
def test_motion_wraps_and_never_ends(direction, axis, sign, speed, pixels):
  scene = _scene(direction=list(shapes.DIRECTIONS).index(direction), speed=list(shapes.SPEEDS).index(speed))
  indices = [0, 1, 37, 480, 100_000]
  frames = np.asarray(shapes.render(scene, jnp.array(indices)))
  for frame, index in zip(frames, indices, strict=True):
    np.testing.assert_array_equal(frame, np.roll(frames[0], sign * pixels * index, axis))


def test_render_batched_equals_unbatched():
  scenes = shapes.sample_scenes(jax.random.key(3), 6, "train")
  frames = jax.vmap(shapes.render, in_axes=(0, None))(scenes, jnp.array([0, 9]))
  for index in range(6):
    single = jax.tree.map(lambda field, index=index: field[index], scenes)
    chex.assert_trees_all_close(frames[index], shapes.render(single, jnp.array([0, 9])), atol=1e-6)


def test_palette_is_well_separated():
  palette = [*shapes.COLORS.values(), *shapes.BACKGROUNDS.values()]
  distances = [np.linalg.norm(np.subtract(*pair)) for pair in itertools.combinations(palette, 2)]
  assert min(distances) >= 90.0


def test_captions():
  assert shapes.caption(*ATTRIBUTES) == SENTENCE
  silent = "a red circle moves left over a dark blue background"
  assert shapes.caption(*ATTRIBUTES, omit_size=True, omit_speed=True) == silent
  assert shapes.parse_caption(silent) == ATTRIBUTES._replace(size=None, speed=None)
  up = ATTRIBUTES._replace(direction=2, background=3)
  assert shapes.caption(*up, omit_size=True) == "a red circle moves quickly up over a gray background"


def test_captions_are_parsed_back():
  for attributes in shapes.all_scenes():
    for omit_size, omit_speed in itertools.product((False, True), repeat=2):
      said = attributes._replace(
        size=None if omit_size else attributes.size, speed=None if omit_speed else attributes.speed
      )
      assert shapes.parse_caption(shapes.caption(*attributes, omit_size, omit_speed)) == said


@pytest.mark.parametrize("text", ["", "a cat", SENTENCE + " slowly", SENTENCE.replace("red", "dark blue")])
def test_other_texts_are_no_captions(text):
  with pytest.raises(ConfigError, match="not a caption"):
    shapes.parse_caption(text)


def test_splits_are_disjoint_and_stable():
  assert len(shapes.all_scenes()) == len(set(shapes.all_scenes())) == 1152
  splits = {split: set(shapes.scenes_in(split)) for split in shapes.SPLITS}
  assert set.union(*splits.values()) == set(shapes.all_scenes())
  # Trained models depend on these sets: a change of the hash or of a name would leak held-out captions.
  assert {split: len(scenes) for split, scenes in splits.items()} == {"train": 1042, "tune": 56, "test": 54}
  assert shapes.split_of(ATTRIBUTES) == "train"
  with pytest.raises(ConfigError, match="valid"):
    shapes.scenes_in("valid")


@pytest.mark.parametrize("split", ["tune", "test"])
def test_only_complete_captions_are_held_out(split):
  omissions = list(itertools.product((False, True), repeat=2))
  trained = {shapes.caption(*scene, *omitted) for scene in shapes.scenes_in("train") for omitted in omissions}
  scenes = shapes.scenes_in(split)
  assert not {shapes.caption(*scene) for scene in scenes} & trained
  for omitted in omissions[1:]:
    assert np.mean([shapes.caption(*scene, *omitted) in trained for scene in scenes]) > 0.9
  # A single frame shows neither direction nor speed.
  frame = lambda scene: scene._replace(speed=None, direction=None)
  assert set(map(frame, scenes)) <= set(map(frame, shapes.scenes_in("train")))


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_sampled_scenes_belong_to_their_split(split):
  sample = jax.jit(shapes.sample_scenes, static_argnums=(1, 2))
  scenes = sample(jax.random.key(0), 200, split)
  chex.assert_shape(scenes.start, (200, 2))
  chex.assert_type(list(scenes), jnp.int32)
  for row in zip(*scenes[:6], strict=True):
    assert shapes.split_of(shapes.Attributes(*map(int, row))) == split
  assert len({tuple(map(int, start)) for start in scenes.start}) == 16


def test_held_out_captions():
  captions = shapes.held_out_captions("test", 70, seed=1)
  assert captions == shapes.held_out_captions("test", 70, seed=1)
  assert captions != shapes.held_out_captions("test", 70, seed=2)
  assert len(captions) == 70
  assert set(captions[:54]) == {shapes.caption(*attributes) for attributes in shapes.scenes_in("test")}
  assert shapes.held_out_captions("test", 0, seed=1) == []


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  splits = {
    split: tfds.data_source("shapes_videos/sample", split=split, data_dir=data_dir, download=True)
    for split in shapes.SPLITS
  }
  return data_dir, splits


def test_stored_clips_show_their_captions(stored):
  _, splits = stored
  assert {split: len(source) for split, source in splits.items()} == {"train": 6, "tune": 2, "test": 2}
  captions_of_clips = set()
  for split, source in splits.items():
    for example in source:
      chex.assert_shape(example["video"], (21, 64, 64, 3))
      begins = list(map(int, example["timeline"]["begin"]))
      descriptions = [world.parse(text.decode()) for text in example["timeline"]["caption"]]
      # A second caption begins with the second chunk, after 9 frames.
      assert begins == [0, 9][: len(descriptions)]
      captions_of_clips.add(len(descriptions))
      assert {world.split_of(description) for description in descriptions} == {split}
      assert closeness.closeness(example["video"], descriptions, begins).psnr == 99.0
  assert captions_of_clips == {1, 2}


def test_storing_needs_no_tensorflow(stored):
  assert stored
  assert "tensorflow" not in sys.modules


def test_stored_clips_are_deterministic(stored, tmp_path):
  builder = shapes_dataset.ShapesVideos(config="sample", data_dir=tmp_path)
  builder.download_and_prepare()
  for again, first in zip(builder.as_data_source("test"), stored[1]["test"], strict=True):
    chex.assert_trees_all_equal(again, first)


def test_stored_clips_are_found_by_their_directory_alone(stored):
  data_dir, splits = stored
  builder = tfds.builder_from_directory(data_dir / "shapes_videos" / "sample" / "2.0.0")
  chex.assert_trees_all_equal(builder.as_data_source("tune")[0], splits["tune"][0])
  assert set(builder.info.features) == {"video", "timeline", "starts"}


def test_prompts_skip_blank_lines(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_bytes("\ufeffa cat\r\n\n  un café au soleil \n\t\na cat".encode())
  assert prompts.load_prompts(path) == ["a cat", "un café au soleil", "a cat"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "has no prompt"),
    (b"\n \n", "has no prompt"),
    (b"a cat\n\xff\xfe\n", r"prompts\.txt, line 2: not UTF-8"),
    (b"a cat\n\na\x00b\n", r"prompts\.txt, line 3: control character"),
  ],
)
def test_bad_prompt_files_are_named(tmp_path, content, message):
  path = tmp_path / "prompts.txt"
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    prompts.load_prompts(path)
  with pytest.raises(ConfigError, match="does not exist"):
    prompts.load_prompts(tmp_path / "other.txt")


def test_prompts_without_an_end():
  with pytest.raises(ConfigError, match="/dev/zero is too large"):
    prompts.load_prompts("/dev/zero")
