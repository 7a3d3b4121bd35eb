"""The programs that measure, as a user runs them: what they report, and one line for every mistake."""

import functools
import json

import numpy as np
import pytest

from streamt1_jax import shipped
from streamt1_jax.measuring import saves, search_speed
from tests.command_line import call, save_model


@pytest.mark.parametrize(
  ("program", "arguments", "fragments"),
  [
    ("measure.benchmark", ["--preset=huge"], ["unknown preset 'huge'", "bench_mid"]),
    ("measure.benchmark", ["--beam_size=0"], ["beam_size", "1..100", "got 0"]),
    ("measure.benchmark", ["--beam_size=two"], ["--beam_size=two", "integer"]),
    ("measure.benchmark", ["--top_k=11"], ["top_k", "1..10", "got 11"]),
    ("measure.benchmark", ["--chunks=0"], ["--chunks", "1..341", "got 0"]),
    ("measure.benchmark", ["--chunks=342"], ["--chunks", "1..341", "got 342"]),
    ("measure.benchmark", ["--repeats=0"], ["--repeats=0", "positive integer"]),
    ("measure.benchmark", ["--max_sink_frames=4"], ["max_sink_frames", "multiple of the chunk (3)", "got 4"]),
    ("measure.benchmark", ["--dtype=float16"], ["--dtype=float16", "float32|bfloat16"]),
    ("measure.benchmark", ["fast"], ["'fast'", "--name=value"]),
    ("measure.benchmark", ["--mesh=data:16"], ["--mesh=data:16", "16 devices", "8 here"]),
    ("measure.benchmark", ["--reward_dir=missing"], ["missing does not exist", "folder of a reward model"]),
    ("measure.benchmark", ["--reward_dir=x", "--scaling", "--chunks=2"], ["--reward_dir takes no --scaling, --chunks"]),
    ("measure.benchmark", ["--scaling=fast"], ["--scaling=fast", "boolean"]),
    ("measure.benchmark", ["--mesh=2"], ["--mesh=2", "data, candidate, model"]),
    ("measure.benchmark", ["--scaling", "--beam_size=2", "--repeats=1"], ["--scaling takes no --beam_size, --repeats"]),
    ("measure.benchmark", ["--scaling", "--live_bytes", "--append_always"], ["takes no --live_bytes, --append_always"]),
    ("measure.benchmark", ["--live_bytes", "--top_k=1", "--chunks=3"], ["--live_bytes takes no --chunks"]),
    ("measure.save_cost", ["--chunks=2"], ["--chunks=2", "3"]),
    ("measure.save_cost", ["--save_every=0"], ["--save_every=0", "nothing"]),
    ("measure.save_cost", ["--save_every=4", "--chunks=3"], ["--save_every=4", "--chunks=3", "nothing would be saved"]),
    ("measure.live", ["--searches=1x4,3x3"], ["--searches", "3x3", "1x4, 2x2, particles, plain"]),
    ("measure.aot_compile", ["--reward_dtype=int8"], ["--reward_dtype needs --rewards"]),
    (
      "measure.aot_compile",
      ["--hlo_file=s3://bucket/file"],
      ["--hlo_file=s3://bucket/file", "a path of this machine or gs://"],
    ),
    (
      "measure.aot_table",
      ["--output=s3://bucket/file"],
      ["--output=s3://bucket/file", "a path of this machine or gs://"],
    ),
    ("measure.aot_compile", ["--switch=released", "--first_chunk"], ["--switch", "leave --first_chunk out"]),
    ("measure.long_video", ["--work_dir=gs://bucket/test"], ["--work_dir=gs://bucket/test", "a path of this machine"]),
    ("evaluate.sink_distance", ["--distances=90,near"], ["--distances", "whole numbers and none, got 90,near"]),
    ("evaluate.preview_rank", ["--candidates=6"], ["--candidates must be a multiple of 4, got 6"]),
    ("evaluate.preview_rank", ["--seed=7"], ["--seed must be a multiple of 100, got 7"]),
    ("evaluate.switch_effect", ["--chunks_after=0"], ["--chunks_after=0", "positive integer"]),
    ("measure.kill_test", ["--work_dir=gs://bucket/test"], ["--work_dir=gs://bucket/test", "a path of this machine"]),
    ("measure.kill_test", ["--model=gs://bucket/model"], ["--model=gs://bucket/model", "a path of this machine"]),
    (
      "measure.full_size_check",
      ["--work_dir=gs://bucket/check"],
      ["--work_dir=gs://bucket/check", "a path of this machine"],
    ),
    ("measure.mutation", [], ["--output"]),
    ("measure.mutation", ["--output=rows", "--modules=heads"], ["--modules=heads", "sampling", "chunk_step"]),
    ("evaluate.small_model", ["--split=all"], ["--split=all", "train|tune|test"]),
    ("evaluate.small_model", ["--num_captions=0"], ["--num_captions=0", "1"]),
    ("evaluate.small_model", ["--seed=-1"], ["--seed=-1", "0"]),
    ("evaluate.small_model", ["--seconds=nan"], ["--seconds=nan", "finite"]),
    ("evaluate.small_model", ["--checkpoint=nowhere"], ["nowhere does not exist"]),
    ("evaluate.small_model", ["--contact_sheet=."], ["--contact_sheet=.", "it is a folder"]),
    (
      "evaluate.small_model",
      ["--contact_sheet=file/sheet.png"],
      ["--contact_sheet=file/sheet.png", "cannot be written"],
    ),
  ],
)
def test_bad_input(tmp_path, program, arguments, fragments):
  (tmp_path / "file").write_text("in the way")
  result = call(program, tmp_path, *arguments)
  assert result.code == 2, result
  assert result.stdout == ""
  (line,) = result.stderr.splitlines()
  for fragment in fragments:
    assert fragment in line
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluate_refuses_other_worlds_and_lengths(tmp_path):
  small = save_model(tmp_path / "small")
  result = call("evaluate.small_model", tmp_path, f"--checkpoint={small}")
  assert result.code == 2, result
  assert "its frames are 32x32" in result.stderr
  result = call("evaluate.small_model", tmp_path, "--seconds=1000")
  assert result.code == 2, result
  (line,) = result.stderr.splitlines()
  assert "--seconds=1000.0" in line


