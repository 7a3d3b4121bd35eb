"""Exports for VBench: what its matchers find in them, what `--check` notices, and what result files add up to.

The matchers below follow the rules of VBench and VBench-Long; VBench itself needs CUDA.
"""

import collections
import functools
import json
import os
import pathlib
import tempfile

import numpy as np
import pytest
from etils import epath

from streamt1_jax.cli import export_vbench
from streamt1_jax.evaluation.vbench import export, prompts, scores
from streamt1_jax.io import video

BEACH, CAT, PARK = "A beach, ç, at night.", "a cat sits", "a park"
LINES = [BEACH, CAT, BEACH, PARK]

# The row of LaVie on VBench's public leaderboard, in per cent, and its sums there.
LAVIE = dict(
  zip(
    scores.DIMENSIONS,
    [91.41, 97.47, 98.30, 96.38, 49.72, 54.94, 61.90, 91.82, 33.32, 96.80, 86.39, 34.09, 52.69, 23.56, 25.93, 26.41],
    strict=True,
  )
)
LAVIE_SUMS = {"quality": 78.78, "semantic": 70.31, "total": 77.08}


def matched_by_vbench(folder, texts, samples=5):
  """Files that VBench finds of each prompt: the suffix is that of whatever entry comes first."""
  names = os.listdir(folder)
  suffix = "." + names[0].split(".")[-1]
  return {text: [f"{text}-{i}{suffix}" for i in range(samples) if f"{text}-{i}{suffix}" in names] for text in texts}


def matched_by_long(folder, texts):
  """Videos that VBench-Long finds of each prompt: a name ends at its first "_", and before it stands -DIGIT."""
  found = collections.Counter(name.removesuffix(".mp4").split("_")[0] for name in os.listdir(folder))
  return {text: sum(count for name, count in found.items() if name[:-2] == text and name[-2] == "-") for text in texts}


@functools.cache
def encoded(frames, fps=16):
  """A video file."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "video.mp4"
    video.write_video(path, np.zeros((frames, 16, 16, 3), np.uint8), fps)
    return path.read_bytes()


def replace_video(videos, content):
  """Another file in the place of a video, which is also the source's."""
  (videos / f"{CAT}-1.mp4").unlink()
  (videos / f"{CAT}-1.mp4").write_bytes(content)


def make_result(folder, prompt, seed, *, frames=4, fps=16, **settings):
  """What `streamt1 generate` leaves of a video, as far as the export reads it."""
  folder.mkdir(parents=True)
  (folder / "video.mp4").write_bytes(encoded(frames, fps))
  settings = {"prompt": prompt, "seed": seed, "beam_size": 2} | settings
  (folder / "manifest.json").write_text(json.dumps({"settings": settings}))


@pytest.fixture
def made(tmp_path):
  """Two videos of each prompt, in one folder a seed, and the file of prompts."""
  for seed in (3, 11):
    for number, prompt in enumerate(dict.fromkeys(LINES)):
      make_result(tmp_path / f"seed{seed}" / str(number), prompt, seed)
  (tmp_path / "prompts.txt").write_text("\n".join(LINES))
  return tmp_path


def run(made, *arguments, videos="seed3,seed11", samples=2, file="prompts.txt", output="out"):
  folders = ",".join(str(made / name) for name in videos.split(","))
  given = [f"--videos={folders}", f"--prompts={made / file}", f"--output={made / output}", f"--samples={samples}"]
  return export_vbench.main([*given, *arguments])


def check(made, *arguments, output="out"):
  return export_vbench.main(["--check", f"--output={made / output}", *arguments])


def test_vbench_finds_every_sample_of_every_different_prompt(made):
  assert run(made) == 0
  found = matched_by_vbench(made / "out" / "videos", set(LINES))
  assert found == {text: [f"{text}-0.mp4", f"{text}-1.mp4"] for text in LINES}
  assert sorted(path.name for path in (made / "out").iterdir()) == ["manifest.json", "videos"]
  rows = json.loads((made / "out" / "manifest.json").read_text())["videos"]
  assert [(row["line"], row["sample"], row["seed"]) for row in rows] == [
    (1, 0, 3), (1, 1, 11), (2, 0, 3), (2, 1, 11), (4, 0, 3), (4, 1, 11)
  ]  # fmt: skip
  assert check(made) == 0


