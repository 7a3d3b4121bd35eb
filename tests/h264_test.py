"""Windows through H.264: what is written, what comes back to the device, and where it cannot work."""

import dataclasses
import functools
import json
import re

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.cli import results
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.io import h264
from streamt1_jax.io.video import write_video
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards import window_codecs
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.coherence import SPEC as COHERENCE
from streamt1_jax.rewards.h264 import H264
from tests import small_search
from tests.command_line import generate, save_model, score

_PROMPT = "a red circle moves left"
_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))
# A pixel of another program may be one of 255 levels off, and what comes out of the file with it.
_ROUNDING = 1e-3


def _video(frames: int, size: int = 32, seed: int = 0) -> np.ndarray:
  """A bright square that moves over noise."""
  video = np.random.default_rng(seed).integers(0, 90, (frames, size, size, 3), np.uint8)
  for index, frame in enumerate(video):
    frame[8:16, index % (size - 8) : index % (size - 8) + 8] = (250, 40, 40)
  return video


def _round_trip(frames: np.ndarray) -> np.ndarray:
  return h264.decode(h264.encode(frames, fps=16, bit_rate=1_024_000))


@functools.partial(jax.jit, static_argnums=1)
def _coherence(frames, last):
  """The coherence of the window whose newest chunk has `last` frames."""
  past = frames[:-last]
  return COHERENCE.make(None, 16.0)({}, (), FrameWindow(past, len(past), frames[-last:]), _INFO)


class TestFile:
  def test_equal_frames_give_equal_files(self):
    noise = np.random.default_rng(0).integers(0, 64, (9, 64, 72, 3))
    frames = (noise + np.arange(64)[:, None, None]).astype(np.uint8)
    assert len({h264.encode(frames, fps=16, bit_rate=1_024_000) for _ in range(60)}) == 1

  def test_settings_are_the_released_ones(self, tmp_path):
    """x264 writes its settings into the file."""
    path = tmp_path / "video.mp4"
    path.write_bytes(h264.encode(_video(9), fps=16, bit_rate=1_024_000))
    settings = re.search(rb"options: [ -~]*", path.read_bytes()).group().decode()
    # The last two are those of the preset `medium`.
    assert {"rc=abr", "bitrate=1024", "threads=1", "subme=7", "ref=3"} <= set(settings.split())
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
      assert stream.frames == 9

  def test_frames_come_back_with_a_loss(self):
    video = _video(21, 64)
    found = _round_trip(video)
    assert found.shape == video.shape
    error = np.abs(found.astype(float) - video).mean()
    # The noise is in the colours too, whose resolution is halved.
    assert 1 < error < 25
    np.testing.assert_array_equal(_round_trip(video), found)


class TestWindow:
  @pytest.mark.parametrize("num_past", [0, 5, 12])
  def test_candidates_of_beams(self, num_past):
    """[K, B] windows of one length in one call; what is not valid in the past plays no role."""
    beams, candidates, capacity, own = 2, 3, 12, 4
    past = np.stack([_video(capacity, seed=k) for k in range(beams)])
    chunk = np.stack([[_video(own, seed=10 * k + b) for b in range(candidates)] for k in range(beams)])

    def taken(past, chunk, num_past):
      window = H264().window(FrameWindow(past, num_past, chunk))
      return window.take(jnp.minimum(jnp.arange(capacity + own), window.num_frames - 1)), window.chunk

    every = jax.vmap(jax.vmap(taken, in_axes=(None, 0, None)), in_axes=(0, 0, None))
    seen, newest = map(np.asarray, jax.jit(every)(past, chunk, jnp.int32(num_past)))
    for k, b in np.ndindex(beams, candidates):
      expected = _round_trip(np.concatenate([past[k, :num_past], chunk[k, b]]))
      np.testing.assert_array_equal(seen[k, b, : len(expected)], expected)
      np.testing.assert_array_equal(newest[k, b], expected[num_past:])

  def test_length_that_is_known(self):
    """The window keeps its fixed length: rewards compile for it alone."""
    past, chunk = _video(6), _video(4, seed=1)
    window = H264().window(FrameWindow(jnp.asarray(past), 5, jnp.asarray(chunk)))
    assert window.num_past == 5
    expected = _round_trip(np.concatenate([past[:5], chunk]))
    np.testing.assert_array_equal(window.take(np.arange(9)), expected)

  def test_none_changes_nothing(self):
    window = FrameWindow(np.zeros((2, 4)), 1, np.zeros((1, 4)))
    assert window_codecs.find("none").window(window) is window

  @pytest.mark.usefixtures("unchecked_types")
  @pytest.mark.parametrize(
    ("chunk", "message"),
    [
      (np.zeros((3, 8, 7, 3), np.uint8), "even height and width, got 8x7x3"),
      (np.zeros((3, 8, 8, 3), np.float32), "uint8 RGB frames, got float32 of 8x8x3"),
      (np.zeros((3, 16, 8, 8), np.uint8), "uint8 RGB frames, got uint8 of 16x8x8"),
    ],
  )
  def test_frames_that_cannot_be_written(self, chunk, message):
    with pytest.raises(ConfigError, match=message):
      H264().window(FrameWindow(chunk[:0], 0, chunk))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


