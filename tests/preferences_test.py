"""Pairs for the small rewards: judged by the verifiers, the better clip is what its caption says, the worse is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.data import shapes, verify, world
from streamt1_jax.training import appearance, preferences, scene_pairs
from streamt1_jax.training.corruptions import CORRUPTIONS, FIELDS, NAMES
from streamt1_jax.training.preferences import PairConfig

_LENGTH = 33
_TIMES = np.arange(_LENGTH, dtype=np.int32)
_PAIRS = 6


@functools.cache
def _drawn(split: str = "train", others: tuple[str, ...] = ("train",)):
  scenes = scene_pairs.neighbours(split, others)
  config = PairConfig(_PAIRS, on_frames=False, milder_probability=0.0, soft_probability=0.0)
  return jax.jit(lambda key, kind: preferences.draw_pairs(key, scenes, config, _TIMES, _LENGTH, kind=kind))


@functools.cache
def _pairs(kind: str):
  return jax.device_get(_drawn()(jax.random.key(3), jnp.int32(NAMES.index(kind))))


def _attributes(pairs, index: int) -> shapes.Attributes:
  return shapes.all_scenes()[pairs.scene[index]]


def _verify(frames: np.ndarray, attributes: shapes.Attributes) -> dict[str, bool]:
  return verify.verify(frames, world.of_attributes(attributes))


def test_a_flawless_clip_is_the_worlds_own():
  scene = shapes.Scene(*(jnp.int32(i) for i in (1, 2, 2, 1, 0, 3)), start=jnp.array([8, 24]))
  times = jnp.array([0, 7, 19])

  @jax.jit
  def both():
    look = appearance.flawless(scene, jnp.int32(5), jnp.int32(20), jax.random.key(0))
    return appearance.draw(look, times), shapes.render(scene, times + 5)

  np.testing.assert_allclose(*both(), atol=1e-5)


@pytest.mark.parametrize("kind", NAMES)
def test_better_clips_are_right(kind):
  pairs = _pairs(kind)
  for index in range(_PAIRS):
    assert _verify(pairs.better[index], _attributes(pairs, index))["all_at_once"]


# What the verifiers must find wrong in every worse clip, whatever the strength; of those that begin late, nothing.
_WRONG = {
  "color": ["color"],
  "background": ["background"],
  "binding": ["color", "background"],
  "shape": ["shape"],
  "size": ["size"],
  "direction": ["motion"],
  "speed": ["motion"],
}


@pytest.mark.parametrize("kind", _WRONG)
def test_text_pairs_differ_in_one_thing(kind):
  pairs = _pairs(kind)
  assert not pairs.late.all()
  for index in np.flatnonzero(~pairs.late):
    caption, shown = _attributes(pairs, index), shapes.all_scenes()[pairs.other[index]]
    verdict = _verify(pairs.worse[index], caption)
    assert [name for name in verify.VERDICTS[:-1] if not verdict[name]] == sorted(
      _WRONG[kind], key=verify.VERDICTS.index
    )
    assert _verify(pairs.worse[index], shown)["all_at_once"]


@pytest.mark.parametrize("kind", ["freeze", "turn", "jump", "vanish", "resize", "morph"])
def test_motion_pairs_are_noticed(kind):
  """Some events are too small or too late for the verifiers' tolerances; most are not."""
  pairs = _pairs(kind)
  wrong = [not _verify(pairs.worse[i], _attributes(pairs, i))["all_at_once"] for i in range(_PAIRS)]
  assert np.mean(wrong) >= 0.5
  assert all(np.any(pairs.worse[i] != pairs.better[i]) for i in range(_PAIRS))


@pytest.mark.parametrize("kind", [name for name, c in CORRUPTIONS.items() if c.family != "motion"])
def test_late_corruptions_leave_the_past_alone(kind):
  pairs = _pairs(kind)
  differs = np.any(pairs.worse != pairs.better, axis=(2, 3, 4))
  for index in range(_PAIRS):
    first = np.flatnonzero(differs[index])[0]
    assert first >= _LENGTH - 12 if pairs.late[index] else first == 0


