"""The command line, steered: timelines, pictures, videos and earlier results, on a small random model."""

import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from PIL import Image

import streamt1_jax as st1
from streamt1_jax import shipped
from streamt1_jax.cli import results, stopped_searches
from streamt1_jax.config import SearchConfig
from streamt1_jax.io import pictures, video
from streamt1_jax.io.timeline import Entry, Timeline
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.rewards.base import CandidateInfo
from tests.command_line import generate, save_model

RED, BLUE = "a red circle moves left over a dark blue background", "a blue square moves up over a gray background"
STARTS_AT = 1 + 4 * (2 * 3 - 1)  # frames before chunk 2
SEARCH = ["--beam_size=2", "--top_k=1", "--sliding_window=3", "--max_sink_frames=6"]
SAME_SEARCH = SearchConfig(beam_size=2, top_k=1, sliding_window=3, max_sink_frames=6)
"""What the flags of `SEARCH` say."""
TIMELINE = Timeline((Entry(0.0, RED), Entry(STARTS_AT / 16, BLUE)), seed=7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> st1.Pipeline:
  return st1.Pipeline.load(checkpoint)


@pytest.fixture(scope="module")
def whole(pipeline) -> st1.Video:
  """The video of the timeline, from Python."""
  return pipeline.generate(TIMELINE, search=SAME_SEARCH, num_latent_frames=12)


class Runs:
  """Runs the command in one folder."""

  def __init__(self, folder: pathlib.Path, checkpoint: pathlib.Path):
    self.folder, self.checkpoint = folder, checkpoint

  def run(self, *arguments: str, chunks: int = 4, search: Sequence[str] = SEARCH):
    length = f"--num_latent_frames={3 * chunks}"
    return generate(self.folder, f"--checkpoint={self.checkpoint}", length, *search, *arguments)

  def result(self, *arguments: str, name: str = "out", **options) -> pathlib.Path:
    done = self.run(f"--output_dir={name}", *arguments, **options)
    assert done.code == 0, done.stderr
    self.told = done.stderr
    (folder,) = (path for path in (self.folder / name).iterdir() if not path.name.startswith("."))
    return folder


def _json(folder, name="manifest.json"):
  return json.loads((folder / name).read_text())


def _latents(folder):
  return results.read_latents(folder, _model_sha256(folder))


def _model_sha256(folder):
  content = (folder / results.LATENTS).read_bytes()
  header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
  return header["__metadata__"]["model_sha256"]


def _write_timeline(folder, second=BLUE, at=STARTS_AT / 16, **changes):
  entries = [{"start": 0, "prompt": RED}, {"start": at, "prompt": second}]
  (folder / "timeline.json").write_text(json.dumps({"version": 1, "seed": 7, "entries": entries} | changes, indent=1))


@pytest.fixture(scope="module")
def steered(tmp_path_factory, checkpoint):
  """A result with two prompts; and the runs it came from."""
  runs = Runs(tmp_path_factory.mktemp("steered"), checkpoint)
  # A quarter of a second after chunk 2 begins: it is the nearest.
  _write_timeline(runs.folder, at=STARTS_AT / 16 + 0.25)
  return runs, runs.result("--timeline=timeline.json")


def test_result_has_segments(steered):
  runs, folder = steered
  assert f"the prompt of {STARTS_AT / 16 + 0.25} s begins at {STARTS_AT / 16} s, with a chunk" in runs.told
  manifest, trace = _json(folder), _json(folder, "trace.json")
  frames = 1 + 4 * (12 - 1)
  assert manifest["segments"] == [
    {"chunk": 0, "start": 0, "end": STARTS_AT / 16, "frames": [0, STARTS_AT], "prompt": RED},
    {"chunk": 2, "start": STARTS_AT / 16, "end": frames / 16, "frames": [STARTS_AT, frames], "prompt": BLUE},
  ]
  assert trace["segments"] == [{"chunk": 0, "prompt": RED}, {"chunk": 2, "prompt": BLUE}]
  assert manifest["settings"]["seed"] == manifest["seeds"]["base"] == 7
  assert len(trace["chunks"]) == 4


def test_a_session_makes_the_same_video(steered, pipeline, whole, tmp_path):
  """Switched by hand from Python, and told again by the command line: the same bits, and the same seeds."""
  runs, folder = steered
  session = pipeline.session(RED, search=SAME_SEARCH, seed=7, num_chunks=4)
  chunks = [next(session), next(session)]
  for prompt, message in (("&nbsp;", "the prompt is empty"), ("half \ud800", "the prompt holds half a character")):
    with pytest.raises(st1.ConfigError, match=message):
      session.switch(prompt)
  session.switch(BLUE)
  session.save(tmp_path / "saved")
  # What waits is not saved.
  resumed = pipeline.resume(tmp_path / "saved")
  resumed.switch(BLUE)
  chunks += list(resumed)
  np.testing.assert_array_equal(np.concatenate([chunk.latents for chunk in chunks]), _latents(folder))
  assert resumed.timeline == TIMELINE
  np.testing.assert_array_equal(whole.latents, _latents(folder))
  assert whole.score == pytest.approx(_json(folder)["score"], abs=1e-6)
  for options, told in (
    ({"attention": "fold"}, "attention None, not fold"),
    ({"reward_weights": {"coherence": 2.0}}, "video_rewards {'coherence': 1.0}, not {'coherence': 2.0}"),
  ):
    with pytest.raises(st1.ConfigError, match=f"was made with {told}"):
      st1.Pipeline.load(runs.checkpoint, **options).resume(tmp_path / "saved")
  # A session is one video, also where devices could make several.
  mesh = device_mesh.make_mesh({"data": 2}, pipeline.config, SAME_SEARCH)
  divided = st1.Pipeline.load(runs.checkpoint, mesh=mesh)
  divided.session(RED, search=SAME_SEARCH, num_chunks=4).save(tmp_path / "divided")
  assert divided.resume(tmp_path / "divided").segments == [(0, RED)]


def test_whole_video_score_is_the_mean_over_segments(pipeline, whole):
  alone, judge = [], jax.jit(pipeline.models.video_reward)
  for begin, end, prompt in ((0, STARTS_AT, RED), (STARTS_AT, len(whole.frames), BLUE)):
    window = st1.FrameWindow(whole.frames[begin : end - 12], end - 12 - begin, whole.frames[end - 12 : end])
    condition = pipeline.condition(prompt, 4)
    info = CandidateInfo(np.int32(0), np.int32(0))
    score = judge(pipeline.params["video_reward"], condition.video_reward, window, info)
    alone.append((float(score), end - begin))
  expected = sum(score * frames for score, frames in alone) / sum(frames for _, frames in alone)
  assert whole.score == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_stopped_between_two_prompts_and_after_them(steered, monkeypatch, tmp_path, checkpoint):
  runs = Runs(tmp_path, checkpoint)
  _write_timeline(tmp_path)
  for chunk in (1, 2, 3):
    with monkeypatch.context() as patched:
      patched.setattr(stopped_searches, "is_terminated", lambda: True)
      done = runs.run("--timeline=timeline.json", "--output_dir=out", "--save_every=1")
    assert done.code == 143, done.stderr
    assert f"saved after chunk {chunk} of 4" in done.stderr
  refused = runs.run("--timeline=timeline.json", "--output_dir=out", "--recache=causal")
  assert refused.code == 2
  assert "switch" in refused.stderr
  folder = runs.result("--timeline=timeline.json")
  assert _json(folder)["resumed_at_chunks"] == [1, 2, 3]
  np.testing.assert_array_equal(_latents(folder), _latents(steered[1]))
  assert _json(folder)["score"] == _json(steered[1])["score"]


def test_switch_flags_change_the_video(steered, tmp_path, checkpoint):
  runs = Runs(tmp_path, checkpoint)
  _write_timeline(tmp_path)
  folder = runs.result("--timeline=timeline.json", "--recache=none", "--switch_sinks=first")
  latents, usual = _latents(folder), _latents(steered[1])
  np.testing.assert_array_equal(latents[:6], usual[:6])
  assert np.abs(latents[6:9] - usual[6:9]).max() > 1e-4


@pytest.mark.slow  # a search of the shipped model with its learned rewards
def test_learned_rewards_judge_a_timeline_and_are_counted(tmp_path):
  _write_timeline(tmp_path)
  manifest = _json(Runs(tmp_path, shipped.checkpoint()).result("--timeline=timeline.json", chunks=3))
  assert [segment["prompt"] for segment in manifest["segments"]] == [RED, BLUE]
  assert manifest["cost"]["tflop"]["image_reward"] > 0


def test_continue_from_a_result(steered, tmp_path):
  runs, before = steered
  folder = runs.result(f"--continue_from={before}", f"--prompt={BLUE}", chunks=2, name="continued")
  latents, manifest = _latents(folder), _json(folder)
  np.testing.assert_array_equal(latents[:12], _latents(before))
  assert manifest["length"]["latent_frames"] == 12 + 6
  trace = _json(folder, "trace.json")
  assert trace["given_chunks"] == 4
  assert [chunk["chunk"] for chunk in trace["chunks"]] == [4, 5]
  # The first made chunk has the seeds of a first chunk.
  assert [candidate["seed"] for candidate in trace["chunks"][0]["candidates"]] == [0, 1]


def test_begin_with_a_picture(tmp_path, checkpoint, pipeline):
  """Nine equal frames, scaled and cut, are the first chunk; --sink_distance needs no search."""
  runs = Runs(tmp_path, checkpoint)
  pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / "picture.png")
  search = ["--search=none", "--sink_distance=9"]
  folder = runs.result("--image=picture.png", f"--prompt={RED}", chunks=1, search=search)
  assert _json(folder)["settings"]["sink_distance"] == 9
  assert "picture picture.png: 80x40 is scaled and cut at the edges to 32x32" in runs.told
  latents = _latents(folder)
  assert len(latents) == 6
  cut = Image.fromarray(pixels[:, 20:60]).resize((32, 32), Image.Resampling.LANCZOS)
  fitted = pictures.fitted(pixels[None], 32, 32)[0]
  # At the edges the filter sees a little of what is cut.
  np.testing.assert_allclose(fitted[:, 4:-4].astype(int), np.asarray(cut)[:, 4:-4], atol=1)
  still = np.repeat(fitted[None], 9, axis=0)
  start = pipeline.start(video=still)
  for options, message in (
    ({"video": still / 255}, r"video the given array must be uint8 RGB, .* got float64 \[9, 32, 32, 3\]"),
    ({"image": pixels, "image_start": "video"}, "image_start must be 'still' or 'clamp', got 'video'"),
  ):
    with pytest.raises(st1.ConfigError, match=message):
      pipeline.start(**options)
  assert start.latents.shape == (1, 3, *latents.shape[1:])
  np.testing.assert_array_equal(latents[:3], start.latents[0])
  # All at once is what chunk by chunk gives.
  both = pipeline.encoder.chunks(np.concatenate([still, still[:1].repeat(12, axis=0)]))
  assert both.shape[0] == 2
  np.testing.assert_array_equal(both[0], start.latents[0])


