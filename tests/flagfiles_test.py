"""The flagfiles of the published runs: accepted by the command, for the real model, with the published numbers."""

import json
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
from experiments import generate, search_flags
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