def test_what_is_not_cut_is_the_same_file(made):
  run(made)
  assert (made / "out" / "videos" / f"{CAT}-1.mp4").samefile(made / "seed11" / "1" / "video.mp4")


def test_extended_prompts_are_found_by_the_original_ones(made):
  extended = [f"{text} in great detail" for text in LINES]
  (made / "extended.txt").write_text("\n".join(extended))
  for number, text in enumerate(dict.fromkeys(extended)):
    make_result(made / "extended" / str(number), text, 0)
  assert run(made, f"--model_prompts={made / 'extended.txt'}", videos="extended", samples=1) == 0
  assert all(matched_by_vbench(made / "out" / "videos", LINES).values())
  row = json.loads((made / "out" / "manifest.json").read_text())["videos"][1]
  assert (row["prompt"], row["model_prompt"]) == (CAT, f"{CAT} in great detail")


def test_custom_names_are_lines_and_suit_long_whatever_the_prompt_holds(made):
  (made / "odd.txt").write_text("under_score\n" + "a/b " * 90 + "\n")
  for number, text in enumerate(["under_score", ("a/b " * 90).strip()]):
    make_result(made / "odd" / str(number), text, 0)
  assert run(made, "--layout=custom", videos="odd", samples=1, file="odd.txt") == 0
  assert json.loads((made / "out" / "prompts.json").read_text())["0001-0.mp4"] == "under_score"
  assert matched_by_long(made / "out" / "videos", ["0001", "0002"]) == {"0001": 1, "0002": 1}


def test_flicker_prompts_get_more_samples(made):
  entries = [{"prompt_en": text, "dimension": ["scene"]} for text in LINES]
  entries[2]["dimension"] = ["temporal_flickering"]
  (made / "full.json").write_text(json.dumps(entries))
  assert run(made, "--flicker_samples=2", samples=1, file="full.json") == 0
  assert sorted(os.listdir(made / "out" / "videos")) == sorted(
    [f"{BEACH}-0.mp4", f"{BEACH}-1.mp4", f"{CAT}-0.mp4", f"{PARK}-0.mp4"]
  )


def test_80_frames_go_to_long_and_79_to_vbench(made, capsys):
  make_result(made / "long" / "0", CAT, 0, frames=81)
  (made / "one.txt").write_text(CAT)
  for frames, tool in ((81, "VBench-Long"), (80, "VBench-Long"), (79, "VBench")):
    assert run(made, f"--frames={frames}", videos="long", samples=1, file="one.txt", output=f"out{frames}") == 0
    assert video.probe_video(made / f"out{frames}" / "videos" / f"{CAT}-0.mp4")[:2] == (frames, 16)
    assert check(made, output=f"out{frames}") == 0
    assert f"1 videos for {tool}: no fault" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("harm", "words"),
  [
    (lambda videos: (videos / f"{CAT}-1.mp4").unlink(), "1 of 6 videos are missing: a cat sits-1.mp4"),
    (lambda videos: (videos / ".DS_Store").touch(), "1 entries are no video of this export: .DS_Store"),
    (lambda videos: (videos / "split_clip").mkdir(), "an earlier run of VBench-Long left"),
    (lambda videos: replace_video(videos, encoded(4, 15)), "has 15 frames"),
    (lambda videos: replace_video(videos, encoded(80)), "from 5.0 s on go to VBench-Long"),
    (lambda videos: replace_video(videos, b"no video"), "is not a readable video"),
  ],
)
def test_check_notices(made, capsys, harm, words):
  run(made)
  harm(made / "out" / "videos")
  assert check(made) == 3
  assert words in capsys.readouterr().err


def test_check_looks_into_what_the_tool_found(made, capsys):
  run(made)
  results = made / "results"
  results.mkdir()
  entries = [{"prompt_en": CAT, "video_list": ["a.mp4"]}, {"prompt_en": PARK, "video_list": []}]
  (results / "results_now_full_info.json").write_text(json.dumps(entries))
  assert check(made, f"--results={results}") == 3
  assert f"1 of 2 prompts have no video: {PARK}" in capsys.readouterr().err


