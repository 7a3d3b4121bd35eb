"""The flagfiles: the published runs have the published numbers, and every command accepts its own."""

import dataclasses
import importlib
import re

import pytest

from streamt1_jax.cli import command, generate, search_flags
from streamt1_jax.cli.files import find_checkpoint
from streamt1_jax.config import preset
from streamt1_jax.io.checkpoint import load_config
from tests.command_line import REPOSITORY, save_model
from tests.command_line import generate as generate_here

FLAGFILES = REPOSITORY / "experiments/flagfiles"

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
  "reward_decode": "scratch",
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
  "paper_5s.flags": (21, PAPER, "videoalign+hpsv3"),
  "paper_30s.flags": (120, PAPER, "videoalign+hpsv3"),
  "longlive_streaming.flags": (120, STREAMING, None),
}
"""Latent frames, fields of the search, and rewards."""


@pytest.mark.parametrize("name", RUNS)
def test_published_runs(tmp_path, monkeypatch, name):
  """Found by name in any folder; the model need not be there."""
  monkeypatch.chdir(tmp_path)
  latent_frames, search, reward = RUNS[name]
  values = command.parse(generate.define_flags, [f"--flagfile={name}", "--prompt=a red circle"])
  assert search.items() <= dataclasses.asdict(search_flags.search_config(values, preset("wan_1_3b"))).items()
  assert values.num_latent_frames == latent_frames
  assert values.seconds is None
  assert values.seed == 42
  assert values.dtype == "bfloat16"
  assert values.checkpoint == "checkpoints/wan_1_3b"
  assert values.reward == reward
  # Fewer frames are faster, and not what was published.
  assert values.short_frames is None


@pytest.mark.parametrize("name", ["paper_5s.flags", "paper_30s.flags"])
def test_published_searches_need_the_published_rewards(tmp_path, name):
  """Refused before anything is loaded, with the command that adds them."""
  model = save_model(tmp_path / "tiny")
  result = generate_here(tmp_path, f"--flagfile={name}", f"--checkpoint={model}", "--prompt=a red circle")
  assert result.code == 2
  (line,) = result.stderr.splitlines()
  assert f"there is no {model}/rewards/videoalign and no {model}/rewards/hpsv3" in line
  assert f"streamt1 convert --output={model} --reward_tokenizer=FILE --videoalign=FILE" in line


@pytest.mark.parametrize("page", ["README.md", "docs/weights.md"])
def test_first_command_with_published_weights(page):
  """It works without rewards. No documented command sees fewer frames."""
  commands = re.findall(r"^streamt1 generate .*--prompt=\"a panda.*$", (REPOSITORY / page).read_text(), re.MULTILINE)
  assert "--flagfile=longlive_streaming.flags" in commands[0]
  assert not any("--short_frames" in command for command in commands)


@pytest.mark.parametrize("name", ["generate_tiny", "generate_paper", "generate_streaming"])
def test_runs_of_the_small_model(name):
  values = command.parse(generate.define_flags, [f"--flagfile={FLAGFILES / name}.flags"])
  model = load_config(find_checkpoint(values.checkpoint))
  search_flags.search_config(values, model)
  assert search_flags.video_chunks(model, seconds=values.seconds) == 7
  assert values.prompt


PROGRAMS = {
  "vae": ["--run_dir=run"],
  "dit": ["--run_dir=run", "--codec_dir=codec"],
  "reward": ["--run_dir=run"],
}
"""Training programs, and the flags that their flagfiles leave to the person who runs them."""


def _program_of(flagfile):
  return next((name for name in ("vae", "dit") if flagfile.startswith(f"train_{name}")), "reward")


@pytest.mark.parametrize("path", sorted(FLAGFILES.glob("train_*.flags")), ids=lambda path: path.stem)
def test_trainings_of_the_small_model(path):
  """Accepted, and as many steps as the table of the shipped weights says."""
  name = _program_of(path.name)
  program = importlib.import_module(f"experiments.train.{name}")
  values = command.parse(program.define_flags, [f"--flagfile={path}", *PROGRAMS[name]])
  if name == "reward":
    program.read_emphasis(values)
    program.read_windows(values)
  table = (REPOSITORY / "checkpoints/tiny/README.md").read_text()
  assert re.search(rf"`{path.name}`, {values.steps}\b", table)