_SMALL = ["--preset=golden", "--beam_size=1", "--top_k=2", "--chunks=3", "--repeats=1"]


def test_benchmark_reports(tmp_path, monkeypatch):
  # The rate of the machine is measured as it is for users, but not for as long.
  rate = functools.partial(search_speed.gemm_tflops, size=512, seconds=0.1)
  monkeypatch.setattr(search_speed, "gemm_tflops", rate)
  result = call("measure.benchmark", tmp_path, *_SMALL, "--mesh=data:1")
  assert result.code == 0, result
  (line,) = result.stdout.splitlines()
  report = json.loads(line)
  assert report["compilations_after_warmup"] == 0
  assert report["gemm_fraction"] == pytest.approx(report["tflops"] / report["gemm_tflops"])
  assert report["tflops"] == pytest.approx(report["model_tflop"] / report["seconds"])
  assert min(report[key] for key in ("seconds", "compile_seconds", "gemm_tflops", "peak_rss_bytes")) > 0
  # By hand: 36 tokens a chunk, width 96, 3 blocks; two beams see 1, 2 and 3 chunks, in 4 denoising forwards and a
  # clean one each.
  linear, text, patches = 2 * 36 * (6 * 96**2 + 2 * 96 * 192), 4 * 36 * 16 * 96, 4 * 36 * 64 * 96
  time = 2 * 3 * (32 * 96 + 7 * 96**2)
  forward = lambda visible: 3 * (linear + text + 4 * 36 * 36 * visible * 96) + patches + time
  assert report["model_tflop"] * 1e12 == pytest.approx(2 * 5 * sum(forward(visible) for visible in (1, 2, 3)))


@pytest.mark.slow
def test_switch_cost(tmp_path):
  """Every way to recache is measured, and once compiled it compiles no more."""
  result = call("measure.switch_cost", tmp_path, "--preset=golden", "--top_k=1", "--beam_size=1", "--repeats=1")
  assert result.code == 0, result
  (line,) = result.stdout.splitlines()
  report = json.loads(line)
  assert report["compilations_after_warmup"] == 0
  # The sinks are full: 9 frames, and 9 frames of the window.
  assert report["chunks_before"] == 3 + 3 + 2
  assert set(report["in_chunks"]) == {"released keep", "causal keep", "none keep", "released recache"}
  for name, ratio in report["in_chunks"].items():
    assert ratio == pytest.approx(report["seconds"][name] / report["seconds"]["chunk"])
    assert ratio > 0


@pytest.mark.slow
def test_benchmark_on_a_mesh(tmp_path):
  """Two prompts are twice the work, on four devices four times the machine."""
  reports = []
  for mesh in ("data:1", "data:2,candidate:2"):
    result = call("measure.benchmark", tmp_path, *_SMALL, f"--mesh={mesh}")
    assert result.code == 0, result
    reports.append(json.loads(result.stdout))
  one, several = reports
  assert one["mesh"] is None
  assert several["mesh"] == {"data": 2, "beam": 2, "sibling": 1, "model": 1, "seq": 1}
  assert several["model_tflop"] == pytest.approx(2 * one["model_tflop"])
  assert several["compilations_after_warmup"] == 0


@pytest.mark.slow  # compiles three searches
def test_benchmark_table(tmp_path):
  """More candidates keep the live bytes, and a candidate's temporaries are its activations, not a beam's memory."""
  result = call("measure.benchmark", tmp_path, "--preset=golden", "--top_k=1", "--live_bytes", "--mesh=data:1")
  assert result.code == 0, result
  header, *lines = (line.split() for line in result.stdout.splitlines())
  rows = [dict(zip(header, (int(cell.replace(",", "")) for cell in line), strict=True)) for line in lines]
  assert [row["candidates"] for row in rows] == [1, 4, 8]
  # The trace of more candidates holds more scores, a few bytes each.
  assert rows[2]["live"] - rows[0]["live"] < 1000
  assert (rows[2]["temporary"] - rows[1]["temporary"]) / 4 < rows[0]["beam_memory"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), [("hpsv3", [12, 6, 3, 1]), ("videoalign", [117, 57, 9])])
