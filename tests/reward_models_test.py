"""HPSv3 and VideoAlign at tiny size: what the search relies on, and what comes in and goes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards import hpsv3, videoalign
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.hpsv3 import HPSv3, HPSv3Config
from streamt1_jax.rewards.qwen2_vl import decoder, preprocess
from streamt1_jax.rewards.qwen2_vl import model as qwen2_vl
from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, Qwen2VLConfig, VisionConfig, qwen2_vl_preset
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.videoalign import VideoAlign, VideoAlignConfig

_BACKBONE = Qwen2VLConfig(
  VisionConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, patch_size=4),
  DecoderConfig(dim=16, ffn_dim=24, num_heads=2, num_kv_heads=1, num_layers=2, vocab_size=40),
)
_PIXELS = {"min_pixels": 16 * 24, "max_pixels": 16 * 24}
_HPSV3 = HPSv3(HPSv3Config(_BACKBONE, head_dims=(12, 6), **_PIXELS))
_VIDEOALIGN = VideoAlign(8.0, VideoAlignConfig(_BACKBONE, **_PIXELS))
_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))
_FRAME = (20, 30, 3)


def _random(abstract_params, dtype=None):
  """Every parameter filled; scales differ from 1 and biases from 0."""
  leaves, structure = jax.tree.flatten(abstract_params)
  generator = np.random.default_rng(0)
  fill = lambda leaf: generator.normal(size=leaf.shape) * (leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.5) + 0.1
  return jax.tree.unflatten(structure, [jnp.asarray(fill(leaf), dtype or leaf.dtype) for leaf in leaves])


@pytest.fixture(scope="module")
def hpsv3_params():
  return _random(hpsv3.abstract_params(_HPSV3.config))


@pytest.fixture(scope="module")
def videoalign_params():
  return _random(videoalign.abstract_params(_VIDEOALIGN.config))


def _frames(count: int, seed: int = 0, size=_FRAME) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (count, *size)), jnp.uint8)


def _tokens(after, reward_index) -> PromptTokens:
  return PromptTokens(jnp.arange(3), jnp.asarray(after), jnp.asarray(reward_index, jnp.int32))


class TestHPSv3:
  def test_chunk_score_is_the_mean_over_frames(self, hpsv3_params):
    frames, tokens = _frames(3), _tokens([5, 9, 2, 7], [3])

    @jax.jit
    def score(params, frames):
      condition = _HPSV3.init(params, tokens)
      return _HPSV3(params, condition, frames, _INFO), _HPSV3.frame_scores(params, condition, frames)

    mean, each = score(hpsv3_params, frames)
    assert each.shape == (3, 2)
    assert np.ptp(each[:, 0]) > 1e-3
    np.testing.assert_allclose(mean, np.mean(each[:, 0]), rtol=1e-6)
    alone = jnp.concatenate([score(hpsv3_params, frames[index : index + 1])[1] for index in range(3)])
    np.testing.assert_allclose(each, alone, atol=1e-5)

  def test_padding_after_the_reward_token_is_free(self, hpsv3_params):
    @jax.jit
    def score(params, tokens):
      return _HPSV3.frame_scores(params, _HPSV3.init(params, tokens), _frames(1))

    first, second = (score(hpsv3_params, _tokens([5, 9, 2, 7, *tail], [3])) for tail in ([1, 1], [30, 31]))
    np.testing.assert_array_equal(first, second)
    other = score(hpsv3_params, _tokens([5, 9, 3, 7, 1, 1], [3]))
    assert np.abs(first - other).max() > 1e-3

  def test_head_stays_float32(self):
    abstract = hpsv3.abstract_params(_HPSV3.config, jnp.bfloat16)
    params = _random(abstract)
    result = jax.jit(lambda p: _HPSV3.frame_scores(p, _HPSV3.init(p, _tokens([5, 9], [1])), _frames(2)))(params)
    assert result.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params["head"])} == {jnp.dtype(jnp.float32)}
    # bfloat16 has 8 bits: a float32 result that were one of its values twice would be an accident.
    assert not np.array_equal(result, result.astype(jnp.bfloat16).astype(jnp.float32))


class TestVideoAlign:
  def test_windows_of_every_length(self, videoalign_params):
    """Under the search's vmaps, a partly used window scores as the video it holds."""
    beams, candidates, capacity, chunk = 2, 2, 9, 3
    past = _frames(beams * capacity, 1).reshape(beams, capacity, *_FRAME)
    chunks = _frames(beams * candidates * chunk, 2).reshape(beams, candidates, chunk, *_FRAME)
    tokens = _tokens([5, 9, 2, 7, 11, 4], [1, 3, 5])

    @jax.jit
    def search(params, num_past):
      condition = _VIDEOALIGN.init(params, tokens)
      score = lambda past, chunk: _VIDEOALIGN(params, condition, FrameWindow(past, num_past, chunk), _INFO)
      return jax.vmap(jax.vmap(score, in_axes=(None, 0)))(past, chunks)

    @jax.jit
    def alone(params, frames):
      return _VIDEOALIGN.overall(_VIDEOALIGN.raw_scores(params, _VIDEOALIGN.init(params, tokens), frames))

    for num_past in (0, 1, 9):
      found = search(videoalign_params, jnp.int32(num_past))
      for beam in range(beams):
        video = np.concatenate([past[beam, :num_past], chunks[beam, 1]])
        sampled = preprocess.sample_frames(len(video), 8.0)
        np.testing.assert_allclose(found[beam, 1], alone(videoalign_params, video[sampled]), atol=1e-4)

  @pytest.mark.parametrize("patches_at_once", [24, 1000])
  def test_one_program_for_every_count(self, monkeypatch, videoalign_params, patches_at_once):
    """Frames after the first `count` change nothing, not one bit, and the scores are those of the shorter video."""
    monkeypatch.setattr(qwen2_vl, "_PATCHES_AT_ONCE", patches_at_once)  # slices one by one, or all together
    tokens = _tokens([5, 9, 2, 7, 11, 4], [1, 3, 5])
    first, second = _frames(8, 1), _frames(8, 2)

    @jax.jit
    def scores(params, frames, count=None):
      return _VIDEOALIGN.raw_scores(params, _VIDEOALIGN.init(params, tokens), frames, count)

    for count in (2, 4, 6, 8):
      found = scores(videoalign_params, first, jnp.int32(count))
      other = jnp.concatenate([first[:count], second[count:]])
      np.testing.assert_array_equal(found, scores(videoalign_params, other, jnp.int32(count)))
      # Sums over a longer, partly hidden sequence are rounded in another order.
      np.testing.assert_allclose(found, scores(videoalign_params, first[:count]), rtol=1e-5, atol=1e-6)

  def test_only_text_alignment_reads_the_prompt(self, videoalign_params):
    @jax.jit
    def score(params, tokens):
      return _VIDEOALIGN.raw_scores(params, _VIDEOALIGN.init(params, tokens), _frames(4))

    first, second = (score(videoalign_params, _tokens([5, 9, 2, caption, 4], [0, 2, 4])) for caption in (20, 21))
    np.testing.assert_array_equal(first[:2], second[:2])
    assert abs(first[2] - second[2]) > 1e-4

  def test_one_frame_is_refused(self, videoalign_params):
    window = FrameWindow(_frames(0), jnp.int32(0), _frames(1))
    condition = _VIDEOALIGN.init(videoalign_params, _tokens([5], [0]))
    with pytest.raises(ConfigError, match="at least 2 frames to be judged, got 1"):
      _VIDEOALIGN(videoalign_params, condition, window, _INFO)

  def test_overall_is_the_sum_of_z_scores(self):
    reward = VideoAlign(16.0)
    raw = jnp.array([3.6757 + 2.2476, 1.1646 - 1.3811, 2.8105 + 2 * 2.5121])
    np.testing.assert_allclose(reward.normalise(raw), [1.0, -1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(reward.overall(raw), 2.0, atol=1e-6)
    plain = dataclasses.replace(reward, normalised=False)
    np.testing.assert_allclose(plain.overall(raw), raw.sum(), atol=1e-6)

  def test_bfloat16_head_rounds_scores(self, videoalign_params):
    config = dataclasses.replace(_VIDEOALIGN.config, head_dtype="bfloat16")
    reward = dataclasses.replace(_VIDEOALIGN, config=config)
    tokens = _tokens([5, 9, 2], [0, 1, 2])
    scores = lambda reward: jax.jit(lambda params: reward.raw_scores(params, reward.init(params, tokens), _frames(4)))(
      videoalign_params
    )
    rounded, exact = scores(reward), scores(_VIDEOALIGN)
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(rounded, exact, rtol=0.02, atol=0.02)
    assert not np.array_equal(rounded, exact)


class TestPreprocess:
  @pytest.mark.parametrize(
    ("size", "of_hpsv3", "of_videoalign"),
    [
      ((480, 832), (336, 588), (336, 588)),
      ((832, 480), (588, 336), (588, 336)),
      ((720, 1280), (336, 588), (336, 588)),
      ((512, 512), (448, 448), (448, 448)),
      ((240, 416), (364, 616), (252, 420)),
      ((64, 64), (448, 448), (336, 336)),
    ],
  )
  def test_published_sizes(self, size, of_hpsv3, of_videoalign):
    """The table in docs/reference/rewards.md."""
    assert preprocess.smart_resize(*size, 28, HPSv3Config().min_pixels, HPSv3Config().max_pixels) == of_hpsv3
    config = VideoAlignConfig()
    assert preprocess.smart_resize(*size, 28, config.min_pixels, config.max_pixels) == of_videoalign

  @pytest.mark.parametrize(
    ("size", "new_size"),
    [((480, 832), (336, 588)), ((33, 57), (84, 140)), ((100, 40), (28, 112)), ((5, 3), (28, 28)), ((90, 90), (90, 31))],
  )
  def test_bytes_are_pillows(self, size, new_size):
    frames = _frames(2, size=(*size, 3))
    found = jax.jit(preprocess.resize_like_pillow, static_argnums=1)(frames, new_size)
    for frame, pixels in zip(found, np.asarray(frames), strict=True):
      # In two calls, because the order of the passes depends on Pillow's version; both calls round to bytes.
      columns = Image.fromarray(pixels).resize((new_size[1], size[0]), Image.Resampling.BICUBIC)
      np.testing.assert_array_equal(frame, columns.resize(new_size[::-1], Image.Resampling.BICUBIC))

  @pytest.mark.parametrize(("total", "fps"), [(0, 16.0), (1, 16.0), (9, 0.0), (9, float("nan"))])
  def test_videos_that_cannot_be_sampled(self, total, fps):
    with pytest.raises(ConfigError, match="at least 2 frames|fps must be positive"):
      preprocess.sample_frames(total, fps)

  def test_patch_order(self):
    """Every number of a patch says where it comes from: token, patch in token, channel, frame, row, column."""
    config = VisionConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1, patch_size=4)
    frames, height, width = 4, 16, 24
    index = np.arange(frames * height * width * 3).reshape(frames, height, width, 3)
    patches = np.asarray(preprocess.to_patches(jnp.asarray(index, jnp.float32), config))
    assert patches.shape == (2, 24, 96)
    for s, token_row, token_column, row, column, channel, frame, y, x in np.random.default_rng(0).integers(
      0, (2, 2, 3, 2, 2, 3, 2, 4, 4), (50, 9)
    ):
      patch = ((token_row * 3 + token_column) * 2 + row) * 2 + column
      value = patches[s, patch, ((channel * 2 + frame) * 4 + y) * 4 + x]
      assert value == index[2 * s + frame, (2 * token_row + row) * 4 + y, (2 * token_column + column) * 4 + x, channel]


class TestConfig:
  def test_presets(self):
    large = qwen2_vl_preset("qwen2_vl_7b", vocab_size=151658)
    assert (large.decoder.dim, large.decoder.head_dim, large.decoder.vocab_size) == (3584, 128, 151658)
    assert qwen2_vl_preset("qwen2_vl_2b").decoder.head_dim == 128
    assert large.vision.head_dim == 80
    assert large.rope_dtype == "bf16_reference"

  @pytest.mark.parametrize(
    ("make", "message"),
    [
      (lambda: qwen2_vl_preset("qwen"), "unknown Qwen2-VL preset 'qwen'; allowed: qwen2_vl_2b"),
      (lambda: VisionConfig(dim=36, num_heads=6), "vision dim 36 must be num_heads"),
      (lambda: DecoderConfig(30, 8, 4, 2, 1, 9), "decoder dim 30 must be a multiple"),
      (lambda: DecoderConfig(32, 8, 4, 3, 1, 9), "num_heads 4 must be a multiple of num_kv_heads 3"),
      (lambda: dataclasses.replace(_BACKBONE, rope_dtype="bf16"), "rope_dtype must be one of bf16_reference, float32"),
      (lambda: VideoAlignConfig(head_dtype="int8"), "head_dtype must be float32 or bfloat16"),
    ],
  )
  @pytest.mark.usefixtures("unchecked_types")
  def test_faults(self, make, message):
    with pytest.raises(ConfigError, match=message):
      make()


class TestInBlocks:
  """What is computed a part at a time, to bound memory, is what it is as a whole."""

  @pytest.mark.parametrize("length", [5, 8, 19])
  def test_causal_attention(self, monkeypatch, length):
    generator = np.random.default_rng(length)
    q, k, v = (jnp.asarray(generator.normal(size=(length, heads, 6)), jnp.float32) for heads in (4, 2, 2))
    scores = np.einsum("tkgd,skd->kgts", q.reshape(length, 2, 2, 6), k) / 6**0.5
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("kgts,skd->tkgd", weights, v).reshape(length, 4, 6)
    for queries in (1024, 8, 3):
      monkeypatch.setattr(decoder, "_QUERIES_AT_ONCE", queries)
      np.testing.assert_allclose(decoder.causal_attention(q, k, v), expected, atol=1e-5)

  @pytest.mark.parametrize("patches", [1, 24, 48, 1000])
  def test_slices(self, monkeypatch, videoalign_params, patches):
    monkeypatch.setattr(qwen2_vl, "_PATCHES_AT_ONCE", patches)
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(4, 24, 96)), jnp.float32)
    backbone = _VIDEOALIGN.model(videoalign_params).backbone
    expected = backbone.vision(pixels, (4, 6))
    np.testing.assert_allclose(backbone.see(pixels, (4, 6)), expected.reshape(-1, 16), atol=1e-5)

  def test_batches_leave_no_remainder(self):
    found = [qwen2_vl.whole_batch(12, most) for most in (1, 4, 5, 7, 100)]
    assert found == [1, 4, 4, 6, 12]
    assert qwen2_vl.whole_batch(7, 3) == 1

  def test_frames(self, hpsv3_params):
    frames, tokens = _frames(6), _tokens([5, 9, 2, 7], [3])
    scores = [
      jax.jit(lambda params, reward=reward: reward.frame_scores(params, reward.init(params, tokens), frames))(
        hpsv3_params
      )
      for reward in (
        _HPSV3,
        dataclasses.replace(_HPSV3, tokens_at_once=1),
        dataclasses.replace(_HPSV3, tokens_at_once=30),
      )
    ]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-5)
