"""Pairs for the small rewards: judged by the verifiers, the better clip is what its caption says, the worse is not."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from streamt1_jax.data import shapes, verify, world
from streamt1_jax.training import appearance, pair_frames, preferences, scene_pairs
from streamt1_jax.training.appearance import Look
from streamt1_jax.training.corruptions import CORRUPTIONS, NAMES
from streamt1_jax.training.preferences import LAST_CHUNK, PairConfig
from tests.compiler import OPTIMISED

_LENGTH = 33
_TIMES = np.arange(_LENGTH, dtype=np.int32)
_PAIRS = 6
_PLAIN = PairConfig(on_frames=False, milder_probability=0.0, soft_probability=0.0)

_draw = jax.jit(lambda clips, times: pair_frames.draw(clips, times, _no_codec), compiler_options=OPTIMISED)


def _no_codec(frames, noise, key):
  raise AssertionError("no pair of these goes through a codec")


@functools.cache
def _pairs(kind: str):
  # No pair of a motion is late, but its event would be near the end, where the verifiers see little of it.
  early = CORRUPTIONS[kind].family == "motion"
  config = dataclasses.replace(_PLAIN, late_probability=0.0) if early else _PLAIN
  return preferences.draw_pairs(np.random.default_rng(3), config, _PAIRS, _LENGTH, kind)


@functools.cache
def _frames(kind: str):
  clips = pair_frames.pair_clips(_pairs(kind), _TIMES, 0)
  return jax.device_get(_draw(clips, _TIMES))


def _right(clip: preferences.Clip, frames: np.ndarray) -> bool:
  """Whether a clip is what its last caption says, from then on."""
  begin = clip.begins[-1] if len(clip.begins) > 1 else 0
  return verify.verify(frames[begin:], clip.descriptions[-1])["all_at_once"]


def _share_right(clips: list[preferences.Clip], frames: np.ndarray) -> float:
  return float(np.mean([_right(clip, shown) for clip, shown in zip(clips, frames, strict=True)]))


_ALMOST_ALL = 2 / 3
"""A chunk in which one object passes behind the other is too little for the verifiers."""


def test_a_flawless_clip_is_the_worlds_own():
  descriptions = [world.parse(caption) for caption in world.held_out_captions("train", 2, seed=0)]
  states = world.play(descriptions, [0, 9], world.starts_of(np.array([8, 24])), np.arange(20))
  drawn = jax.jit(appearance.draw)(states, Look(target=1, shape=2, color=3), np.arange(20, dtype=np.int32))
  np.testing.assert_allclose(drawn, world.draw(states), atol=1e-5)


@pytest.mark.parametrize("kind", NAMES)
def test_better_clips_are_right(kind):
  pairs, (better, _) = _pairs(kind), _frames(kind)
  assert all(pair.better.descriptions[-1] == pair.caption for pair in pairs)
  assert _share_right([pair.better for pair in pairs], better) >= _ALMOST_ALL


@pytest.mark.parametrize("kind", [name for name, c in CORRUPTIONS.items() if c.family == "text"])
def test_text_pairs_show_the_other_caption(kind):
  """All that is worse is right in itself: the other caption's, from the moment on that the pair names."""
  pairs, (_, worse) = _pairs(kind), _frames(kind)
  assert {pair.late for pair in pairs} == {False, True}
  for pair, frames in zip(pairs, worse, strict=True):
    assert pair.worse.descriptions[-1] == pair.other != pair.caption
    shown = verify.verify(frames[-LAST_CHUNK:], pair.caption)
    # What swaps only the motion of two objects may look alike in one chunk.
    assert not shown["all_at_once"] or kind in ("direction", "speed", "swapped")
  assert _share_right([pair.worse for pair in pairs], worse) >= _ALMOST_ALL


@pytest.mark.parametrize(
  ("kind", "wrong"),
  [
    ("color", ["color"]),
    ("background", ["background"]),
    ("shape", ["shape"]),
    ("size", ["size"]),
    ("direction", ["motion"]),
    ("speed", ["motion"]),
  ],
)
def test_attributes_differ_in_one_thing(kind, wrong):
  pairs, (_, worse) = _pairs(kind), _frames(kind)
  for pair, frames in zip(pairs, worse, strict=True):
    if pair.late or not pair.steady:
      continue
    verdict = verify.verify(frames, pair.caption)
    failed = {name.split("_")[0] for name in verify.VERDICTS[:-1] if not verdict[name]}
    assert failed >= set(wrong), (world.caption(pair.caption), world.caption(pair.other), failed)


@pytest.mark.parametrize("kind", ["freeze", "turn", "jump", "vanish", "resize", "morph"])
def test_motion_pairs_are_noticed(kind):
  """Some events are too small or too late for the verifiers' tolerances; most are not."""
  pairs, (better, worse) = _pairs(kind), _frames(kind)
  wrong = [not _right(pair.better, frames) for pair, frames in zip(pairs, worse, strict=True)]
  assert np.mean(wrong) >= 0.5
  assert np.any(worse != better, axis=(1, 2, 3, 4)).all()