def test_late_corruptions_need_a_past():
  scenes = scene_pairs.neighbours("train", ("train",))
  config = PairConfig(32, on_frames=False, milder_probability=0.0, soft_probability=0.0)
  blur = jnp.int32(NAMES.index("blur"))

  @jax.jit
  def draw(length):
    return preferences.draw_pairs(jax.random.key(0), scenes, config, jnp.zeros(1, jnp.int32), length, kind=blur)

  for length in (9, 12, 13, 21):
    pairs = draw(jnp.int32(length))
    assert pairs.late.any() == (length in (13, 21))
    # In the first frame both clips of a late pair are the same, and of no other.
    differs = np.any(pairs.worse != pairs.better, axis=(1, 2, 3, 4))
    np.testing.assert_array_equal(differs, ~pairs.late)


def test_pairs_come_from_their_key_alone():
  first, again, other = (_drawn()(jax.random.key(seed), jnp.int32(2)) for seed in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert np.any(first.better != other.better)


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_of_pairs(split):
  scenes = jax.device_get(scene_pairs.neighbours(split, ("train",)))
  table = shapes.all_scenes()
  splits = [shapes.split_of(scene) for scene in table]
  for column, field in enumerate(FIELDS):
    rows = scenes.rows[column, : scenes.num_rows[column]]
    assert len(rows) > 0
    for row in rows:
      others = scenes.others[row, column, : scenes.num_others[row, column]]
      assert len(others) > 0
      assert splits[row] == split
      for other in others:
        assert splits[other] == "train"
        differs = {name for name, a, b in zip(shapes.Attributes._fields, table[row], table[other]) if a != b}
        assert differs == ({"color", "background"} if field == "binding" else {field})


def test_bindings_exchange_hues():
  scenes = jax.device_get(scene_pairs.neighbours("train", ("train",)))
  column = FIELDS.index("binding")
  row = scenes.rows[column, 0]
  captions = {shapes.caption(*shapes.all_scenes()[index]) for index in (row, scenes.others[row, column, 0])}
  assert len({caption.replace("dark blue", "").replace("dark green", "") for caption in captions}) == 2
  hues = [{word for word in caption.split() if word in ("blue", "green")} for caption in captions]
  assert hues == [{"blue", "green"}] * 2


@pytest.mark.slow
def test_the_codec_sees_five_frames_and_gives_the_last():
  """A codec that shows which frame it was given: the first pair went through it, the second did not."""
  scenes = scene_pairs.neighbours("train", ("train",))
  seen = []

  def codec(frames, noise, key):
    seen.append(frames.shape)
    return frames[-1] * 0.0 + 0.5

  config = PairConfig(2, on_frames=True, through_codec=1, milder_probability=0.0)
  pairs = preferences.draw_pairs(jax.random.key(0), scenes, config, jnp.zeros(1, jnp.int32), jnp.int32(1), codec)
  assert set(seen) == {(preferences.CODEC_CONTEXT, 64, 64, 3)}
  assert pairs.better.shape == (2, 1, 64, 64, 3)
  np.testing.assert_array_equal(pairs.better[0], np.full((1, 64, 64, 3), 191, np.uint8))
  assert np.ptp(pairs.better[1]) > 50


def test_single_frames_show_their_corruption():
  scenes = scene_pairs.neighbours("train", ("train",))
  config = PairConfig(64, on_frames=True, milder_probability=0.0, soft_probability=0.0)
  draw = jax.jit(lambda key: preferences.draw_pairs(key, scenes, config, jnp.zeros(1, jnp.int32), jnp.int32(1)))
  pairs = jax.device_get(draw(jax.random.key(1)))
  kinds = {NAMES[index] for index in pairs.kind}
  assert kinds <= {name for name, corruption in CORRUPTIONS.items() if corruption.on_frames}
  assert len(kinds) > 8
  changed = np.abs(pairs.better.astype(int) - pairs.worse.astype(int)).max(axis=(1, 2, 3, 4))
  assert changed.min() > 10


def test_emphasis_multiplies_the_odds():
  config = lambda many: PairConfig(1, on_frames=False, emphasis=(("background", many),))
  shares = {many: dict(zip(NAMES, np.asarray(preferences._shares(config(many))))) for many in (1.0, 3.0)}
  odds = lambda of: of["background"] / of["color"]
  np.testing.assert_allclose(odds(shares[3]), 3 * odds(shares[1]), rtol=1e-5)
  np.testing.assert_allclose(sum(shares[3].values()), 1.0, rtol=1e-5)