def test_benchmark_of_a_reward(tmp_path, name, frames):
  """HPSv3's work is by the frame; of VideoAlign's, slices of two frames are a part: 14, 8 and 4 are looked at."""
  options = "--repeats=1", "--top_k=1", "--beam_size=1"
  result = call("measure.benchmark", tmp_path, f"--reward_dir={shipped.checkpoint()}/rewards/{name}", *options)
  assert result.code == 0, result
  header, *lines = (line.split() for line in result.stdout.splitlines())
  rows = [dict(zip(header, map(float, line), strict=True)) for line in lines]
  assert [row["frames"] for row in rows] == frames
  assert min(min(row.values()) for row in rows) > 0
  work = [row["gflop"] for row in rows]
  if name == "hpsv3":
    np.testing.assert_allclose(work, work[-1] * np.array(frames), rtol=1e-3)
  else:
    np.testing.assert_allclose((work[0] - work[1]) / (work[1] - work[2]), (7 - 4) / (4 - 2), rtol=0.05)


@pytest.mark.slow
def test_benchmark_scaling(tmp_path):
  """The state holds a memory per beam and nothing per candidate, and 400 chunks compile nothing new."""
  result = call("measure.benchmark", tmp_path, "--preset=golden", "--scaling", "--mesh=data:1")
  assert result.code == 0, result
  *tables, line = result.stdout.splitlines()
  report = json.loads(line)
  assert [row["candidates"] for row in report["candidates"]] == [1, 2, 4, 8]
  assert [row["chunk"] for row in report["chunks"]] == [10, 100, 400]
  assert len(tables) == 1 + 4 + 1 + 2 + 1 + 3
  assert report["candidates"][0]["seconds_ratio"] == report["chunks"][0]["cpu_seconds_ratio"] == 1
  assert all(row["seconds"] > 0 and row["gemm_fraction"] > 0 for row in report["candidates"] + report["chunks"])
  state = [row["state"] for row in report["candidates"]]
  assert state == [state[0]] * 4
  one, two = (row["state"] for row in report["beams"])
  assert one == state[0]
  # By hand: keys and values of 7 chunks of 36 tokens, in 3 blocks of width 96, float32; the counters are shared.
  assert one >= 2 * 7 * 36 * 3 * 96 * 4
  assert 2 * one - two < 100
  temporary = [row["temporary"] for row in report["candidates"]]
  assert (temporary[3] - temporary[2]) / 4 < one


def test_evaluate_reports(tmp_path):
  arguments = ["--num_captions=1", "--seconds=0.5", "--search=none", "--mesh=data:1", "--contact_sheet=deep/sheet.png"]
  result = call("evaluate.small_model", tmp_path, *arguments)
  assert result.code == 0, result
  (line,) = result.stdout.splitlines()
  report = json.loads(line)
  assert report["captions"] == 1
  assert set(report["whole_video"].values()) <= {0.0, 1.0}
  assert "1/1" in result.stderr
  assert (tmp_path / "deep/sheet.png").read_bytes()[1:4] == b"PNG"


def test_evaluate_judges_true_clips(tmp_path):
  """The codec keeps what the caption says."""
  result = call("evaluate.small_model", tmp_path, "--num_captions=2", "--seconds=0.5", "--reconstruct")
  assert result.code == 0, result
  report = json.loads(result.stdout)
  assert report["whole_video"]["color"] == report["whole_video"]["background"] == 1.0


@pytest.mark.slow
def test_save_cost_reports(tmp_path):
  small = save_model(tmp_path / "small")
  arguments = [f"--checkpoint={small}", "--chunks=3", "--save_every=1", "--repeats=1"]
  result = call("measure.save_cost", tmp_path, *arguments)
  assert result.code == 0, result
  report = json.loads(result.stdout)
  assert report["seconds"]["with"] > 0
  assert report["copy"]["seconds"] <= report["save"]["seconds"]
  assert report["bytes_by_shapes"].keys() == saves.PRESETS.keys()
  assert report["stored_bytes"] > 0


def test_bytes_of_the_full_size():
  sizes = saves.state_bytes("wan_1_3b")
  # Keys and values of a token: 30 blocks of 12 heads of 128 numbers in bfloat16. A latent frame has 30x52 tokens.
  frame = 2 * 30 * 12 * 128 * 2 * (30 * 52)
  # A beam has 12 latent frames, and may add 12 to its sinks. Besides them it notes what is in which slot.
  # The latents of the slots, and those of the chunk that left the window last, in float32.
  latents = lambda slots: (slots + 1) * 3 * 16 * 60 * 104 * 4
  assert 0 <= sizes["memory"] - 2 * (24 * frame + latents(8)) < 2000
  assert 0 <= sizes["memory_without_added_sinks"] - 2 * (12 * frame + latents(4)) < 2000