class TestSearch:
  def test_the_video_reward_sees_the_file(self, model):
    """One beam: the winner's window is the whole video, and so is what the final choice judges."""
    pipeline = Pipeline.load(model)
    search = SearchConfig.released(top_k=1, sliding_window=2, reward_codec="h264")
    video = pipeline.generate(_PROMPT, num_latent_frames=6, search=search, seed=1)
    for trace, last, end in zip(video.traces, (9, 12), (9, 21), strict=True):
      seen = _coherence(_round_trip(video.frames[:end]), last)
      np.testing.assert_allclose(np.ravel(trace.candidates.long)[trace.survivor[0]], seen, atol=_ROUNDING)
      assert abs(seen - _coherence(video.frames[:end], last)) > 10 * _ROUNDING
    condition = pipeline.condition(_PROMPT, 2)
    beams = drivers.final_beams(pipeline.params, condition, pipeline.models, search, video.traces)
    np.testing.assert_allclose(beams.scores, [_coherence(_round_trip(video.frames), 12)], rtol=1e-5)
    np.testing.assert_allclose(video.score, beams.scores[0], atol=_ROUNDING)

  @pytest.mark.slow
  def test_same_scores_on_a_mesh(self, tmp_path, model):
    longs = []
    for name, mesh in (("whole", "data:1"), ("divided", "candidate:4")):
      arguments = (f"--checkpoint={model}", f"--prompt={_PROMPT}", "--num_latent_frames=6", "--sliding_window=2")
      options = ("--reward_codec=h264", f"--mesh={mesh}", f"--output_dir={name}")
      result = generate(tmp_path, *arguments, *options, one_device=False)
      assert result.code == 0, result
      folder = tmp_path / results.result_folder(name, _PROMPT)
      chunks = json.loads((folder / "trace.json").read_text())["chunks"]
      longs.append([candidate["long"] for chunk in chunks for candidate in chunk["candidates"]])
      assert json.loads((folder / "manifest.json").read_text())["settings"]["reward_codec"] == "h264"
    np.testing.assert_allclose(longs[0], longs[1], atol=_ROUNDING)

  @pytest.mark.usefixtures("unchecked_types")
  def test_refused_in_rollout(self):
    search = dataclasses.replace(small_search.SEARCH, reward_codec="h264")
    with pytest.raises(ConfigError, match="reward_codec h264 works on the host, .* use stream"):
      drivers.rollout(
        small_search.params(), small_search.condition(2), small_search.models(), search, num_chunks=2, seed=0
      )

  def test_unknown_codec(self):
    search = dataclasses.replace(small_search.SEARCH, reward_codec="av1")
    with pytest.raises(ConfigError, match="reward_codec must be one of none, h264, got 'av1'"):
      drivers.check_length(small_search.models(), search, 2)

  def test_refused_by_several_processes(self, monkeypatch):
    """The number of processes is all that matters here."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="reward_codec h264 works on the host of a single process, and there are 2"):
      window_codecs.require_usable("h264")
    assert window_codecs.require_usable("none").name == "none"

  def test_plain_streaming_takes_no_codec(self, tmp_path, model):
    arguments = (f"--checkpoint={model}", f"--prompt={_PROMPT}", "--search=none", "--reward_codec=h264")
    result = generate(tmp_path, *arguments)
    assert result.code == 2
    assert "--search=none takes no search flags, got --reward_codec" in result.stderr


def test_scoring(tmp_path):
  """The video reward sees the video's frames written anew, the image reward as they are."""
  write_video(tmp_path / "a.mp4", _video(12), fps=16)
  scores, arguments = {}, ("--videos=a.mp4", "--reward=quality+coherence")
  for codec in ("none", "h264"):
    result = score(tmp_path, *arguments, f"--reward_codec={codec}", f"--output={codec}.json")
    assert result.code == 0, result
    scores[codec] = json.loads((tmp_path / f"{codec}.json").read_text())["rows"][0]["scores"]
  frames = h264.decode((tmp_path / "a.mp4").read_bytes())
  np.testing.assert_allclose(scores["none"]["coherence"], _coherence(frames, 12), rtol=1e-5)
  np.testing.assert_allclose(scores["h264"]["coherence"], _coherence(_round_trip(frames), 12), rtol=1e-5)
  assert abs(scores["none"]["coherence"] - scores["h264"]["coherence"]) > 1e-3
  assert scores["none"]["quality"] == scores["h264"]["quality"]
  result = score(tmp_path, *arguments, "--reward_codec=h264", "--output=none.json")
  assert result.code == 2
  assert "was made with reward_codec None, not h264" in result.stderr


def test_scoring_at_another_speed(tmp_path):
  write_video(tmp_path / "slow.mp4", _video(6), fps=8)
  result = score(tmp_path, "--videos=slow.mp4", "--reward=coherence", "--reward_codec=h264")
  assert result.code == 3
  assert "reward_codec h264 writes 16 frames per second, the video has 8" in result.stderr
