"""The full-size check, run at a tiny size: every file it writes is converted, restored and searched with."""

import json
import os
import subprocess
import sys

import pytest

from tests.command_line import REPOSITORY, call

FINAL = ["training_backbone_lora", "wan_vae", "wan_umt5"]


def run(*arguments: str) -> subprocess.CompletedProcess:
  variables = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  command = [sys.executable, "-m", "experiments.measure.full_size_check", "--model=tiny", *arguments]
  return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_from_files_to_a_searched_chunk(tmp_path):
  done = run(
    f"--work_dir={tmp_path / 'check'}",
    f"--sources={','.join([*FINAL, 'diffusers_vae', 'hpsv3', 'videoalign'])}",
    "--latent_height=4",
    "--latent_width=4",
    "--chunks=1",
  )
  assert done.returncode == 0, done.stderr
  *table, report = done.stdout.splitlines()
  report = json.loads(report)
  stages = {stage["stage"]: stage for stage in report["stages"]}
  checks = ["restore backbone", "encode prompt", "search"]
  converted = ("training_backbone_lora", "wan_vae", "diffusers_vae", "wan_umt5", "hpsv3", "videoalign")
  conversions = [f"convert {name}" for name in converted]
  assert list(stages) == [*conversions, *checks]
  assert all(any(row.startswith(f"| {name} ") for row in table) for name in stages)
  assert all(stage["seconds"] > 0 and stage["peak_rss_bytes"] > 1e8 for stage in stages.values())
  assert all(stages[name]["disk_bytes"] > 0 and stages[name]["written_bytes"] > 0 for name in conversions)
  # The same weights under two sets of names are the same part, byte for byte.
  assert stages["convert wan_vae"]["weights_sha256"] == stages["convert diffusers_vae"]["weights_sha256"]
  assert stages["search"]["usable_candidates"] == [4]
  assert stages["search"]["frames"] == [9, 32, 32, 3]
  assert list((tmp_path / "check").iterdir()) == []


def test_a_folder_in_use_and_unknown_files_are_refused(tmp_path):
  (tmp_path / "thesis.txt").write_text("ten years")
  for arguments, message in (
    (["--work_dir=."], "--work_dir=. is not empty"),
    (["--work_dir=new", "--sources=wan_vae,wan_clip"], "'wan_clip' is not one of wan_backbone"),
    (["--work_dir=new", "--check=taste"], "--check=taste"),
  ):
    result = call("measure.full_size_check", tmp_path, "--model=tiny", *arguments)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