@pytest.fixture
def alike(made):
  """Two prompts that differ in the case of their first letter, as two of VBench's do."""
  (made / "case.txt").write_text(f"{CAT}\n{CAT.capitalize()}")
  make_result(made / "case" / "0", CAT, 0)
  make_result(made / "case" / "1", CAT.capitalize(), 0)
  return made


def run_alike(alike):
  return run(alike, videos="case", samples=1, file="case.txt")


def test_names_that_differ_in_case_alone_are_noted_and_are_a_fault_when_one_is_missing(alike, capsys):
  for command in (run_alike, check):
    assert command(alike) == 0
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("note: names differ in the case of letters")
    assert "warning" not in line
  (alike / "out" / "videos" / f"{CAT}-0.mp4").unlink()
  assert check(alike) == 3
  error = capsys.readouterr().err
  assert f"warning: names differ in the case of letters alone, and this disk may keep one: {CAT}-0.mp4" in error
  assert "note:" not in error


class FoldingDisk(type(epath.Path())):
  """A folder of a disk that takes capital letters for small ones."""

  def __truediv__(self, name):
    return super().__truediv__(name.lower())


def test_a_disk_that_folds_case_is_told_from_one_that_does_not(tmp_path):
  assert not export.folds_case(epath.Path(tmp_path))
  assert export.folds_case(FoldingDisk(tmp_path))
  assert not list(tmp_path.iterdir())


def test_a_disk_that_folds_case_is_no_place_for_names_that_collide(alike, capsys, monkeypatch):
  monkeypatch.setattr(export, "folds_case", lambda folder: True)
  assert run_alike(alike) == 2
  error = capsys.readouterr().err
  assert f"keeps one of {CAT}-0.mp4, {CAT.capitalize()}-0.mp4" in error
  assert error.count("\n") == 1
  assert not (alike / "out").exists()
  assert run(alike) == 0