@pytest.mark.parametrize("kind", NAMES)
def test_only_what_is_late_leaves_the_past_alone(kind):
  pairs, (better, worse) = _pairs(kind), _frames(kind)
  differs = np.any(worse != better, axis=(2, 3, 4))
  for pair, frames in zip(pairs, differs, strict=True):
    first = np.flatnonzero(frames)[0]
    if pair.late:
      assert first >= _LENGTH - LAST_CHUNK
    elif CORRUPTIONS[kind].family == "picture":
      # The object that has the defect may begin behind the other one, or have looked like the mixture before.
      assert first == 0 or len(pair.caption.things) == 2 or not pair.steady
    elif CORRUPTIONS[kind].family == "text":
      # Under an earlier caption both are the same. Where only motion differs they part in the next frame.
      assert first <= pair.better.begins[-1] + 1


def test_late_corruptions_need_a_past():
  for length, possible in ((9, False), (12, False), (13, True), (21, True)):
    pairs = preferences.draw_pairs(np.random.default_rng(0), _PLAIN, 32, length, "blur")
    assert any(pair.late for pair in pairs) == possible
    assert any(not pair.steady for pair in pairs) == possible


def test_pairs_come_from_their_seed_alone():
  clips = [
    pair_frames.pair_clips(preferences.draw_pairs(np.random.default_rng(seed), _PLAIN, 4, _LENGTH), _TIMES, 1)
    for seed in (1, 1, 2)
  ]
  jax.tree.map(np.testing.assert_array_equal, clips[0], clips[1])
  assert np.any(clips[0].plain[0].look.seed != clips[2].plain[0].look.seed)


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_of_pairs(split):
  rng = np.random.default_rng(0)
  for change in scene_pairs.CHANGES:
    for _ in range(2):
      caption, other = scene_pairs.draw(rng, split, (split,), change, 0.5)
      assert world.split_of(caption) == world.split_of(other) == split
      assert world.parse(world.caption(other)) == other != caption
      things = list(zip(caption.things, other.things, strict=False))
      differs = {field for a, b in things for field in a._fields if getattr(a, field) != getattr(b, field)}
      if change in shapes.Attributes._fields:
        assert differs | ({"background"} if caption.background != other.background else set()) == {change}
      if change == "swapped_looks":
        (field,) = differs
        assert field not in ("speed", "direction")
        assert {getattr(a, field) for a, _ in things} == {getattr(b, field) for _, b in things}
      if change in ("missing", "extra"):
        assert len(other.things) - len(caption.things) == (1 if change == "extra" else -1)


def test_bindings_exchange_hues():
  caption, other = scene_pairs.draw(np.random.default_rng(1), "train", ("train",), "binding", 0.0)
  texts = world.caption(caption), world.caption(other)
  hues = [{word for word in text.split() if word in ("blue", "green")} for text in texts]
  assert hues == [{"blue", "green"}] * 2
  assert len({text.replace("dark blue", "").replace("dark green", "") for text in texts}) == 2


def test_the_codec_sees_five_frames_and_gives_the_last():
  """A codec that brightens what it was given: the first pair went through it, the second did not."""
  seen = []

  def codec(frames, noise, key):
    seen.append(frames.shape)
    return frames[-1] * 0.0 + 0.5

  config = PairConfig(on_frames=True, milder_probability=0.0)
  pairs = preferences.draw_pairs(np.random.default_rng(0), config, 2, 1, "color")
  times = np.zeros(1, np.int32)
  clips = pair_frames.pair_clips(pairs, times, 1)
  better, _ = jax.jit(lambda clips: pair_frames.draw(clips, times, codec))(clips)
  assert set(seen) == {(pair_frames.CODEC_CONTEXT, 64, 64, 3)}
  assert better.shape == (2, 1, 64, 64, 3)
  np.testing.assert_array_equal(better[0], np.full((1, 64, 64, 3), 191, np.uint8))
  assert np.ptp(better[1]) > 50


def test_single_frames_show_their_corruption():
  config = PairConfig(on_frames=True, milder_probability=0.0, soft_probability=0.0)
  pairs = preferences.draw_pairs(np.random.default_rng(1), config, 64, 1)
  kinds = {NAMES[pair.kind] for pair in pairs}
  assert kinds <= {name for name, corruption in CORRUPTIONS.items() if corruption.on_frames}
  assert len(kinds) > 8
  times = np.zeros(1, np.int32)
  better, worse = jax.device_get(_draw(pair_frames.pair_clips(pairs, times, 0), times))
  changed = np.abs(better.astype(int) - worse.astype(int)).max(axis=(1, 2, 3, 4))
  # An object that is behind the other one may hide its defect.
  assert np.mean(changed > 10) > 0.95


def test_emphasis_multiplies_the_odds():
  config = lambda many: PairConfig(on_frames=False, emphasis=(("background", many),))
  shares = {many: dict(zip(NAMES, preferences.shares(config(many)), strict=True)) for many in (1.0, 3.0)}
  odds = lambda of: of["background"] / of["color"]
  np.testing.assert_allclose(odds(shares[3]), 3 * odds(shares[1]), rtol=1e-5)
  np.testing.assert_allclose(sum(shares[3].values()), 1.0, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mixed_shape", "noise"])
def test_the_milder_defect_is_the_same_one(kind):
  config = PairConfig(on_frames=False, milder_probability=1.0, soft_probability=0.0, late_probability=0.0)
  pairs = preferences.draw_pairs(np.random.default_rng(0), config, 16, _LENGTH, kind)
  field = {"mixed_shape": "mix_shape", "noise": "noise"}[kind]
  amounts = [(getattr(pair.better.look, field), getattr(pair.worse.look, field)) for pair in pairs]
  assert all(0.0 <= mild < strong for mild, strong in amounts)
  assert any(mild > 0 for mild, _ in amounts)
