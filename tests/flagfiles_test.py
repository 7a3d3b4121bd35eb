"""The flagfiles: of the published runs, for the real model, with the published numbers; and of the small model's."""

import json
import re
import subprocess
import sys

import pytest

from streamt1_jax.config import preset
from tests.command_line import REPOSITORY

# In a process of its own, for flags are global; the model need not be there.
PROGRAM = """
import dataclasses, json, sys
from absl import flags
from absl.testing import flagsaver
from streamt1_jax.cli import generate, search_flags
from streamt1_jax.config import preset

parsed = {}
for name in sys.argv[1:]:
  with flagsaver.flagsaver():
    flags.FLAGS(["generate", "--flagfile=experiments/flagfiles/" + name, "--prompt=a red circle"])
    values = {flag: flags.FLAGS[flag].value for flag in ("checkpoint", "dtype", "num_latent_frames", "seconds", "seed")}
    parsed[name] = values | {"search": dataclasses.asdict(search_flags.search_config(preset("wan_1_3b")))}
print(json.dumps(parsed))
"""

PAPER = {
  "beam_size": 2,
  "top_k": 2,
  "noise_sigma": -0.1,
  "short_threshold": 0.0,
  "long_threshold": 0.2,
  "fusion_cap": 0.4,
  "sliding_window": 10,
  "max_sink_frames": 15,
  "sink_ema_decay": 0.999,
  "first_candidate": "reuse",
  "short_baseline": "history",
  "sink_ema_dtype": "compute",
}
STREAMING = {
  "beam_size": 1,
  "top_k": 1,
  "noise_sigma": 0.0,
  "first_candidate": "fresh",
  "max_sink_frames": 3,
  "sink_ema_decay": 1.0,
}


def test_the_models_own_share_of_the_published_numbers():
  model = preset("wan_1_3b")
  assert (model.chunk_frames, model.local_attention_frames, model.sink_frames) == (3, 12, 3)
  assert model.schedule.denoising_steps == (1000, 750, 500, 250)


RUNS = {
  "paper_5s.flags": (21, PAPER),
  "paper_30s.flags": (120, PAPER),
  "longlive_streaming.flags": (120, STREAMING),
}


@pytest.fixture(scope="module")
def parsed():
  done = subprocess.run([sys.executable, "-c", PROGRAM, *RUNS], cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("name", RUNS)
def test_published_runs(parsed, name):
  latent_frames, search = RUNS[name]
  assert search.items() <= parsed[name]["search"].items()
  assert parsed[name]["num_latent_frames"] == latent_frames
  assert parsed[name]["seconds"] is None
  assert parsed[name]["seed"] == 42
  assert parsed[name]["dtype"] == "bfloat16"
  assert parsed[name]["checkpoint"] == "checkpoints/wan_1_3b"


# As above, for the flagfiles of one training program, with what only the program itself knows to be allowed.
TRAINING = """
import importlib, json, sys
from absl import flags
from absl.testing import flagsaver
from streamt1_jax.rewards.table import REWARDS

name, required, *flagfiles = sys.argv[1:]
program = importlib.import_module("experiments.train." + name)
steps = {}
for flagfile in flagfiles:
  with flagsaver.flagsaver():
    flags.FLAGS([name, "--flagfile=experiments/flagfiles/" + flagfile, *required.split()])
    if name == "reward":
      spec = REWARDS[flags.FLAGS.reward]
      program.read_emphasis(spec)
      program.read_windows(spec, spec.training.config())
    steps[flagfile] = flags.FLAGS.steps
print(json.dumps(steps))
"""

PROGRAMS = {
  "vae": "--run_dir=run",
  "dit": "--run_dir=run --codec_dir=codec",
  "reward": "--run_dir=run",
}
"""Training programs, and the flags that their flagfiles leave to whoever runs them."""


def _program_of(flagfile):
  return next((name for name in ("vae", "dit") if flagfile.startswith(f"train_{name}")), "reward")


@pytest.mark.parametrize("program", PROGRAMS)
def test_trainings_of_the_small_model(program):
  """Accepted, and as many steps as the table of the shipped weights says."""
  files = [path.name for path in sorted((REPOSITORY / "experiments/flagfiles").glob("train_*.flags"))]
  files = [name for name in files if _program_of(name) == program]
  command = [sys.executable, "-c", TRAINING, program, PROGRAMS[program], *files]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  table = (REPOSITORY / "checkpoints/tiny/README.md").read_text()
  steps = json.loads(done.stdout)
  assert list(steps) == files
  for name, count in steps.items():
    assert re.search(rf"`{name}`, (a fresh text encoder, )?{count}\b", table), (name, count)