@pytest.mark.parametrize(("samples", "code"), [(10, 0), (11, 3)])
def test_long_finds_ten_samples_of_a_prompt(made, capsys, samples, code):
  """Its matcher takes two characters off a name: so the eleventh sample would belong to another prompt."""
  for seed in range(samples):
    make_result(made / "many" / str(seed), CAT, seed, frames=80)
  (made / "one.txt").write_text(CAT)
  assert run(made, "--layout=custom", videos="many", samples=samples, file="one.txt") == 0
  assert matched_by_long(made / "out" / "videos", ["0001"]) == {"0001": 10}
  assert check(made) == code
  assert ("1 names do not end in '-' and a single digit" in capsys.readouterr().err) == (samples > 10)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"samples": 3}, "lacks videos of 3 prompts"),
    ({"videos": "seed3,seed3"}, "one prompt and one seed"),
    ({"videos": "nowhere"}, "no video found"),
    ({"file": "none.txt"}, "does not exist"),
    ({"extra": ["--frames=81"]}, "fewer than --frames=81"),
    ({"extra": ["--flicker_samples=25"]}, "needs --prompts=VBench_full_info.json"),
    ({"extra": ["--results=x"]}, "--results belongs to --check"),
    ({"extra": ["--check", "--import=x"]}, "give one"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(made, capsys, arguments, words):
  extra = arguments.pop("extra", [])
  assert run(made, *extra, **arguments) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1
  assert not (made / "out").exists()


@pytest.mark.parametrize(
  ("settings", "words"), [({"beam_size": 4}, "one export is of one model"), ({"fps": 24}, "VBench needs exactly 16")]
)
def test_videos_that_do_not_belong_together(made, capsys, settings, words):
  make_result(made / "other" / "0", PARK, 20, **settings)
  (made / "one.txt").write_text(PARK)
  # The odd one has the largest seed: two samples do without it.
  assert run(made, videos="other,seed3,seed11", samples=2, file="one.txt") == 0
  assert run(made, videos="other,seed3,seed11", samples=3, file="one.txt", output="out2") == 2
  assert words in capsys.readouterr().err
  assert not (made / "out2").exists()


def test_an_earlier_export_is_replaced_only_when_asked(made, capsys):
  run(made)
  assert run(made) == 2
  assert "--overwrite" in capsys.readouterr().err
  assert run(made, "--overwrite", samples=1) == 0
  assert len(os.listdir(made / "out" / "videos")) == 3
  (made / "out" / "manifest.json").unlink()
  assert run(made, "--overwrite") == 2
  assert "no earlier export" in capsys.readouterr().err


def test_prompts_that_are_not_aligned_are_refused(made):
  (made / "short.txt").write_text("one line")
  with pytest.raises(ValueError, match="has 1 prompts, and .* has 4"):
    prompts.read(made / "prompts.txt", made / "short.txt")


@pytest.mark.parametrize("content", ["{}", "[]", '[{"prompt_en": 1, "dimension": []}]', '[{"prompt_en": "a"}]', "x"])
def test_a_list_of_prompts_that_is_none_is_refused(tmp_path, content):
  (tmp_path / "full.json").write_text(content)
  with pytest.raises(ValueError, match="full.json"):
    prompts.read(tmp_path / "full.json")


def test_sums_of_a_published_row():
  sums = scores.totals({name: value / 100 for name, value in LAVIE.items()})
  assert {name: round(100 * value, 2) for name, value in sums.items()} == LAVIE_SUMS


def test_a_dimension_that_lacks_leaves_its_sums_out():
  raw = {name: value / 100 for name, value in LAVIE.items()}
  del raw["scene"]
  assert scores.totals(raw).keys() == {"quality"}


def write_scores(path: pathlib.Path, dimension: str, score: float, values: dict[str, float | bool]):
  videos = [{"video_path": f"/any/where/{name}.mp4", "video_results": value} for name, value in values.items()]
  path.write_text(json.dumps({dimension: [score, videos]}))


def test_results_become_tables(tmp_path, capsys):
  for folder, shift in (("ours", 0.1), ("theirs", 0.0)):
    (tmp_path / folder).mkdir()
    values = {f"{prompt}-{sample}": 0.25 + shift for prompt in (CAT, PARK) for sample in range(2)}
    write_scores(tmp_path / folder / "results_1_eval_results.json", "color", 0.25 + shift, values)
    truths = {f"{CAT}-0": folder == "ours", f"{PARK}-0": True}
    write_scores(tmp_path / folder / "results_2_eval_results.json", "dynamic_degree", 0.5, truths)
  assert export_vbench.main([f"--import={tmp_path / 'ours'}", f"--against={tmp_path / 'theirs'}"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert "| color | 0.3500 | 0.350 [0.350, 0.350] | 2 x 4 |" in lines
  assert "| **total** | incomplete |  |  |" in lines
  assert "| color | 0.100 [0.100, 0.100] | 2 x 4 | 4/0/0 |" in lines
  assert "| dynamic_degree | 0.500 [0.000, 1.000] | 2 x 2 | 1/1/0 |" in lines


@pytest.mark.parametrize(
  ("document", "words"),
  [
    ([], "an object of dimensions"),
    ({"charm": [0, []]}, "no dimension of VBench"),
    ({"color": [0.5]}, "a number and a list of videos"),
    ({"color": [0.5, [{"video_path": "a-0.mp4"}]]}, "video_results"),
    ({"color": [0.5, [{"video_path": "a.mp4", "video_results": 1}]]}, "number of a sample"),
  ],
)
def test_bad_results_are_one_line(tmp_path, capsys, document, words):
  path = tmp_path / "results_eval_results.json"
  path.write_text(json.dumps(document))
  assert export_vbench.main([f"--import={path}"]) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1


def test_one_dimension_in_two_files_is_refused(tmp_path):
  for name in ("a", "b"):
    write_scores(tmp_path / f"{name}.json", "color", 0.5, {"x-0": 0.5})
  assert export_vbench.main([f"--import={tmp_path / 'a.json'},{tmp_path / 'b.json'}"]) == 2
