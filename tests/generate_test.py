"""The command line from flags to files, on a small random model, as a user runs it."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from streamt1_jax.cli import command, export_vbench, generate_plan, results, steering_flags
from streamt1_jax.cli import generate as generate_command
from streamt1_jax.config import ConfigError, SearchConfig, preset
from streamt1_jax.drivers import FinalBeams
from streamt1_jax.memory_sinking import APPEND, NOTHING, Eviction
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.state import CandidateTrace, ChunkTrace
from tests import videos
from tests.command_line import (
  HOST_DEVICES,
  REPOSITORY,
  Result,
  generate,
  result_of,
  save_model,
  start,
)
from tests.whole_video import describe_trace

PROMPT = "a red circle moves left over a dark blue background"
LONG_PROMPT = "a blue square " + "that moves slowly " * 20
SEED = 7
NUM_FRAMES = 1 + 4 * (6 - 1)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> pathlib.Path:
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


class Finished:
  """A folder in which the command has run once, on two prompts."""

  def __init__(self, folder: pathlib.Path, checkpoint: pathlib.Path):
    self.folder = folder
    (folder / "list.txt").write_text(f"{PROMPT}\n{LONG_PROMPT}\n")
    self.arguments = [f"--checkpoint={checkpoint}", "--num_latent_frames=6"]
    # The manifest counts compilations, as those of a process that has just begun.
    jax.clear_caches()
    self.result = self.again("--prompts_file=list.txt", f"--seed={SEED}")
    self.outputs = [folder / results.result_folder("outputs", prompt.strip()) for prompt in (PROMPT, LONG_PROMPT)]

  def read(self, name: str, prompt: int = 0):
    return json.loads((pathlib.Path(self.outputs[prompt]) / name).read_text())

  def files(self) -> dict[str, bytes]:
    paths = [path for path in (self.folder / "outputs").rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths}

  def again(self, *arguments: str) -> Result:
    return generate(self.folder, *self.arguments, *arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_checkpoint) -> Finished:
  made = Finished(tmp_path_factory.mktemp("run"), small_checkpoint)
  assert made.result.code == 0, made.result.stderr
  return made


def test_every_file_is_there_and_nothing_else(finished):
  names = {"video.mp4", "contact_sheet.png", "manifest.json", "trace.json", "latents.safetensors"}
  names |= {"report.html", "pictures.zip"}
  folders = list((finished.folder / "outputs").iterdir())
  assert {folder.name for folder in folders} == {output.name for output in finished.outputs}
  for folder in folders:
    assert {path.name for path in folder.iterdir()} == names
  with Image.open(folders[0] / "contact_sheet.png") as sheet:
    assert sheet.width > 4 * 256


def test_three_frames_of_every_candidate_are_kept(finished):
  with zipfile.ZipFile(pathlib.Path(finished.outputs[0]) / "pictures.zip") as archive:
    kept = set(archive.namelist())
  chunks = finished.read("trace.json")["chunks"]
  assert kept == {f"{chunk['chunk']}/{each['candidate']}.jpg" for chunk in chunks for each in chunk["candidates"]}
  assert len(kept) > sum(len(set(chunk["survivors"])) for chunk in chunks)


def test_video_has_the_length_and_size_it_should(finished):
  frames, fps = videos.read_video(finished.outputs[0] / "video.mp4")
  assert frames.shape == (NUM_FRAMES, 256, 256, 3)
  assert fps == 16


def test_output_says_where_the_videos_are_and_shows_progress(finished):
  lines = finished.result.stdout.splitlines()
  assert lines == [f"outputs/{output.name}/video.mp4" for output in finished.outputs]
  assert finished.result.stderr.splitlines()[0] == "device: cpu, float32"
  assert "chunk 2/2" in finished.result.stderr
  assert "best score" in finished.result.stderr
  warnings = [line for line in finished.result.stderr.splitlines() if "first 32 tokens" in line]
  assert len(warnings) == 1


def test_manifest_tells_the_whole_run(finished):
  manifest = finished.read("manifest.json")
  assert manifest["settings"]["prompt"] == PROMPT
  assert manifest["settings"]["seed"] == SEED
  assert manifest["length"] == {
    "chunks": 2, "latent_frames": 6, "frames": NUM_FRAMES, "fps": 16, "seconds": NUM_FRAMES / 16
  }  # fmt: skip
  released = SearchConfig.released()
  for name in ("beam_size", "top_k", "noise_sigma", "fusion_cap", "max_sink_frames", "sliding_window"):
    assert manifest["flags"][name] == manifest["settings"][name] == getattr(released, name)
  assert manifest["flags"]["search"] == "stream_t1"
  assert manifest["flags"]["overwrite"] is False
  assert set(manifest["wall_seconds"]) == {"load", "text", "first_chunk", "search", "assemble", "write"}
  assert manifest["environment"]["platform"] == "cpu"
  assert manifest["peak_memory_bytes"]["host"] > 1e8
  assert manifest["prompt_truncated"] is False
  assert finished.read("manifest.json", prompt=1)["prompt_truncated"] is True


def test_cost_by_hand(finished):
  """Two beams of two candidates, four steps, two chunks: of 3 latent frames each, of 9 and of 12 frames."""
  counted = {
    "denoise": 2 * 4 * 4, "look_ahead": 0, "commit": 2 * 2, "decoded": 2 * 4 * 3, "previewed": 0,
    "image_calls": 2 * 4, "image_frames": 4 * (9 + 12), "video_calls": 2 * 4, "video_frames": 4 * (9 + 21),
  }  # fmt: skip
  cost = finished.read("manifest.json")["cost"]
  assert counted.items() <= cost.items()
  chunks = [chunk["cost"] for chunk in finished.read("trace.json")["chunks"]]
  assert {name: sum(chunk[name] for chunk in chunks) for name in counted} == counted
  flop = dict(cost["tflop"])
  assert flop.pop("total") == pytest.approx(sum(flop.values()))
  # The built-in rewards multiply nothing. Plain streaming has 4 + 1 forwards where the search has 16 + 2.
  assert flop["image_reward"] == flop["video_reward"] == 0
  assert 18 / 5 < cost["times_plain"] < 4
  lines = [line for line in finished.result.stderr.splitlines() if line.startswith("cost: 36 forwards, 24 latent")]
  assert len(lines) == 2
  assert f"{cost['times_plain']:.2f} times plain streaming" in lines[0]
  phases = finished.read("manifest.json")["wall_seconds"]
  assert cost["search_seconds"] == phases["first_chunk"] + phases["search"] > 0
  assert lines[0].endswith(f"; {cost['search_seconds']:,.1f} s of search")


def test_samples_of_a_prompt(finished):
  """Each has a seed and a folder of its own, and is there for what exports them."""
  arguments = (f"--prompt={PROMPT}", f"--seed={SEED}", "--search=none", "--output_dir=samples", "--samples=2")
  result = finished.again(*arguments)
  assert result.code == 0, result.stderr
  first = finished.folder / results.result_folder("samples", PROMPT)
  folders = [first, first.with_name(f"{first.name}-1")]
  assert sorted((finished.folder / "samples").iterdir()) == sorted(map(pathlib.Path, folders))
  documents = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
  assert [each["settings"]["seed"] for each in documents] == [SEED, SEED + 1_000_000]
  assert [each["seeds"]["base"] for each in documents] == [SEED, SEED + 1_000_000]
  assert [each["sample"] for each in documents] == [0, 1]
  assert documents[0]["sha256"] != documents[1]["sha256"]
  assert finished.again(*arguments).stdout.count("is finished, skipped") == 2
  shutil.rmtree(folders[1])
  assert finished.again(*arguments).stdout.count("is finished, skipped") == 1
  assert json.loads((folders[1] / "manifest.json").read_text())["sha256"] == documents[1]["sha256"]
  (finished.folder / "vbench.txt").write_text(PROMPT + "\n")
  given = {"videos": "samples", "prompts": "vbench.txt", "output": "vb"}
  flags = [f"--{name}={finished.folder / value}" for name, value in given.items()]
  assert export_vbench.main([*flags, "--samples=2"]) == 0
  names = {path.name for path in (finished.folder / "vb/videos").iterdir()}
  assert names == {f"{PROMPT}-0.mp4", f"{PROMPT}-1.mp4"}


def test_second_prompt_compiles_no_chunk_step(finished):
  first, second = (finished.read("manifest.json", prompt)["compilations"]["count"] for prompt in (0, 1))
  assert first > 2
  assert second <= 1  # a text encoder for its longer prompt


def test_trace_follows_from_its_own_scores(finished):
  trace = finished.read("trace.json")
  assert len(trace["chunks"]) == 2
  for index, chunk in enumerate(trace["chunks"]):
    weight = min(index / (2 - 1), SearchConfig.released().fusion_cap)
    hybrid = [candidate["hybrid"] for candidate in chunk["candidates"]]
    expected = [weight * c["short"] + (1 - weight) * c["long"] for c in chunk["candidates"]]
    np.testing.assert_allclose(hybrid, expected, rtol=1e-5)
    assert chunk["survivors"] == sorted(range(4), key=lambda n: -hybrid[n])[:2]
    assert chunk["scores"] == [hybrid[n] for n in chunk["survivors"]]
    assert [c["candidate"] for c in chunk["candidates"] if c["survivor"]] == sorted(chunk["survivors"])
    assert [c["route"] for c in chunk["candidates"]] == ["nothing"] * 4


@pytest.mark.parametrize(("chunks", "apart"), [(7, 1_000_000), (1000, 1_000_000), (1001, 2_000_000)])
def test_samples_never_share_a_seed(chunks, apart):
  """A chunk takes 1000 seeds. A longer video than that of the flags, which begins with given chunks, is refused."""
  values = command.parse(generate_command.define_flags, [f"--prompt={PROMPT}", "--samples=3"])
  steered = steering_flags.read(values)
  search = SearchConfig(sink_distance=9)
  plan = generate_plan.Plan(values, "float32", epath.Path("."), preset("tiny"), {}, search, chunks, "", steered, SEED)
  assert [each.seed for each in plan.samples()] == [SEED + sample * apart for sample in range(3)]
  plan.require_apart(apart // 1000)
  with pytest.raises(ConfigError, match=f"--samples=3: videos of {apart // 1000 + 1} chunks.* would share seeds"):
    plan.require_apart(apart // 1000 + 1)


def test_seeds_follow_the_released_rule(finished):
  first, second = finished.read("trace.json")["chunks"]
  assert [c["seed"] for c in first["candidates"]] == [SEED, SEED + 1, SEED + 2, SEED + 3]
  parents = [SEED + survivor for survivor in first["survivors"]]
  assert [c["seed"] for c in second["candidates"]] == [parents[0], SEED + 1001, parents[1], SEED + 1101]
  assert [c["parent"] for c in second["candidates"]] == [0, 0, 1, 1]


def test_lineage_leads_to_the_best_video(finished):
  trace, manifest = finished.read("trace.json"), finished.read("manifest.json")
  final, (first, second) = trace["final"], trace["chunks"]
  assert final["best"] == int(np.argmax(final["scores"]))
  assert manifest["score"] == max(final["scores"])
  beginning, end = final["lineage"]
  assert end["candidate"] == second["survivors"][final["best"]]
  assert beginning["beam"] == end["candidate"] // 2
  assert beginning["candidate"] == first["survivors"][beginning["beam"]]
  winners = [first["candidates"][beginning["candidate"]], second["candidates"][end["candidate"]]]
  assert manifest["seeds"] == {"base": SEED, "winner": [winner["seed"] for winner in winners]}


def test_finished_prompts_are_skipped(finished):
  before = finished.files()
  result = finished.again("--prompts_file=list.txt", f"--seed={SEED}")
  assert result.code == 0
  assert result.stdout.count("skipped") == 2
  assert result.stdout.count("video.mp4") == 2
  assert finished.files() == before


@pytest.mark.parametrize(
  ("arguments", "name"),
  [(["--seed=8"], "seed 7, not 8"), ([f"--seed={SEED}", "--top_k=1"], "top_k 2, not 1")],
)
def test_results_of_other_settings_are_not_lost(finished, arguments, name):
  before = finished.files()
  result = finished.again("--prompts_file=list.txt", *arguments)
  assert result.code == 2
  assert name in result.stderr
  assert "--overwrite" in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert finished.files() == before


def test_same_seed_gives_the_same_search_again(finished):
  before = finished.read("trace.json")
  started = finished.read("manifest.json")["wall_seconds"]
  assert finished.again(f"--prompt={PROMPT}", f"--seed={SEED}", "--overwrite").code == 0
  assert finished.read("trace.json") == before
  assert finished.read("manifest.json")["wall_seconds"] != started
  assert [path for path in (finished.folder / "outputs").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_process_of_its_own_loads_no_large_framework(finished, tmp_path):
  code = (
    "import atexit, runpy, sys; heavy = ('torch', 'tensorflow', 'tensorflow_datasets');"
    "atexit.register(lambda: print([name for name in heavy if name in sys.modules]));"
    "runpy.run_module('streamt1_jax', run_name='__main__', alter_sys=True)"
  )
  arguments = [*finished.arguments, f"--prompt={PROMPT}", f"--seed={SEED}"]
  environment = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(HOST_DEVICES, ""),
    "PYTHONPATH": str(REPOSITORY),
  }
  command = [sys.executable, "-c", code, "generate", *arguments]
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  folder = results.result_folder("outputs", PROMPT)
  assert done.stdout.splitlines() == [f"{folder}/video.mp4", "[]"]
  assert (tmp_path / folder / "trace.json").read_bytes() == (finished.outputs[0] / "trace.json").read_bytes()


def test_plain_streaming_draws_one_candidate(tmp_path, small_checkpoint):
  arguments = [f"--checkpoint={small_checkpoint}", "--num_latent_frames=3", "--search=none", f"--prompt={PROMPT}"]
  result = generate(tmp_path, *arguments, "--report=false")
  assert result.code == 0
  names = {path.name for path in (tmp_path / results.result_folder("outputs", PROMPT)).iterdir()}
  assert names.isdisjoint({"report.html", "pictures.zip"})
  # Nothing is judged before the video is whole.
  assert "chunk 1/1" in result.stderr
  assert "score" not in result.stderr
  trace = json.loads((tmp_path / results.result_folder("outputs", PROMPT) / "trace.json").read_text())
  assert [len(chunk["candidates"]) for chunk in trace["chunks"]] == [1]


def test_search_in_which_every_candidate_is_bad(tmp_path):
  save_model(tmp_path / "model", backbone_scale=1e30)
  arguments = ["--checkpoint=model", "--num_latent_frames=3", f"--seed={SEED}", f"--prompt={PROMPT}"]
  result = generate(tmp_path, *arguments)
  assert result.code == 3
  message = result.stderr.splitlines()[-1]
  assert message == f"error: prompt {PROMPT!r}, chunk 0, seed {SEED}: every candidate is NaN or Inf"
  folder = tmp_path / results.result_folder("outputs", PROMPT)
  assert {path.name for path in folder.iterdir()} == {"trace.json", "failed.json", "report.html", "pictures.zip"}
  assert json.loads((folder / "failed.json").read_text())["settings"]["seed"] == SEED
  assert json.loads((folder / "trace.json").read_text())["final"] is None


def test_interrupted_run_leaves_nothing_half_written(tmp_path, small_checkpoint):
  arguments = [f"--checkpoint={small_checkpoint}", "--num_latent_frames=1023", f"--prompt={PROMPT}"]
  process = start(tmp_path, *arguments)
  while process.is_alive() and not list((tmp_path / "outputs").glob(".*.partial")):
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGINT)
  process.join()
  result = result_of(process.exitcode, tmp_path)
  assert result.code == 130
  assert result.stderr.splitlines()[-1] == "error: interrupted"
  assert list((tmp_path / "outputs").iterdir()) == []


def test_result_folders_are_readable_and_distinct():
  prompts = ["A red circle!", "a red circle", "word " * 100, "word " * 101, "红色的圆", "绿色的圆"]
  names = [results.result_folder("out", prompt).name for prompt in prompts]
  assert len(set(names)) == len(names)
  assert names[0].startswith("a-red-circle-")
  assert max(map(len, names)) < 64
  assert all(name.isascii() for name in names)


def _chunk(survivor, hybrid, route) -> ChunkTrace:
  """A chunk of two beams with two candidates each."""
  table = np.array(hybrid, np.float32).reshape(2, 2)
  flags = Flags(ema=table > 2.5, append=table > 3.5)
  return ChunkTrace(
    candidates=CandidateTrace(np.arange(4).reshape(2, 2), table, 2 * table, table, np.isfinite(table), flags),
    eviction=Eviction(np.array(route), np.array([-1, 3]), np.array([-1, -1])),
    survivor=np.array(survivor),
    score=np.array([hybrid[n] for n in survivor], np.float32),
    latents=None,
    frames=None,
    steps=None,
  )


def test_description_of_a_trace_made_by_hand():
  traces = [_chunk([3, 0], [3.0, 1.0, 2.0, 4.0], [NOTHING, NOTHING]), _chunk([2, 3], [0, 1, 9, 5], [NOTHING, APPEND])]
  beams = FinalBeams(latents=None, frames=None, scores=np.array([1.0, 2.0]), best=1)
  described = describe_trace(traces, beams, SearchConfig())
  assert described["chunks"][0]["candidates"][3] == {
    "candidate": 3, "parent": 1, "seed": 3, "short": 4.0, "long": 8.0, "hybrid": 4.0, "route": "nothing",
    "flags": {"ema": True, "append": True}, "usable": True, "survivor": True, "rank": 0,
    "fate": "survived", "copies": 1, "log_weight": None, "preview": None, "ahead": None,
  }  # fmt: skip
  assert [c["rank"] for c in described["chunks"][0]["candidates"]] == [1, None, None, 0]
  assert [c["route"] for c in described["chunks"][1]["candidates"]] == ["nothing", "nothing", "append", "append"]
  assert described["chunks"][1]["evictions"][1] == {"parent": 1, "route": "append", "frame": 3, "sink_frame": None}
  # The best beam of the end is candidate 3, whose parent is beam 1, which was candidate 0 of the first chunk.
  assert described["final"]["lineage"] == [
    {"chunk": 0, "beam": 1, "candidate": 0}, {"chunk": 1, "beam": 1, "candidate": 3}
  ]  # fmt: skip


def test_description_of_a_search_that_failed():
  described = describe_trace([_chunk([3, 0], [3.0, 1.0, np.nan, 4.0], [NOTHING, NOTHING])], None, SearchConfig())
  assert described["final"] is None
  assert [c["usable"] for c in described["chunks"][0]["candidates"]] == [True, True, False, True]
