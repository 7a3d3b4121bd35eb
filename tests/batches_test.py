"""What the tiny DiT is trained on, checked against what the sampler will do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import preset
from streamt1_jax.data import shapes
from streamt1_jax.training import batches, noise_coupling
from streamt1_jax.training.batches import BatchConfig
from streamt1_jax.training.dataset import Dataset

MODEL = preset("tiny")
SIGMAS = jnp.array([1.0, 0.9375, 0.8333, 0.625])
SCENES = 5
CONFIG = BatchConfig(
  clips=6,
  first_scenes=8,
  first_copies=16,
  step_weights=(0.25, 0.25, 0.25, 0.25),
  context_noise=0.1,
  omit_probability=0.3,
  ambiguous_weight=1.0,
  extra_context_probability=0.5,
  added_sinks_probability=0.0,
)


@pytest.fixture(scope="module")
def data() -> Dataset:
  """Latents that name their origin: clip s, start i, chunk c is filled with 1000 s + 10 i + c."""
  ones = np.ones(MODEL.latent_shape, np.float32)
  index = lambda *counts: np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), axis=-1)
  clips = index(SCENES, 3, batches.CHUNKS) @ np.array([1000.0, 10.0, 1.0])
  first = index(SCENES, 16) @ np.array([1000.0, 10.0])
  fill = lambda values: jnp.asarray(values.astype(np.float32)[..., None, None, None, None] * ones)
  tokens = 1 + np.arange(SCENES * 4 * 3).reshape(SCENES, 4, 3)
  attributes = np.asarray(shapes.scenes_in("train"), np.int32)[:SCENES]
  return Dataset(jnp.asarray(attributes), fill(clips), fill(first), jnp.asarray(tokens))


@pytest.fixture(scope="module")
def first_chunks(data):
  draw = jax.jit(lambda key: batches.draw_first_chunks(key, data, CONFIG, SIGMAS))
  return jax.tree.map(np.asarray, draw(jax.random.key(3)))


class TestFirstChunks:
  def clean(self, first_chunks):
    """What Euler's step down to sigma = 0 along the target arrives at."""
    return first_chunks.noisy - np.asarray(SIGMAS)[first_chunks.step][..., None, None, None, None] * first_chunks.target

  def test_the_target_leads_to_a_clip_of_the_captioned_scene(self, first_chunks):
    clean = self.clean(first_chunks)
    spread = clean.max(axis=(2, 3, 4, 5)) - clean.min(axis=(2, 3, 4, 5))
    np.testing.assert_allclose(spread, 0.0, atol=0.01)
    captioned = (first_chunks.tokens[:, 0] - 1) // 12
    np.testing.assert_array_equal(np.rint(clean[..., 0, 0, 0, 0]) // 1000, np.repeat(captioned[:, None], 16, axis=1))

  def test_the_input_of_coupled_steps_chooses_the_start(self, first_chunks):
    start = np.rint(self.clean(first_chunks)[..., 0, 0, 0, 0]) % 1000 // 10
    chosen = np.asarray(jax.jit(jax.vmap(jax.vmap(noise_coupling.start_index)))(jnp.asarray(first_chunks.noisy)))
    coupled = first_chunks.step < batches.COUPLED_STEPS
    assert coupled.any()
    assert not coupled.all()
    np.testing.assert_array_equal(start[coupled], chosen[coupled])
    assert len(np.unique(start[coupled])) > 8

  def test_what_a_caption_omits_is_said_by_the_input(self, first_chunks, data):
    scene, caption = np.divmod((first_chunks.tokens[:, 0] - 1) // 3, 4)
    attributes = shapes.Attributes(*np.asarray(data.attributes)[scene].T)
    # Where nothing is coupled the input says nothing; at sigma = 1 it is the noise alone.
    # The sign of the sum of a latent frame: the second says the size, the third the speed.
    for omits, frame, truth in ((caption % 2 == 1, 1, attributes.size), (caption // 2 == 1, 2, attributes.speed)):
      said = (first_chunks.noisy[:, :, frame].sum(axis=(2, 3, 4)) > 0).astype(int)
      where = (first_chunks.step == 0) & omits[:, None]
      assert where.any()
      np.testing.assert_array_equal(said[where], np.broadcast_to(truth[:, None], said.shape)[where])

  def test_ambiguous_scenes_come_as_often_as_asked(self, data):
    scenes = shapes.scenes_in("train")
    repeat = lambda x: jnp.repeat(x[:1], len(scenes), axis=0)
    tokens = jnp.arange(len(scenes) * 4 * 3).reshape(len(scenes), 4, 3)
    data = Dataset(jnp.asarray(scenes, jnp.int32), data.clips, repeat(data.first), tokens)
    config = dataclasses.replace(CONFIG, first_scenes=4000, first_copies=1, ambiguous_weight=3.0)
    draw = jax.jit(lambda key, data: batches.draw_first_chunks(key, data, config, SIGMAS).tokens)
    scene = np.asarray(draw(jax.random.key(7), data))[:, 0] // 12
    captions = [shapes.caption(*attributes).split() for attributes in scenes]
    two = np.array([caption.count("blue") + caption.count("green") == 2 for caption in captions])
    assert 100 < two.sum() < 300
    expected = 3 * two.sum() / (3 * two.sum() + (~two).sum())
    assert abs(two[scene].mean() - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


_first_frames = jax.jit(jax.vmap(lambda key: batches.draw_first_frames(key, MODEL)))


@pytest.fixture(scope="module")
def clips(data):
  draw = jax.jit(lambda key: batches.draw_clips(key, data, MODEL, CONFIG, SIGMAS))
  return jax.tree.map(np.asarray, draw(jax.random.key(4)))


class TestClips:
  def test_input_and_target_belong_to_one_clip_in_its_order(self, clips):
    sigma = np.asarray(SIGMAS)[clips.step][..., None, None, None, None]
    clean = clips.noisy - sigma * clips.target
    named = np.rint(clean[..., 0, 0, 0, 0])
    np.testing.assert_allclose(clean, np.broadcast_to(named[..., None, None, None, None], clean.shape), atol=0.01)
    np.testing.assert_array_equal(named % 10, np.tile(np.arange(7), (CONFIG.clips, 1)))
    np.testing.assert_array_equal(named // 1000, np.repeat((clips.tokens[:, :1] - 1) // 12, 7, axis=1))

  def test_context_is_the_clip_with_at_most_the_configured_noise(self, clips):
    sigma = np.asarray(SIGMAS)[clips.step][..., None, None, None, None]
    noise = clips.clean - (clips.noisy - sigma * clips.target)
    level = noise.std(axis=(1, 2, 3, 4, 5))
    assert level.min() > 0.0
    assert level.max() < 1.1 * CONFIG.context_noise

  def test_positions_fit_the_longest_video(self):
    keys = jax.random.split(jax.random.key(5), 500)
    frames = np.asarray(_first_frames(keys))
    steps = np.diff(frames, axis=1)
    assert (frames[:, 0] == 0).all()
    assert (steps[:, 1:] == MODEL.chunk_frames).all()
    assert frames.max() == batches.LONGEST_VIDEO - MODEL.chunk_frames
    assert set(np.unique(frames) % MODEL.chunk_frames) == {0}

  def test_a_chunk_sees_sink_window_and_older_chunks_once_each(self):
    keys = jax.random.split(jax.random.key(6), 200)
    visible, valid = map(np.asarray, jax.jit(jax.vmap(lambda k: batches.draw_visible(k, 0.5)))(keys))
    seen_older = set()
    for clip in range(len(keys)):
      for chunk in range(batches.CHUNKS):
        seen = list(visible[clip, chunk][valid[clip, chunk]])
        required = sorted({0, chunk - 2, chunk - 1} & set(range(chunk)))
        assert len(seen) == len(set(seen))
        assert max(seen, default=-1) < chunk
        assert set(required) <= set(seen)
        seen_older |= {(chunk, int(older)) for older in set(seen) - set(required)}
    assert seen_older == {(chunk, older) for chunk in range(7) for older in range(1, chunk - 2)}

  def test_added_sinks_lie_between_the_first_sink_and_the_window(self):
    frames, source, moved, valid = self.added_sinks(0.5)
    place = (frames[np.arange(len(frames))[:, None, None], source] + moved) // MODEL.chunk_frames
    assert (moved % MODEL.chunk_frames == 0).all()
    window = frames // MODEL.chunk_frames - batches.WINDOW
    assert ((place > 0) & (place < window[..., None]))[valid].all()
    for seen, counts in zip(place.reshape(-1, 4), valid.reshape(-1, 4), strict=True):
      assert len(set(seen[counts])) == counts.sum()
    # The last of 40 chunks sees two in its window, so sinks lie at places up to 36; the very last are rare.
    assert set(range(1, 34)) <= set(place[valid]) <= set(range(1, 37))
    assert not valid[:, : batches.WINDOW + 1].any()

  def test_added_sinks_come_as_often_as_asked(self):
    frames, _, _, valid = self.added_sinks(0.3)
    full = frames // MODEL.chunk_frames - batches.WINDOW - 1 >= batches.ADDED_SINKS
    full[:, : batches.WINDOW + 1] = False
    numbers = valid.sum(axis=2)[full]
    expected = np.array([0.7, *[0.3 / 4] * 4])
    error = (expected * (1 - expected) / len(numbers)) ** 0.5
    np.testing.assert_array_less(np.abs(np.bincount(numbers, minlength=5) / len(numbers) - expected), 4 * error)

  def test_added_sinks_are_true_where_an_earlier_chunk_is(self):
    frames, source, moved, valid = self.added_sinks(1.0)
    viewer = np.arange(batches.CHUNKS)[None, :, None]
    # In latent frames: how far behind the viewer the sink is placed, and how far its chunk is in the clip.
    back = frames[..., None] - (frames[np.arange(len(frames))[:, None, None], source] + moved)
    in_clip = (viewer - source) * MODEL.chunk_frames
    true = (back - in_clip) % 16 == 0
    # Distances in the clip are 3, 6, 9, 12 and 15 latent frames at most; chunks repeat after 48.
    has = np.isin(back % 48, 3 * np.arange(1, 6)) & (back % 48 < 3 * viewer)
    assert true[valid & has].all()
    assert 0.1 < has[valid].mean() < 0.6
    assert ((source > 0) & (source < viewer))[valid].all()
    assert set(source[valid]) == set(range(1, batches.CHUNKS - 1))

  def test_added_sinks_change_nothing_else(self, data):
    key = jax.random.key(9)
    some = dataclasses.replace(CONFIG, added_sinks_probability=0.9)
    draw = jax.jit(batches.draw_clips, static_argnums=(2, 3))
    without, added = (draw(key, data, MODEL, config, SIGMAS) for config in (CONFIG, some))
    assert without.moved is None
    np.testing.assert_array_equal(added.moved[..., :4], 0)
    first = added._replace(visible=added.visible[..., :4], valid=added.valid[..., :4], moved=None)
    jax.tree.map(np.testing.assert_array_equal, without, first)

  def added_sinks(self, probability):
    frame_keys, sink_keys = jax.random.split(jax.random.key(8), (2, 1500))
    frames = _first_frames(frame_keys)
    draw = jax.jit(jax.vmap(lambda key, frames: batches.draw_added_sinks(key, frames, MODEL, probability)))
    return map(np.asarray, (frames, *draw(sink_keys, frames)))
