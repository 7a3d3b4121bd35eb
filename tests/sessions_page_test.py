"""The page about sessions does what it says: its program runs, and its command makes the same video."""

import contextlib
import json
import re
import shlex

import numpy as np
import pytest

from streamt1_jax.cli import results
from streamt1_jax.io import video
from tests.command_line import REPOSITORY, generate, save_model


@pytest.mark.slow
def test_the_program_runs_and_its_timeline_makes_the_same_video(tmp_path, capsys):
  model = save_model(tmp_path / "tiny")
  page = (REPOSITORY / "docs" / "sessions.md").read_text()
  program, live = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  program = program.replace("for chunk in session:\n", "for chunk in session:\n  made.append(chunk)\n")
  names = {"made": []}
  with contextlib.chdir(tmp_path):
    exec(program.replace("Pipeline.load()", f"Pipeline.load({str(model)!r})"), names)
    session = names["pipeline"].session("a red circle", num_chunks=1)
    exec(live, {"session": session})
  assert video.probe_video(tmp_path / "live.mp4")[:3] == (9, 16, 4 * 32)
  assert [chunk.index for chunk in names["made"]] == list(range(6))
  assert (names["receipt"].status, names["receipt"].chunk) == ("applied", 3)
  (told,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
  assert json.loads((tmp_path / "timeline.json").read_text()) == json.loads(told)
  (command,) = re.findall(r"```bash\nstreamt1 generate (.*?)\n```", page)
  done = generate(tmp_path, f"--checkpoint={model}", *shlex.split(command))
  assert done.code == 0, done.stderr
  (folder,) = (tmp_path / "outputs").iterdir()
  sha256 = names["pipeline"].model_sha256
  latents = np.concatenate([chunk.latents for chunk in names["made"]])
  np.testing.assert_array_equal(results.read_latents(folder, sha256), latents)
