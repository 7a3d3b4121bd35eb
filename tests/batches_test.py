"""What the tiny DiT is trained on, checked against what the sampler will do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import preset
from streamt1_jax.training import batches, noise_coupling
from streamt1_jax.training.batches import BatchConfig, ClipKind
from streamt1_jax.training.dataset import Dataset

MODEL = preset("tiny")
SIGMAS = jnp.array([1.0, 0.9375, 0.8333, 0.625])
SCENES, STARTS, ROLLOUTS = 5, 4, 3
CONFIG = BatchConfig(
  clips=6,
  second_clips=12,
  second_copies=3,
  first_scenes=8,
  first_copies=16,
  step_weights=(0.25, 0.25, 0.25, 0.25),
  context_noise=0.1,
  omit_probability=0.3,
  ambiguous_weight=1.0,
  extra_context_probability=0.5,
  added_sinks_probability=0.0,
  rollout_probability=0.0,
)


def chosen_start(noise):
  """Row of `START_POSITIONS` that noise `[..., F, C, H, W]` says: the 16 cells of frame 0, x over y, by their sums."""
  frame = np.asarray(noise)[..., 0, :, :, :].sum(axis=-3)
  *lead, height, width = frame.shape
  cells = frame.reshape(*lead, 4, height // 4, 4, width // 4).sum(axis=(-3, -1))
  return cells.swapaxes(-1, -2).reshape(*lead, 16).argmax(axis=-1)


CLIPS = 40
LATE, SWITCH = np.arange(CLIPS) % 2 == 1, np.tile([0, 0, 1, 4, 2, 0, 3, 4, 4, 4], 4).astype(np.int32)
"""For every clip: whether its first chunk is of an older caption, and with which chunk the caption changes."""
KINDS = ClipKind(
  switch=np.where(LATE & (SWITCH > 0), 4, SWITCH),
  late=LATE,
  gap=np.where(np.arange(CLIPS) % 20 == 10, 1 + np.arange(CLIPS) // 3, 0).astype(np.int32),
)


@pytest.fixture(scope="module")
def data() -> Dataset:
  """Latents that name their origin: clip s, chunk c is filled with 10 s + c, first chunks of scene s with 10 s + i."""
  ones = np.ones(MODEL.latent_shape, np.float32)
  index = lambda *counts: np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), axis=-1)
  fill = lambda values: jnp.asarray(values.astype(np.float32)[..., None, None, None, None] * ones)
  tokens = lambda scenes: jnp.asarray(1 + np.arange(scenes * 16 * 3).reshape(scenes, 16, 3), jnp.int32)
  rng = np.random.default_rng(0)
  of_both = lambda below: jnp.asarray(rng.integers(below, size=(SCENES, 2)), jnp.int32)
  return Dataset(
    clips=fill(index(CLIPS, batches.CHUNKS) @ np.array([10.0, 1.0])),
    tokens=tokens(CLIPS),
    sink_tokens=-tokens(CLIPS)[:, 0],
    **jax.tree.map(jnp.asarray, KINDS)._asdict(),
    first=fill(index(SCENES, STARTS) @ np.array([10.0, 1.0])),
    first_start=jnp.asarray(np.stack([rng.permutation(16)[:STARTS] for _ in range(SCENES)]), jnp.int32),
    first_tokens=tokens(SCENES),
    values=jnp.stack([of_both(2), of_both(2)], axis=2),
    colors=of_both(6),
    background=of_both(4)[:, 0],
    ambiguous=jnp.asarray([True] + [False] * (SCENES - 1)),
    made=1000.0 + fill(index(ROLLOUTS, batches.CHUNKS) @ np.array([10.0, 1.0])),
  )


@pytest.fixture(scope="module")
def first_chunks(data):
  draw = jax.jit(lambda key: batches.draw_first_chunks(key, data, CONFIG, SIGMAS))
  return jax.tree.map(np.asarray, draw(jax.random.key(3)))


class TestFirstChunks:
  def clean(self, first_chunks):
    """What Euler's step down to sigma = 0 along the target arrives at."""
    return first_chunks.noisy - np.asarray(SIGMAS)[first_chunks.step][..., None, None, None, None] * first_chunks.target

  def named(self, first_chunks):
    """Scene and start of every target."""
    return np.divmod(np.rint(self.clean(first_chunks)[..., 0, 0, 0, 0]).astype(int), 10)

  def test_the_target_leads_to_a_clip_of_the_captioned_scene(self, first_chunks):
    clean = self.clean(first_chunks)
    spread = clean.max(axis=(2, 3, 4, 5)) - clean.min(axis=(2, 3, 4, 5))
    np.testing.assert_allclose(spread, 0.0, atol=0.01)
    captioned = (first_chunks.tokens[:, 0] - 1) // 48
    np.testing.assert_array_equal(self.named(first_chunks)[0], np.repeat(captioned[:, None], 16, axis=1))

  def test_the_input_of_coupled_steps_chooses_the_start(self, first_chunks, data):
    scene, start = self.named(first_chunks)
    chosen = chosen_start(first_chunks.noisy)
    coupled = first_chunks.step < batches.COUPLED_STEPS
    assert coupled.any()
    assert not coupled.all()
    assert first_chunks.valid[~coupled].all()
    # The latents of this data outweigh the noise at sigma = .9375, those of the world do not.
    assert first_chunks.valid[first_chunks.step == 0].all()
    right = chosen == np.asarray(data.first_start)[scene, start]
    assert right[coupled & first_chunks.valid].all()
    assert right[~coupled].mean() < 0.5
    assert len(np.unique(start[coupled])) == STARTS

  def test_what_a_caption_omits_is_said_by_the_input(self, first_chunks, data):
    scene, caption = np.divmod((first_chunks.tokens[:, 0] - 1) // 3, 16)
    # Where nothing is coupled the input says nothing; at sigma = 1 it is the noise alone. The sign of the sum of a
    # latent frame: the second says sizes, the third speeds; half of the channels are about the first object.
    for position, (thing, field) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
      omits = caption // 2 ** (3 - position) % 2 == 1
      channels = np.arange(16).reshape(2, 8)[thing]
      said = (first_chunks.noisy[:, :, 1 + field, channels].sum(axis=(2, 3, 4)) > 0).astype(int)
      where = (first_chunks.step == 0) & omits[:, None]
      assert where.any()
      truth = np.asarray(data.values)[scene, thing, field]
      np.testing.assert_array_equal(said[where], np.broadcast_to(truth[:, None], said.shape)[where])

  def test_ambiguous_scenes_come_as_often_as_asked(self, data):
    config = dataclasses.replace(CONFIG, first_scenes=2000, first_copies=1, ambiguous_weight=3.0)
    data = data._replace(first=data.first[..., :1, :4, :4])
    data = data._replace(first=jnp.broadcast_to(data.first, (*data.first.shape[:3], 2, 4, 4)))
    draw = jax.jit(lambda key, data: batches.draw_first_chunks(key, data, config, SIGMAS).tokens)
    tokens = draw(jax.random.key(7), data)
    share = np.mean((np.asarray(tokens)[:, 0] - 1) // 48 == 0)
    expected = 3 / (3 + SCENES - 1)
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_rolled_noise_is_the_same_noise():
  """A roll moves whole cells of the first frame, so that no number is new, and the start is the one asked for."""
  noise = jax.random.normal(jax.random.key(0), MODEL.latent_shape)
  before = jnp.zeros_like(noise)
  for start in (0, 5, 15):
    rolled, found = noise_coupling.rolled(noise, before, jnp.float32(1.0), jnp.int32(start))
    assert found
    assert chosen_start(rolled) == start
    np.testing.assert_array_equal(rolled[1:], noise[1:])
    np.testing.assert_array_equal(np.sort(rolled[0], axis=None), np.sort(noise[0], axis=None))


@pytest.fixture(scope="module")
def clips(data):
  draw = jax.jit(lambda key: batches.draw_clips(key, data, MODEL, CONFIG, SIGMAS))
  return jax.tree.map(np.asarray, draw(jax.random.key(4)))


def seen(number=300, **changes):
  """What chunks see in many clips of all kinds, with their first latent frames."""
  config = dataclasses.replace(CONFIG, **changes)
  keys = jax.random.split(jax.random.key(5), number)
  kind = jax.tree.map(lambda x: jnp.asarray(np.resize(x, number)), KINDS)
  place = jax.jit(jax.vmap(batches.draw_places))(keys, kind)
  odds = config.extra_context_probability, config.added_sinks_probability
  draw = lambda key, kind, place: batches.draw_seen(key, kind, place, MODEL, *odds)
  found = jax.jit(jax.vmap(draw))(keys, kind, place)
  return [jax.tree.map(np.asarray, x) for x in (kind, place, found)]


class TestClips:
  def test_input_and_target_belong_to_one_clip(self, clips, data):
    sigma = np.asarray(SIGMAS)[clips.step][..., None, None, None, None]
    clean = clips.noisy - sigma * clips.target
    named = np.rint(clean[..., 0, 0, 0, 0]).astype(int)
    np.testing.assert_allclose(clean, np.broadcast_to(named[..., None, None, None, None], clean.shape), atol=0.01)
    np.testing.assert_array_equal(named % 10, clips.place)
    np.testing.assert_array_equal(named // 10, np.repeat((clips.tokens[:, 0, :1] - 1) // 48, batches.ROWS, axis=1))
    np.testing.assert_array_equal(-clips.tokens[:, 1, 0] - 1, (clips.tokens[:, 0, 0] - 1) // 48 * 48)

  def test_context_is_the_clip_with_at_most_the_configured_noise(self, clips):
    scene = (clips.tokens[:, 0, 0] - 1) // 48
    expected = 10.0 * scene[:, None] + np.arange(batches.CHUNKS)
    noise = clips.clean - expected[..., None, None, None, None]
    level = noise.std(axis=(1, 2, 3, 4, 5))
    assert level.min() > 0.0
    assert level.max() < 1.1 * CONFIG.context_noise

  def test_the_past_may_be_what_the_model_made(self, data):
    config = dataclasses.replace(CONFIG, clips=200, rollout_probability=0.5)
    draw = jax.jit(lambda key: batches.draw_clips(key, data, MODEL, config, SIGMAS))
    drawn = jax.tree.map(np.asarray, draw(jax.random.key(8)))
    clip = (drawn.tokens[:, 0, 0] - 1) // 48
    past = np.rint(drawn.clean.mean(axis=(3, 4, 5)).mean(axis=2)) - 10 * clip[:, None] - np.arange(batches.CHUNKS)
    np.testing.assert_array_equal(past, np.where(past[:, :1] > 0, 1000, 0) * np.ones(batches.CHUNKS))
    assert 80 < (past[:, 0] == 1000).sum() < 120
    assert clip[past[:, 0] == 1000].max() == ROLLOUTS - 1
    assert clip.max() > ROLLOUTS
    # What is learned is true.
    sigma = np.asarray(SIGMAS)[drawn.step][..., None, None, None, None]
    clean = (drawn.noisy - sigma * drawn.target)[..., 0, 0, 0, 0]
    np.testing.assert_allclose(clean, 10 * clip[:, None] + drawn.place, atol=0.01)

  def test_what_comes_before_a_change_is_not_learned(self):
    (switch, late, gap), place, _ = seen()
    first = np.where(switch > 0, switch, np.where(late | (gap > 0), 3, 1))
    assert (place.min(axis=1) == first).all()
    # Half of the rows are the first new chunk. The others come equally often, or one time more.
    for row, begin in zip(place, switch, strict=True):
      rest, lowest = (row[batches.ROWS // 2 :], begin + 1) if begin else (row, row.min())
      np.testing.assert_array_equal(row[: len(row) - len(rest)], begin)
      counts = np.bincount(rest - lowest, minlength=batches.CHUNKS - lowest)
      assert counts.max() - counts.min() <= 1
    # Over many clips each of them comes.
    for begin in range(1, 5):
      assert set(place[switch == begin].flat) == set(range(begin, batches.CHUNKS))

  def test_a_chunk_sees_sink_window_and_older_chunks_once_each(self):
    (switch, *_), place, found = seen(extra_context_probability=0.5)
    seen_older = set()
    for clip in range(len(switch)):
      own = np.concatenate([np.arange(batches.CHUNKS), place[clip]])
      for row, chunk in enumerate(own):
        if row < batches.CHUNKS and chunk < switch[clip]:
          continue
        visible = found.chunks[clip, row][found.valid[clip, row]].tolist()
        required = {0, chunk - 2, chunk - 1} & set(range(chunk))
        assert len(visible) == len(set(visible))
        assert max(visible, default=-1) < chunk
        assert required <= set(visible)
        seen_older |= {(int(chunk), older) for older in set(visible) - required}
    assert seen_older == {(chunk, older) for chunk in range(7) for older in range(1, chunk - 2)}

  def test_what_came_before_a_change_is_computed_together(self):
    (switch, late, _), _, found = seen()
    for clip in np.flatnonzero(switch):
      together = set(range(switch[clip])) - ({0} if late[clip] else set())
      for chunk in together:
        visible = set(found.chunks[clip, chunk][found.valid[clip, chunk]].tolist())
        # The sink is from long ago or one of them: it is seen in either case.
        assert visible == set(range(switch[clip])) - {chunk}
      assert not (late[clip] and found.valid[clip, 0].any())
    np.testing.assert_array_equal(found.prompt[:, 0], late)
    assert (found.prompt[:, 1:] == 0).all()

  def test_distances(self):
    (switch, late, gap), place, found = seen()
    own = np.concatenate([np.tile(np.arange(7), (len(place), 1)), place], axis=1)
    apart = MODEL.chunk_frames * (own[:, :, None] - found.chunks)
    extra = found.distance - apart
    to_sink = (found.chunks == 0) & (own[:, :, None] > 0)
    assert (extra[~to_sink & found.valid] == 0).all()
    far = np.array([extra[clip][to_sink[clip] & found.valid[clip]].max(initial=0) for clip in range(len(place))])
    assert (far[(switch > 0) & ~late] == 0).all()
    plain = (switch == 0) & ~late
    assert 0.3 < (far[plain & (gap == 0)] == 0).mean() < 0.8
    assert far[plain].max() > batches.LONGEST_VIDEO < far[late].max()
    assert found.distance.max() < batches.LONGEST_DISTANCE
    # The world repeats after 48 latent frames.
    np.testing.assert_array_equal(far[plain] % 48, MODEL.chunk_frames * gap[plain])
    assert np.mean(far[late] % 48 == 0) < 0.2

  def test_added_sinks_lie_between_the_first_sink_and_the_window(self):
    chunk, place, valid, _ = self.added_sinks(0.5)
    window = chunk - batches.WINDOW
    assert ((place > 0) & (place < window[..., None]))[valid].all()
    for seen, counts in zip(place.reshape(-1, 4), valid.reshape(-1, 4), strict=True):
      assert len(set(seen[counts])) == counts.sum()
    assert set(range(1, 30)) <= set(place[valid]) <= set(range(1, 40))
    assert not valid[:, : batches.WINDOW + 1].any()

  def test_added_sinks_come_as_often_as_asked(self):
    chunk, _, valid, _ = self.added_sinks(0.3)
    full = chunk - batches.WINDOW - 1 >= batches.ADDED_SINKS
    full[:, : batches.WINDOW + 1] = False
    numbers = valid.sum(axis=2)[full]
    expected = np.array([0.7, *[0.3 / 4] * 4])
    error = (expected * (1 - expected) / len(numbers)) ** 0.5
    np.testing.assert_array_less(np.abs(np.bincount(numbers, minlength=5) / len(numbers) - expected), 4 * error)

  def test_added_sinks_are_true_where_an_earlier_chunk_is(self):
    chunk, place, valid, source = self.added_sinks(1.0)
    viewer = np.arange(batches.CHUNKS)[None, :, None]
    back, in_clip = chunk[..., None] - place, viewer - source
    # Chunks repeat after 16; those of the clip are 1 to 5 before the viewer.
    has = np.isin(back % 16, np.arange(1, 6)) & (back % 16 < viewer)
    assert ((back - in_clip) % 16 == 0)[valid & has].all()
    assert 0.1 < has[valid].mean() < 0.6
    assert ((source > 0) & (source < viewer))[valid].all()

  def test_added_sinks_change_nothing_else(self):
    (*_, without), (*_, added) = seen(30), seen(30, added_sinks_probability=0.9)
    assert added.valid[..., 4:].any()
    first = added._replace(**{name: getattr(added, name)[..., :4] for name in ("chunks", "valid", "distance")})
    jax.tree.map(np.testing.assert_array_equal, without, first)

  def added_sinks(self, probability):
    """By chunks: where the viewer is, where the sinks are, whether they count, and which chunks stand for them."""
    frame_keys, sink_keys = jax.random.split(jax.random.key(8), (2, 1500))
    # Sinks of an older caption may be any time away.
    late = ClipKind(jnp.int32(0), jnp.bool(True), jnp.int32(0))
    frames = jax.jit(jax.vmap(lambda key: batches.draw_first_frames(key, late, MODEL)))(frame_keys)
    draw = lambda key, frames: batches.draw_added_sinks(key, frames, MODEL, probability)
    frames, source, moved, valid = map(np.asarray, (frames, *jax.jit(jax.vmap(draw))(sink_keys, frames)))
    keep = frames.max(axis=1) < batches.LONGEST_VIDEO
    frames, source, moved, valid = frames[keep], source[keep], moved[keep], valid[keep]
    place = (frames[np.arange(len(frames))[:, None, None], source] + moved) // MODEL.chunk_frames
    return frames // MODEL.chunk_frames, place, valid, source


@pytest.fixture(scope="module")
def seconds(data):
  draw = jax.jit(lambda key: batches.draw_second_chunks(key, data, MODEL, CONFIG, SIGMAS))
  return jax.tree.map(np.asarray, draw(jax.random.key(6)))


class TestSecondChunks:
  def test_input_and_target_belong_to_the_second_chunk_of_the_clip_in_the_context(self, seconds):
    sigma = np.asarray(SIGMAS)[seconds.step][..., None, None, None, None]
    clean = (seconds.noisy - sigma * seconds.target)[..., 0, 0, 0, 0]
    context = np.rint(seconds.clean.mean(axis=(2, 3, 4, 5)))
    np.testing.assert_allclose(clean, np.broadcast_to(context + 1, clean.shape), atol=0.01)
    np.testing.assert_array_equal(context % 10, 0)
    assert 0 < np.abs(seconds.clean - context[..., None, None, None, None]).max() < 6 * CONFIG.context_noise

  def test_both_chunks_are_under_the_caption(self, seconds):
    clip = np.rint(seconds.clean.mean(axis=(1, 2, 3, 4, 5)) / 10).astype(int)
    switch = KINDS.switch[clip]
    assert not (LATE[clip] | (KINDS.gap[clip] > 0)).any()
    assert not (switch == 1).any()
    caption = seconds.tokens[:, 0, 0]
    np.testing.assert_array_equal(caption < 0, switch > 0)
    np.testing.assert_array_equal((np.abs(caption) - 1) // 48, clip)

  def test_it_sees_the_first_chunk_right_before_it(self, seconds):
    assert seconds.seen.chunks.max() == 0
    np.testing.assert_array_equal(seconds.seen.valid[..., 0], np.broadcast_to([False, True, True, True], (12, 4)))
    np.testing.assert_array_equal(seconds.seen.distance[:, 1:], MODEL.chunk_frames)
    assert seconds.seen.prompt.max() == 0
