"""Videos scored by the command line: the numbers of the rewards themselves, and no bad file stops the others."""

import csv
import dataclasses
import fractions
import io
import json
import math
import os
import pathlib
import shutil

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from streamt1_jax.cli import score as score_command
from streamt1_jax.cli import score_inputs
from streamt1_jax.cli.score_rows import Output, Row
from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest, video
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, Promptless
from streamt1_jax.rewards.folder import load_reward
from streamt1_jax.rewards.quality import ImageQuality
from streamt1_jax.rewards.scorers import FrameScorer, WindowScorer
from tests import videos
from tests.command_line import Result, result_of, score, start
from tests.small_rewards import resize, save_reward

ALL = "hpsv3+videoalign+quality+coherence"
PROMPTS = {
  "a.mp4": "a red circle moves left",
  "b.mp4": "a blue square",
  "c.mp4": "a red square moves right",
  "d/a.mp4": "red",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("checkpoint")
  for model in ("hpsv3", "videoalign"):
    save_reward(folder / "rewards" / model, model)
  return folder


def clip(num_frames: int, seed: int = 0, size: tuple[int, int] = (32, 48)) -> np.ndarray:
  """Blocks of random colours, so that the codec leaves something, which change from frame to frame."""
  blocks = np.random.default_rng(seed).integers(0, 256, (num_frames, size[0] // 8, size[1] // 8, 3), np.uint8)
  return blocks.repeat(8, axis=1).repeat(8, axis=2)


def read_rows(folder: pathlib.Path) -> dict[str, dict]:
  """Rows of `scores.json` by the name of the video."""
  rows = json.loads((folder / "scores.json").read_text())["rows"]
  return {row["video"].removeprefix("clips/"): row for row in rows}


class Scored:
  """A folder in which the program has scored four videos by everything."""

  def __init__(self, folder: pathlib.Path, checkpoint: pathlib.Path):
    self.folder = folder
    video.write_video(folder / "clips/a.mp4", clip(9), 16)
    video.write_video(folder / "clips/b.mp4", clip(21, 1), 16)
    video.write_video(folder / "clips/c.mp4", clip(21, 1), 4)
    video.write_video(folder / "clips/d/a.mp4", clip(9, 2, (40, 24)), 16)
    (folder / "clips/notes.txt").write_text("not a video")
    (folder / "prompts.tsv").write_text("".join(f"clips/{name}\t{prompt}\n" for name, prompt in PROMPTS.items()))
    self.arguments = [
      "--videos=clips", "--prompts_file=prompts.tsv", f"--checkpoint={checkpoint}", f"--reward={ALL}", "--dtype=float32"
    ]  # fmt: skip
    # The account counts compilations, as those of a process that has just begun.
    jax.clear_caches()
    self.result = self.again()

  def again(self, *arguments: str) -> Result:
    return score(self.folder, *self.arguments, *arguments)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, checkpoint) -> Scored:
  made = Scored(tmp_path_factory.mktemp("run"), checkpoint)
  assert made.result.code == 0, made.result.stderr
  return made


class TestScores:
  # Which frames: written down from the published sampler's rule, 2 per second of the file's own time, at least 4.
  @pytest.mark.parametrize(
    ("name", "sampled"),
    [
      ("a.mp4", [0, 3, 5, 8]),
      ("b.mp4", [0, 7, 13, 20]),
      ("c.mp4", [0, 2, 4, 7, 9, 11, 13, 16, 18, 20]),
      ("d/a.mp4", [0, 3, 5, 8]),
    ],
  )
  def test_are_those_of_the_rewards(self, scored, checkpoint, name, sampled):
    with av.open(scored.folder / "clips" / name) as container:
      frames = jnp.asarray(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    scores = read_rows(scored.folder)[name]["scores"]
    of_video, of_frames = (
      load_reward(checkpoint / "rewards" / model, fps=1.0, dtype=jnp.float32) for model in ("videoalign", "hpsv3")
    )

    @jax.jit
    def judge(video_params, video_tokens, frame_params, frame_tokens, frames):
      video_reward, frame_reward = of_video.reward, of_frames.reward
      raw = video_reward.raw_scores(
        video_params, video_reward.init(video_params, video_tokens), frames[np.asarray(sampled)]
      )
      each = frame_reward.frame_scores(frame_params, frame_reward.init(frame_params, frame_tokens), frames)
      return raw, each[:, 0]

    prompt = PROMPTS[name]
    raw, each = judge(of_video.params, of_video.prompt(prompt), of_frames.params, of_frames.prompt(prompt), frames)
    expected = (np.asarray(raw) - [3.6757, 1.1646, 2.8105]) / [2.2476, 1.3811, 2.5121]
    found = [scores[f"videoalign_{column}"] for column in ("VQ", "MQ", "TA")]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(scores["videoalign_Overall"], expected.sum(), atol=5e-5)
    np.testing.assert_allclose(scores["hpsv3_frames"], each, atol=2e-5)
    np.testing.assert_allclose(scores["hpsv3"], np.mean(each), atol=2e-5)
    assert np.ptp(each) > 1e-3

  def test_frame_rate_is_the_files_own(self, scored):
    rows = read_rows(scored.folder)
    assert [rows[name]["fps"] for name in ("b.mp4", "c.mp4")] == [16, 4]
    overall = [rows[name]["scores"]["videoalign_VQ"] for name in ("b.mp4", "c.mp4")]
    assert abs(overall[0] - overall[1]) > 1e-3

  def test_built_in_rewards_see_all_frames(self, scored):
    scores = read_rows(scored.folder)["a.mp4"]["scores"]
    frames, _ = videos.read_video(scored.folder / "clips/a.mp4")
    quality = jax.jit(lambda frames: ImageQuality()({}, {}, frames, CandidateInfo(np.int32(0), np.int32(0))))
    np.testing.assert_allclose(scores["quality"], quality(frames), atol=1e-4)
    np.testing.assert_allclose(scores["quality_frames"][8], quality(frames[8:]), atol=1e-4)
    assert len(scores["quality_frames"]) == 9
    assert math.isfinite(scores["coherence"])

  def test_csv_says_the_same(self, scored):
    rows = read_rows(scored.folder)
    with (scored.folder / "scores.csv").open() as file:
      lines = list(csv.DictReader(file))
    assert [line["video"].removeprefix("clips/") for line in lines] == list(PROMPTS) == list(rows)
    for line, row in zip(lines, rows.values(), strict=True):
      assert line["error"] == ""
      assert line["prompt"] == row["prompt"]
      assert [int(line["height"]), int(line["width"])] == [row["height"], row["width"]]
      for column, value in row["scores"].items():
        found = [float(cell) for cell in line[column].split()]
        np.testing.assert_allclose(found, np.atleast_1d(value), rtol=1e-7)

  def test_table(self, scored):
    header, *lines, place = scored.result.stdout.splitlines()
    columns = [f"videoalign_{column}" for column in ("VQ", "MQ", "TA", "Overall")]
    assert header.split() == ["video", "frames", "fps", "hpsv3", *columns, "quality", "coherence"]
    assert place == "scores.csv, scores.json"
    rows = [row["scores"] for row in read_rows(scored.folder).values()]
    for line, scores in zip(lines, rows):
      assert line.split()[3:] == [f"{scores[column]:.3f}" for column in header.split()[3:]]
    assert lines[-1].split()[:2] == ["mean", f"{np.mean([scores['hpsv3'] for scores in rows]):.3f}"]
    assert "4/4" in scored.result.stderr

  def test_compilations_follow_the_sizes(self, scored):
    # By hand, two frame sizes: HPSv3 and quality 2 each; 3 of VideoAlign and of coherence, which see a length as well.
    assert json.loads((scored.folder / "scores.json").read_text())["compilations"]["count"] == 2 + 2 + 3 + 3

  def test_fewer_frames_for_image_rewards(self, tmp_path, scored):
    arguments = ["--videos=clips/b.mp4", "--reward=quality", "--image_frames=3", "--batch=2", "--output=few.json"]
    result = score(scored.folder, *arguments)
    assert result.code == 0, result.stderr
    (few,) = json.loads((scored.folder / "few.json").read_text())["rows"]
    every = read_rows(scored.folder)["b.mp4"]["scores"]["quality_frames"]
    np.testing.assert_allclose(few["scores"]["quality_frames"], [every[0], every[10], every[20]], atol=1e-4)


class TestGeneratedVideos:
  def test_bring_their_prompts(self, tmp_path, checkpoint):
    # A name of a folder that is no text is told as well as another.
    for name in ("one", "two", "three\udcff"):
      video.write_video(tmp_path / f"outputs/{name}/video.mp4", clip(9), 16)
    (tmp_path / "outputs/one/manifest.json").write_text('{"settings": {"prompt": "a red circle"}, "score": 1.0}')
    (tmp_path / "outputs/two/manifest.json").write_text('{"settings":')
    (tmp_path / "outputs/three\udcff/manifest.json").write_text(r'{"settings": {"prompt": "a red \ud83d"}}')
    arguments = ["--videos=outputs", "--reward=hpsv3+quality", f"--checkpoint={checkpoint}"]
    result = score(tmp_path, *arguments)
    assert result.code == 3, result
    one, three, two = read_rows(tmp_path).values()
    assert [one["prompt"], one["error"], two["prompt"], three["prompt"]] == ["a red circle", None, None, None]
    assert "manifest.json is not valid JSON" in two["error"]
    assert r"three\udcff/manifest.json holds half a character, '\ud83d'" in three["error"]
    # The files are the same, and rewards that need no prompt score them.
    for row in (two, three):
      assert row["scores"] == {name: one["scores"][name] for name in ("quality", "quality_frames")}

  def test_default_is_all_that_the_checkpoint_has(self, tmp_path, checkpoint):
    video.write_video(tmp_path / "video.mp4", clip(9), 16)
    (tmp_path / "manifest.json").write_text('{"settings": {"prompt": "a red circle"}}')
    assert score(tmp_path, "--videos=video.mp4", f"--checkpoint={checkpoint}").code == 0
    assert score(tmp_path, "--videos=video.mp4", "--checkpoint=.", "--output=b.csv").code == 0
    of_models, built_in = (json.loads((tmp_path / name).read_text()) for name in ("scores.json", "b.json"))
    assert [of_models["settings"]["reward"], built_in["settings"]["reward"]] == [
      "hpsv3+videoalign",
      "quality+coherence",
    ]


class TestResuming:
  def test_finished_rows_are_not_scored_again(self, scored, tmp_path):
    folder = pathlib.Path(shutil.copytree(scored.folder, tmp_path / "run"))
    document = json.loads((folder / "scores.json").read_text())
    document["rows"][0]["scores"]["hpsv3"] = 123.0
    (folder / "scores.json").write_text(json.dumps(document))
    (folder / "clips/b.mp4").write_bytes((folder / "clips/a.mp4").read_bytes())
    shutil.copy(folder / "clips/c.mp4", folder / "clips/e.mp4")
    with (folder / "prompts.tsv").open("a") as file:
      file.write("e.mp4\ta red square moves right\n")
    result = score(folder, *scored.arguments)
    assert result.code == 0, result.stderr
    rows, before = read_rows(folder), read_rows(scored.folder)
    assert rows["a.mp4"]["scores"]["hpsv3"] == 123.0
    assert rows["b.mp4"]["num_frames"] == 9
    assert rows["c.mp4"] == before["c.mp4"]
    np.testing.assert_allclose(rows["e.mp4"]["scores"]["hpsv3"], before["c.mp4"]["scores"]["hpsv3"], atol=1e-5)

  def test_full_disk_loses_nothing(self, tmp_path):
    for index in range(6):
      video.write_video(tmp_path / f"clips/{index}.mp4", clip(9, index), 16)
    arguments = ["--videos=clips", "--reward=quality"]
    # A row takes about 400 bytes: the file system refuses in the middle of one, as it does when it is full.
    # Compiled programs are larger than a full disk takes.
    process = start(tmp_path, *arguments, "--compilation_cache_dir=", program="score", file_bytes=1500)
    process.join()
    result = result_of(process.exitcode, tmp_path)
    assert result.code == 2, result
    assert "cannot write .scores.partial.jsonl" in result.stderr.splitlines()[-1]
    partial = tmp_path / ".scores.partial.jsonl"
    *lines, cut = partial.read_text().split("\n")
    assert 2 < len(lines) < 6
    assert cut
    assert not (tmp_path / "scores.csv").exists()
    first = json.loads(lines[1])
    lines[1] = json.dumps(first | {"scores": first["scores"] | {"quality": 123.0}})
    partial.write_text("\n".join([*lines, cut]))
    result = score(tmp_path, *arguments)
    assert result.code == 0, result.stderr
    rows = read_rows(tmp_path)
    assert [*rows] == [f"{index}.mp4" for index in range(6)]
    assert rows["0.mp4"]["scores"]["quality"] == 123.0
    assert all(len(row["scores"]["quality_frames"]) == 9 for row in rows.values())
    assert not partial.exists()

  @pytest.mark.parametrize(
    ("arguments", "message"),
    [
      (["--dtype=bfloat16"], "scores.json was made with dtype float32, not bfloat16"),
      (["--image_frames=2"], "scores.json was made with image_frames None, not 2"),
      (["--reward=hpsv3"], f"scores.json was made with reward {ALL}, not hpsv3"),
      (["--videos=clips/a.mp4", "--prompts_file=one.txt"], "scores.csv has scores of 3 other videos (clips/b.mp4)"),
    ],
  )
  def test_other_scores_are_kept(self, scored, arguments, message):
    (scored.folder / "one.txt").write_text("a red circle\n")
    before = (scored.folder / "scores.csv").read_bytes()
    result = scored.again(*arguments)
    assert result.code == 2, result
    (line,) = result.stderr.splitlines()
    assert message in line
    assert "--overwrite" in line
    assert (scored.folder / "scores.csv").read_bytes() == before

  def test_overwrite(self, scored, tmp_path):
    folder = pathlib.Path(shutil.copytree(scored.folder, tmp_path / "run"))
    arguments = ["--videos=clips/a.mp4", "--reward=quality", "--overwrite"]
    assert score(folder, *arguments).code == 0
    assert list(read_rows(folder)) == ["a.mp4"]

  @pytest.mark.parametrize(
    ("name", "content", "message"),
    [
      ("scores.csv", "my,own,table\n", "scores.csv exists and scores.json does not"),
      ("scores.json", "[1, 2]", "scores.json must hold a JSON object"),
      ("scores.json", '{"rows": []}', "scores.json does not say which settings it was made with"),
      (".scores.partial.jsonl", "", ".scores.partial.jsonl does not hold the rows of a run"),
      (".scores.partial.jsonl", '{"settings": {}}\nnone\n', ".scores.partial.jsonl, line 2"),
      ("scores.json", '{"settings": "", "rows": []}', "scores.json does not say which settings"),
      ("scores.json", '{"settings": 0, "rows": []}', "scores.json does not say which settings"),
    ],
  )
  def test_foreign_files_are_kept(self, tmp_path, name, content, message):
    video.write_video(tmp_path / "a.mp4", clip(3), 16)
    (tmp_path / name).write_text(content)
    result = score(tmp_path, "--videos=a.mp4", "--reward=quality")
    assert result.code == 2, result
    assert message in result.stderr
    assert (tmp_path / name).read_text() == content


_ROW = dataclasses.asdict(Row("a.mp4", "a red circle", 9, 1, 3, 16.0, 32, 48, {"quality": 1.0}, None))


class TestRowsOfOthers:
  @pytest.mark.parametrize(
    "rows",
    [
      None,
      "text",
      {"a.mp4": _ROW},
      [3],
      ["text"],
      [[]],
      [_ROW | {"video": ["a.mp4"]}],
      [_ROW | {"video": None}],
      [_ROW | {"prompt": 3}],
      [_ROW | {"error": {"a": 1}}],
      [_ROW | {"bytes": "9"}],
      [_ROW | {"modified": True}],
      [_ROW | {"num_frames": [3]}],
      [_ROW | {"fps": "16"}],
      [_ROW | {"height": {}}],
      [_ROW | {"scores": []}],
      [_ROW | {"scores": {"quality": "1.0"}}],
      [_ROW | {"scores": {"quality": {"mean": 1.0}}}],
      [_ROW | {"scores": {"quality": None}}],
      [_ROW | {"scores": {"quality": [1.0, "2"]}}],
      [_ROW | {"scores": {"quality": 10**400}}],
      [{name: value for name, value in _ROW.items() if name != "fps"}],
      [_ROW | {"more": 1}],
    ],
  )
  def test_are_refused(self, tmp_path, rows):
    output = Output(epath.Path(tmp_path / "scores.csv"))
    manifest.write_json(output.json, {"settings": {"reward": "quality"}, "rows": [_ROW]})
    assert output.earlier_rows({"reward": "quality"}) == {"a.mp4": Row(**_ROW)}
    output.json.write_text(json.dumps({"settings": {"reward": "quality"}, "rows": rows}))
    with pytest.raises(ConfigError, match="is not a file of scores; use --overwrite or another --output"):
      output.earlier_rows({"reward": "quality"})

  def test_are_refused_by_the_command(self, tmp_path):
    video.write_video(tmp_path / "a.mp4", clip(3), 16)
    settings = {"reward": "quality", "dtype": "float32", "image_frames": None}
    (tmp_path / "scores.json").write_text(json.dumps({"settings": settings, "rows": [_ROW | {"scores": {"q": "1"}}]}))
    result = score(tmp_path, "--videos=a.mp4", "--reward=quality")
    assert result.code == 2, result
    (line,) = result.stderr.splitlines()
    assert line == "error: scores.json is not a file of scores; use --overwrite or another --output"


@dataclasses.dataclass(frozen=True)
class _Root(Promptless):
  """Square root of the mean brightness less 100: NaN for dark pictures."""

  def __call__(self, params, condition, frames, info):
    pixels = frames.chunk if isinstance(frames, FrameWindow) else frames
    return jnp.sqrt(jnp.mean(pixels, dtype=jnp.float32) - 100)


class TestRewardsWithoutANumber:
  @pytest.mark.parametrize("scorer", [FrameScorer, WindowScorer])
  def test_is_no_score(self, scorer):
    made = scorer("root", _Root(), {}, lambda prompt: (), False)
    frames = np.full((3, 4, 4, 3), 181, np.uint8)
    np.testing.assert_allclose(made(None, frames)["root"], 9.0, rtol=1e-6)
    frames[1 if scorer is FrameScorer else slice(None)] = 19
    with pytest.raises(ConfigError, match="^the score of root is NaN or Inf$"):
      made(None, frames)

  def test_is_told_in_the_row(self, tmp_path):
    """Its scores alone are missing, and the next video has them all."""
    rewards = {"root": _Root(), "quality": ImageQuality()}
    scorers = [FrameScorer(name, reward, {}, lambda prompt: (), False) for name, reward in rewards.items()]
    rows = []
    for grey in (19, 181):
      path = epath.Path(tmp_path / f"{grey}.mp4")
      video.write_video(path, np.full((3, 16, 16, 3), grey, np.uint8), 16)
      task = score_inputs.Task(path, None)
      rows.append(score_command.score_video(task, score_command.start_row(task), scorers))
    assert [row.error for row in rows] == ["the score of root is NaN or Inf", None]
    of_quality = ["quality", "quality_frames"]
    assert [sorted(row.scores) for row in rows] == [of_quality, [*of_quality, "root", "root_frames"]]


def _patched(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
  """`content` with `value` at `offset` bytes after the name of the last `box` of an mp4."""
  place = content.rindex(box) + 4 + offset
  return content[:place] + value + content[place + len(value) :]


def _raw_stream(frames: np.ndarray) -> bytes:
  """Motion pictures without a container, and so without time."""
  context = av.CodecContext.create("libx264", "w")
  context.height, context.width, context.pix_fmt, context.framerate = *frames.shape[1:3], "yuv420p", 16
  pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
  return b"".join(bytes(packet) for picture in (*pictures, None) for packet in context.encode(picture))


def _write_huge(path: pathlib.Path) -> None:
  """More frames than fit into memory, in a file that does: the same picture again and again."""
  picture = io.BytesIO()
  Image.new("RGB", (8192, 8192)).save(picture, "JPEG")
  with av.open(path, "w") as container:
    stream = container.add_stream("mjpeg", rate=16)
    stream.width, stream.height, stream.pix_fmt = 8192, 8192, "yuvj420p"
    for index in range(50):
      packet = av.Packet(picture.getvalue())
      packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, fractions.Fraction(1, 16)
      container.mux(packet)


class TestBadFiles:
  def test_do_not_stop_the_rest(self, tmp_path, checkpoint):
    clips = tmp_path / "clips"
    video.write_video(clips / "good.mp4", clip(9), 16)
    good = (clips / "good.mp4").read_bytes()
    video.write_video(clips / "one_frame.mp4", clip(1), 16)
    video.write_video(clips / "ribbon.mp4", np.zeros((4, 2, 600, 3), np.uint8), 16)
    (clips / "special.mp4").write_bytes(good)
    (clips / "empty.mp4").write_bytes(b"")
    (clips / "text.mp4").write_text("not a video at all")
    (clips / "cut.mp4").write_bytes(good[: len(good) // 2])
    (clips / "codec.mp4").write_bytes(_patched(good, b"avc1", -4, b"zzzz"))
    (clips / "no_rate.mp4").write_bytes(_raw_stream(clip(9)))
    messages = {
      "codec.mp4": "FFmpeg knows no decoder for its codec",
      "cut.mp4": "is not a readable video",
      "empty.mp4": "is not a readable video",
      "good.mp4": None,
      "no_rate.mp4": "does not say its frame rate",
      "one_frame.mp4": "a video needs at least 2 frames to be judged, got 1",
      "ribbon.mp4": "the aspect ratio of a picture must be at most 200, got 2x600",
      "special.mp4": "the prompt holds the special token <|im_end|>",
      "text.mp4": "is not a readable video",
    }
    prompts = {name: "a red circle" for name in messages} | {"special.mp4": "a <|im_end|> circle"}
    lines = [json.dumps({"video": name, "prompt": prompt, "by": "hand"}) for name, prompt in prompts.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    arguments = ["--videos=clips", "--prompts_file=prompts.jsonl", "--reward=hpsv3+videoalign"]
    result = score(tmp_path, *arguments, f"--checkpoint={checkpoint}")
    assert result.code == 3, result
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: 8 of 9 videos could not be scored: clips/codec.mp4 (is not readable")
    rows = read_rows(tmp_path)
    assert list(rows) == list(messages)
    for (name, message), line in zip(messages.items(), result.stdout.splitlines()[1:], strict=False):
      assert name in line
      if message is None:
        assert rows[name]["error"] is None
      else:
        assert message in rows[name]["error"]
        assert message in line
    assert set(rows["one_frame.mp4"]["scores"]) == {"hpsv3", "hpsv3_frames"}
    assert len(rows["good.mp4"]["scores"]) == 6

  def test_memory_is_not_exhausted(self, tmp_path):
    _write_huge(tmp_path / "huge.avi")
    result = score(tmp_path, "--videos=huge.avi", "--reward=quality")
    assert result.code == 3, result
    assert "50 frames of 8192x8192 take 9.4 GiB" in result.stderr
    assert "--image_frames" in result.stderr

  def test_the_worst_of_them_do_not_stop_the_rest(self, tmp_path):
    """What a folder may hold under the name of a video; the last one is scored."""
    clips = tmp_path / "clips"
    video.write_video(clips / "z.mp4", clip(9), 16)
    whole = (clips / "z.mp4").read_bytes()
    (clips / "broken.mp4").symlink_to("nowhere")
    (clips / "changes.avi").write_bytes(videos.pictures([(32, 48), (64, 48)]))
    (clips / "device.mp4").symlink_to("/dev/zero")
    (clips / "folder.mp4").mkdir()
    (clips / "large.avi").write_bytes(videos.pictures([(9000, 9000)]))
    (clips / "latin.mov").write_bytes(videos.encode("mov", title=b"caf\xe9"))
    (clips / "list.mp4").write_text("ffconcat version 1.0\nfile z.mp4\n")
    (clips / "loop").symlink_to(clips)
    (clips / "loop2").symlink_to(clips)
    os.mkfifo(clips / "pipe.mp4")
    (clips / "rows\x1b[2J\n.mp4").write_bytes(whole[: len(whole) // 2])
    result = score(tmp_path, "--videos=clips", "--reward=quality")
    assert result.code == 3, result
    rows = read_rows(tmp_path)
    messages = {
      "broken.mp4": "does not exist or is not a file",
      "changes.avi": "changes the size of its frames midway",
      "device.mp4": "does not exist or is not a file",
      "large.avi": "more than 67108864 pixels",
      "latin.mov": None,
      "list.mp4": "its format is none of mp4",
      "pipe.mp4": "does not exist or is not a file",
      "rows\x1b[2J\n.mp4": "is ",
      "z.mp4": None,
    }
    assert list(rows) == list(messages)
    for name, message in messages.items():
      assert rows[name]["error"] is None if message is None else message in rows[name]["error"]
      assert (rows[name]["error"] or "").isprintable()
      assert len(rows[name]["error"] or "") <= 500
    assert all(line.isprintable() for line in result.stdout.splitlines())
    assert len(result.stdout.splitlines()) == 1 + len(messages) + 2
    assert result.stderr.splitlines()[-1].isprintable()
    # The same run again: rows with any text are read as they were written.
    assert score(tmp_path, "--videos=clips", "--reward=quality").code == 3
    assert read_rows(tmp_path) == rows

  @pytest.mark.parametrize("reward", ["quality", "coherence"])
  def test_frames_of_15_pixels(self, tmp_path, reward):
    for size in ((15, 16), (16, 15), (16, 16)):
      name = f"{size[0]}x{size[1]}.avi"
      (tmp_path / name).write_bytes(videos.encode("avi", "ffv1", size=size, frames=4))
    result = score(tmp_path, "--videos=*.avi", f"--reward={reward}")
    assert result.code == 3, result
    rows = read_rows(tmp_path)
    assert {name: row["error"] is None for name, row in rows.items()} == {
      "15x16.avi": False, "16x15.avi": False, "16x16.avi": True
    }  # fmt: skip
    for name in ("15x16.avi", "16x15.avi"):
      assert "at least 16" in rows[name]["error"]
      assert rows[name]["scores"] == {}
      assert rows[name]["num_frames"] == 4

  def test_are_tried_again(self, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(b"")
    arguments = ["--videos=clips", "--reward=quality", "--output=scores.json"]
    assert score(tmp_path, *arguments).code == 3
    video.write_video(tmp_path / "clips/a.mp4", clip(3), 16)
    assert score(tmp_path, *arguments).code == 0
    assert read_rows(tmp_path)["a.mp4"]["error"] is None


def _alter(path: pathlib.Path, old: str, new: str) -> None:
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


def _truncate(folder: pathlib.Path) -> None:
  largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])


class TestBadInput:
  @pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
      ([], ["--videos"]),
      (["--videos=absent"], ["--videos=absent", "no video found", ".mp4"]),
      (["--videos=*.mov"], ["--videos=*.mov", "no video found"]),
      (["--videos=a.mp4", "--reward=beauty"], ["--reward=beauty", "quality, coherence"]),
      (["--videos=a.mp4", "--reward=quality+quality"], ["--reward=quality+quality", "different names"]),
      (["--videos=a.mp4", "--reward="], ["--reward=", "joined by '+'"]),
      (["--videos=a.mp4", "--reward=../x"], ["--reward=../x", "joined by '+'"]),
      (["--videos=a.mp4", "--reward=quality", "--output=scores.txt"], ["--output=scores.txt", ".csv or .json"]),
      (["--videos=a.mp4", "--reward=quality", "--output=a.mp4/s.csv"], ["a.mp4/s.csv", "cannot be written"]),
      (["--videos=a.mp4", "--reward=quality", "--output=w.csv", "--overwrite"], ["w.json", "it is a folder"]),
      (["--videos=a.mp4", "--reward=quality", "--prompts_file=none"], ["prompt file none", "does not exist"]),
      (["--videos=a.mp4", "--reward=quality", "--prompts_file=two.txt"], ["two.txt", "2 prompts for 1 videos"]),
      (["--videos=a.mp4", "--image_frames=0"], ["--image_frames=0", "1"]),
      (["--videos=a.mp4", "--batch=none"], ["--batch=none"]),
      (["--videos=a.mp4", "--dtype=int4"], ["--dtype=int4", "float32|bfloat16|int8"]),
    ],
  )
  def test_is_one_line(self, tmp_path, arguments, fragments):
    video.write_video(tmp_path / "a.mp4", clip(3), 16)
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "w.json").mkdir()
    result = score(tmp_path, *arguments)
    assert result.code == 2, result
    (line,) = result.stderr.splitlines()
    for fragment in fragments:
      assert fragment in line
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "two.txt", "w.json"}

  @pytest.mark.parametrize(
    ("damage", "message"),
    [
      (lambda reward: None, "hpsv3 needs a prompt for each video, and 1 of 1 have none (a.mp4)"),
      (lambda reward: (reward / "reward.json").unlink(), "rewards/hpsv3 is not a reward model: it has no reward.json"),
      (lambda reward: (reward / "tokenizer.json").unlink(), "tokenizer.json"),
      (lambda reward: _alter(reward / "prompt_template.json", "Rate", "Judge"), "the text has sha256"),
      (lambda reward: _alter(reward / "prompt_template.json", "toy", "hpsv3"), "is not the published one"),
      (lambda reward: _alter(reward / "reward.json", '"vocab_size": 40', '"vocab_size": 48'), "is corrupt"),
      (lambda reward: resize(reward, "decoder", "vocab_size", 48), "does not fit the model"),
      (_truncate, "is truncated or altered"),
    ],
  )
  def test_rewards_that_are_none(self, tmp_path, checkpoint, damage, message):
    video.write_video(tmp_path / "a.mp4", clip(3), 16)
    (tmp_path / "one.txt").write_text("a red circle\n")
    reward = pathlib.Path(shutil.copytree(checkpoint / "rewards/hpsv3", tmp_path / "model/rewards/hpsv3"))
    damage(reward)
    given = [] if "needs a prompt" in message else ["--prompts_file=one.txt"]
    result = score(tmp_path, "--videos=a.mp4", "--checkpoint=model", "--reward=hpsv3", *given)
    assert result.code == 2, result
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not list(tmp_path.glob("*scores*"))


class TestInputs:
  @pytest.fixture
  def videos(self, tmp_path) -> list[epath.Path]:
    for name in ("b.mp4", "run1/a.MP4", "run2/a.MP4", ".hidden/c.mp4", "run1/notes.txt", "run2/.d.mp4"):
      (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / "v" / name).touch()
    return score_inputs.find_videos(str(tmp_path / "v"))

  def test_folders_are_searched(self, tmp_path, videos):
    names = [video.relative_to(tmp_path / "v").as_posix() for video in videos]
    assert names == ["b.mp4", "run1/a.MP4", "run2/a.MP4"]
    assert score_inputs.find_videos(f"{tmp_path}/v/run*") == videos[1:]
    assert score_inputs.find_videos(f"{tmp_path}/v/**/a.*") == videos[1:]
    assert [path.name for path in score_inputs.find_videos(f"{tmp_path}/v/run1/notes.txt")] == ["notes.txt"]

  @pytest.mark.parametrize(
    "lines",
    [
      "one\ntwo\nthree",
      "run2/a.MP4\tthree\nb.mp4\tone\nrun1/a.MP4\ttwo",
      '{"video": "b.mp4", "prompt": "one"}\n{"video": "v/run2/a.MP4", "prompt": "three"}\n'
      '{"video": "run1/a.MP4", "prompt": "two"}',
      '{ "video": "b.mp4", "prompt": "one" }\n{\t"video": "run2/a.MP4", "prompt": "three"}\n'
      r'{"prompt": "two", "video": "run1/a.MP4", "by": "\ud83d"}',
    ],
  )
  def test_prompts_find_their_videos(self, tmp_path, videos, lines):
    (tmp_path / "prompts").write_text(lines)
    tasks = score_inputs.with_given_prompts(videos, str(tmp_path / "prompts"))
    assert [task.prompt for task in tasks] == ["one", "two", "three"]
    assert [task.video for task in tasks] == videos

  @pytest.mark.parametrize(
    ("lines", "message"),
    [
      ("one\ntwo", "has 2 prompts for 3 videos"),
      ("b.mp4\tone\nrun1/a.MP4\ttwo", "no prompt for .*run2/a.MP4"),
      ("b.mp4\tone\na.MP4\ttwo", "'a.MP4' is the end of .*run1/a.MP4 and of .*run2/a.MP4; give more of the path"),
      ("b.mp4\tone\nv/b.mp4\tone\nrun1/a.MP4\ttwo\nrun2/a.MP4\tthree", "has 2 prompts for .*b.mp4"),
      ("b.mp4\tone\nb.mp4\ttwo", "names b.mp4 more than once"),
      ("b.mp4\tone\nrun1/a.MP4\ttwo\nrun2/a.MP4\tthree\nx.mp4\tfour", "videos that are not there: x.mp4"),
      ("b.mp4\tone\ntwo\nthree", "'two' must be a file name, a tab and a prompt"),
      ("b.mp4\tone\nrun1/a.MP4\t", "must be a file name, a tab and a prompt"),
      ('{"video": "b.mp4"}', "needs a video and a prompt"),
      ('{"video": "b.mp4", "prompt": 3}', "needs a video and a prompt"),
      ('{ "video": "b.mp4", "prompt": "one"}\n3\nthree', "the line '3' needs a video and a prompt"),
      ('{ "video": "b.mp4", "prompt": "one"}\ntwo\nthree', "the line 'two' is not valid JSON"),
      ('{"video": "b.mp4', "not valid JSON"),
    ],
  )
  def test_prompts_that_do_not_fit(self, tmp_path, videos, lines, message):
    (tmp_path / "prompts").write_text(lines)
    with pytest.raises(ConfigError, match=message):
      score_inputs.with_given_prompts(videos, str(tmp_path / "prompts"))

  def test_prompts_of_generated_videos(self, videos):
    (videos[1].parent / "manifest.json").write_text('{"settings": {"prompt": "a red circle", "seed": 1}}')
    (videos[2].parent / "manifest.json").write_text('{"settings": {}}')
    tasks = score_inputs.with_own_prompts(videos)
    assert [task.prompt for task in tasks] == [None, "a red circle", None]
    assert [task.fault is None for task in tasks] == [True, True, False]
    assert "manifest.json holds no prompt" in tasks[2].fault
