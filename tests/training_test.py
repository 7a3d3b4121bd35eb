"""The training loop: an interrupted run, resumed, is the run that was not interrupted. And what the programs refuse."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from streamt1_jax.config import ConfigError
from streamt1_jax.training import loop
from tests.command_line import result_of, start


@pytest.fixture
def run_flags(tmp_path):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test", f"--run_dir={tmp_path}"])
  with flagsaver.flagsaver(run_dir=str(tmp_path), checkpoint_every=3, log_every=2):
    yield


@jax.jit
def update(carry, step):
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), carry["x"].shape)
  carry = {"x": 0.5 * carry["x"] + noise}
  return carry, {"norm": jnp.linalg.norm(carry["x"])}


def test_a_resumed_run_ends_where_an_undisturbed_one_does(run_flags, tmp_path):
  start = {"x": jnp.ones(4)}
  undisturbed = loop.run_steps(start, update, 8, tmp_path / "whole")

  class Killed(Exception):
    pass

  def dies_at_step_5(carry, step):
    if step == 5:
      raise Killed
    return update(carry, step)

  with pytest.raises(Killed):
    loop.run_steps(start, dies_at_step_5, 8, tmp_path / "resumed")
  resumed_from = []

  def remembers(carry, step):
    resumed_from.append(int(step))
    return update(carry, step)

  resumed = loop.run_steps(start, remembers, 8, tmp_path / "resumed")
  # Checkpoints are written after 1, 3 and 6 steps; the newest before the kill is the one after 3.
  assert resumed_from == [3, 4, 5, 6, 7]
  np.testing.assert_array_equal(resumed["x"], undisturbed["x"])


def test_the_curve_is_a_table_and_a_picture(run_flags, tmp_path):
  run_dir = loop.start_run()
  loop.run_steps({"x": jnp.ones(4)}, update, 8, run_dir)
  loop.plot_curve(run_dir, ["norm"], "a test", ylabel="norm")
  with (tmp_path / "loss.csv").open() as file:
    assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6", "8"]
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert "--checkpoint_every=3" in (tmp_path / "flags.txt").read_text()


def test_a_run_is_not_resumed_as_another(run_flags, tmp_path):
  loop.start_run()
  with flagsaver.flagsaver(checkpoint_every=4):
    loop.start_run()
  with flagsaver.flagsaver(seed=7), pytest.raises(ConfigError, match="--seed=0 there, --seed=7 here"):
    loop.start_run()
  assert "--seed=0" in (tmp_path / "flags.txt").read_text()


@pytest.mark.parametrize(
  ("program", "arguments", "fragments"),
  [
    ("train_vae", ["--preset=golden", "--run_dir=run"], ["--preset=golden", "backbone alone"]),
    ("train_dit", ["--preset=bench_mid", "--run_dir=run", "--codec_dir=codec"], ["--preset=bench_mid"]),
    ("train_dit", ["--init_from=missing", "--run_dir=file/run", "--codec_dir=codec"], ["file/run", "Not a directory"]),
    ("train_dit", ["--run_dir=run", "--codec_dir=codec", "--step_weights=1"], ["--step_weights must be 4", "(1.0,)"]),
    ("train_dit", ["--run_dir=run", "--codec_dir=codec", "--ema_decay=1.5"], ["--ema_decay=1.5", "[0.0, 1.0]"]),
    ("train_vae", ["--run_dir=run", "--clip_frames=18"], ["--clip_frames", "multiple of 4 more", "18"]),
    ("train_reward", ["--reward=clip", "--run_dir=run"], ["--reward=clip", "hpsv3|videoalign"]),
    (
      "train_reward",
      ["--reward=hpsv3", "--run_dir=run", "--init_from=missing"],
      ["missing", "folder of a reward model"],
    ),
    ("train_reward", ["--reward=hpsv3", "--run_dir=run", "--codec_dir=missing"], ["missing does not exist"]),
    ("train_reward", ["--reward=hpsv3", "--run_dir=run", "--emphasis=turn:2"], ["--emphasis", "turn:2", "color, "]),
    ("train_reward", ["--reward=hpsv3", "--run_dir=run", "--emphasis=blur"], ["--emphasis", "'blur'", "background:3"]),
    ("train_reward", ["--reward=hpsv3", "--run_dir=run", "--windows=9"], ["--windows=9", "for videoalign"]),
    ("train_reward", ["--reward=videoalign", "--run_dir=run", "--windows=9,5"], ["--windows", "'5'", "9..477"]),
    ("evaluate_reward", ["--reward_dir=missing"], ["missing", "folder of a reward model"]),
    ("compare_search", ["--output=file/rows.jsonl"], ["--output=file/rows.jsonl", "cannot be written"]),
    ("compare_search", ["--output=rows.jsonl", "--beam_size=1", "--top_k=1"], ["single candidate"]),
    ("compare_short_frames", ["--frames=3,6"], ["--frames=3,6", "falling numbers in 1..12"]),
    ("compare_short_frames", ["--frames=13,1"], ["--frames=13,1", "1..12"]),
    ("compare_short_frames", ["--frames=6,few"], ["--frames=6,few"]),
    ("compare_short_frames", ["--frames=6,3"], ["--frames=6,3", "the first is 12"]),
    ("compare_short_frames", ["--frames=12,0"], ["--frames=12,0", "1..12"]),
    ("compare_short_frames", ["--short_frames=3"], ["--short_frames", "--frames"]),
    ("train_tokenizer", ["--output=file/tokenizer.model"], ["--output=file/tokenizer.model", "cannot be written"]),
    ("export_checkpoint", ["--codec_dir=a", "--dit_dir=b", "--output=c", "--tokenizer=d"], ["--tokenizer=d", "file"]),
    ("export_checkpoint", ["--codec_dir=a", "--dit_dir=b", "--output=c", "--tokenizer=file"], ["a does not exist"]),
    ("export_checkpoint", ["--codec_dir=a", "--dit_dir=b", "--output=c", "--dtype=int8"], ["--dtype=int8", "float16"]),
  ],
)
def test_bad_input(tmp_path, program, arguments, fragments):
  (tmp_path / "file").write_text("in the way")
  process = start(tmp_path, *arguments, program=program)
  process.join()
  result = result_of(process.exitcode, tmp_path)
  assert result.code == 2, result
  assert len(result.stderr.splitlines()) == 1, result.stderr
  for fragment in fragments:
    assert fragment in result.stderr
  assert {path.name for path in tmp_path.iterdir()} == {"file", ".stdout", ".stderr"}