def test_begin_with_a_video(tmp_path, pipeline):
  """30 frames of 32 per second are 15 of 16: the last 9 of these are used."""
  frames = np.repeat(np.arange(30, dtype=np.uint8)[:, None, None, None] * 8, 32, axis=1)
  frames = np.broadcast_to(frames, (30, 32, 32, 3))
  video.write_video(tmp_path / "clip.mp4", frames, 32, constant_rate_factor=0)
  told = []
  start = pipeline.start(video=tmp_path / "clip.mp4", say=told.append)
  assert told == [
    f"video {tmp_path / 'clip.mp4'}: 32 frames per second become 16, the nearest in time are taken",
    f"video {tmp_path / 'clip.mp4'}: its last 9 of 15 frames make whole chunks and are used",
  ]
  # Frames 13, 15, ... 29: the last one is kept.
  expected = pipeline.encoder.chunks(video.read_frames(tmp_path / "clip.mp4", range(13, 30, 2), 30))
  np.testing.assert_array_equal(start.latents, expected)


BAD = [
  (["--timeline=missing.json"], "timeline missing.json does not exist"),
  (["--timeline=bad.json"], "timeline bad.json, line 3: entry 2: the prompt is empty"),
  (["--timeline=decreasing.json"], "timeline decreasing.json, line 3: entry 2 starts at 0.0 s, entry 1 at 0.0 s"),
  (["--timeline=late.json"], "--timeline=late.json: entry 2 starts at 60.0 s, but the video ends at"),
  (["--timeline=good.json", "--continue_from=whole"], "but the video is given and not made up to 2.8125 s"),
  (["--timeline=good.json", "--seed=8"], "--seed=8, but --timeline=good.json has seed 7"),
  (["--timeline=good.json", "--prompt=x"], "timeline"),
  (["--prompt=x", "--recache=none"], "--recache says what a new prompt does: it needs --timeline"),
  (["--prompt=x", "--image=text.png"], "--image=text.png: picture text.png is of none of these formats: PNG, JPEG"),
  (["--prompt=x", "--image=program.eps"], "program.eps is of none of these formats"),
  (["--prompt=x", "--image=/dev/zero"], "--image=/dev/zero does not exist or is not a file"),
  (["--prompt=x", "--horizon=999999999999"], "--horizon=999999999999"),
  (
    ["--prompt=x", "--sink_distance=99999999999"],
    "sink_distance must be at most 1024 (rotary tables), got 99999999999",
  ),
  (["--timeline=invisible.json"], "entry 2: the prompt '\\x00' is empty"),
  (["--prompt=x", "--image=none.png"], "--image=none.png does not exist"),
  (["--prompt=x", "--image=dot.png", "--image_start=clamp"], "was not trained for it"),
  (["--prompt=x", "--video=text.png"], "--video=text.png: text.png is not a"),
  (
    ["--prompt=x", "--video=short.mp4"],
    "is too short: a video begins with at least 9 frames at 16 per second, it has 8",
  ),
  (["--prompt=x", "--video=slow.mp4"], "has 8 frames per second; the model needs 16, and none are made up"),
  (["--prompt=x", "--continue_from=empty"], "is no result with latents: it has no latents.safetensors"),
  (["--prompt=x", "--continue_from=other"], "was made by another model"),
  (["--prompt=x", "--continue_from=damaged"], "is damaged, or no file of latents"),
  (["--prompt=x", "--continue_from=nested"], "is damaged, or no file of latents"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, steered):
  folder = tmp_path_factory.mktemp("bad")
  first = {"start": 0, "prompt": RED}
  entries = '{{"version": 1, "seed": 7, "entries": [\n{},\n{}\n]}}'
  write = lambda name, second: (folder / name).write_text(entries.format(json.dumps(first), json.dumps(second)))
  write("bad.json", {"start": 1, "prompt": " "})
  write("decreasing.json", {"start": 0, "prompt": BLUE})
  write("late.json", {"start": 60, "prompt": BLUE})
  write("invisible.json", {"start": 1.3125, "prompt": "\0"})
  write("good.json", {"start": 1.3125, "prompt": BLUE})
  (folder / "text.png").write_text("no picture")
  # Pillow would start Ghostscript to draw it.
  (folder / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "dot.png")
  video.write_video(folder / "short.mp4", np.zeros((8, 32, 32, 3), np.uint8), 16)
  video.write_video(folder / "slow.mp4", np.zeros((20, 32, 32, 3), np.uint8), 8)
  content = (steered[1] / results.LATENTS).read_bytes()
  sha = _model_sha256(steered[1]).encode()
  nested = (8 * 10**5).to_bytes(8, "little") + b"[" * 8 * 10**5
  for name, latents in (
    ("whole", content),
    ("empty", None),
    ("other", content.replace(sha, b"0" * 64)),
    ("damaged", content[:100]),
    ("nested", nested),
  ):
    (folder / name).mkdir()
    if latents is not None:
      (folder / name / results.LATENTS).write_bytes(latents)
  return folder


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(bad_files, checkpoint, arguments, message):
  before = sorted(bad_files.rglob("*"))
  done = Runs(bad_files, checkpoint).run(*arguments)
  assert done.code == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert sorted(bad_files.rglob("*")) == before
