"""The training loop: an interrupted run, resumed, is the run that was not interrupted. And what the programs refuse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from experiments.evaluate import compare_short_frames
from experiments.evaluate import reward as evaluate_reward
from experiments.train import dit, export_checkpoint, reward, tokenizer, vae
from streamt1_jax import shipped
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ConfigError, preset
from streamt1_jax.training import loop
from streamt1_jax.training import tokenizer as tokenizer_training
from streamt1_jax.training import vae as vae_training
from streamt1_jax.training.dataset import Dataset
from streamt1_jax.training.loop import Run


def _run(folder, **settings) -> Run:
  return Run(epath.Path(folder), {"seed": 0} | settings, checkpoint_every=3, log_every=2)


@jax.jit
def update(carry, step):
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), carry["x"].shape)
  carry = {"x": 0.5 * carry["x"] + noise}
  return carry, {"norm": jnp.linalg.norm(carry["x"])}


def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path):
  start = {"x": jnp.ones(4)}
  whole, resumed = _run(tmp_path / "whole"), _run(tmp_path / "resumed")
  undisturbed = loop.run_steps(start, update, 8, whole)

  class Killed(Exception):
    pass

  def dies_at_step_5(carry, step):
    if step == 5:
      raise Killed
    return update(carry, step)

  with pytest.raises(Killed):
    loop.run_steps(start, dies_at_step_5, 8, resumed)
  # Checkpoints are written after 1, 3 and 6 steps; the newest before the kill is the one after 3.
  assert [row["step"] for row in resumed.curve()] == [2, 4]
  resumed_from = []

  def remembers(carry, step):
    resumed_from.append(int(step))
    return update(carry, step)

  after = loop.run_steps(start, remembers, 8, resumed)
  assert resumed_from == [3, 4, 5, 6, 7]
  np.testing.assert_array_equal(after["x"], undisturbed["x"])
  assert resumed.curve() == whole.curve()


def test_the_curve_is_a_table_and_a_picture(tmp_path):
  run = _run(tmp_path)
  loop.plot_curve(run, ["norm"], "nothing yet")
  assert list(tmp_path.iterdir()) == []
  loop.run_steps({"x": jnp.ones(4)}, update, 8, run)
  loop.plot_curve(run, ["norm"], "a test", ylabel="norm")
  first, *rows = map(json.loads, (tmp_path / "loss.jsonl").read_text().splitlines())
  assert first == {"settings": {"seed": 0}}
  assert [row["step"] for row in rows] == [2, 4, 6, 8]
  assert all(row["norm"] > 0 for row in rows)
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
  run = _run(tmp_path)
  loop.run_steps({"x": jnp.ones(4)}, lambda carry, step: (carry, {"norm": jnp.log(3.0 - step)}), 6, run)
  assert [row["norm"] is None for row in run.curve()] == [False, True, True]
  loop.plot_curve(run, ["norm"], "a test")
  assert (tmp_path / "loss.png").exists()


def test_a_run_is_not_resumed_as_another(tmp_path):
  loop.run_steps({"x": jnp.ones(4)}, update, 2, _run(tmp_path))
  with pytest.raises(ConfigError, match=f"--run_dir={tmp_path} was made with seed 0, not 7; give the same flags"):
    _run(tmp_path, seed=7).curve()


@pytest.mark.slow  # compiles a codec four times
def test_unit_latents_leave_reconstructions_as_they_are():
  config = dataclasses.replace(preset("tiny").codec, base_dim=4)
  graphdef, params = nnx.split(VideoCodec(config, rngs=nnx.Rngs(0)), nnx.Param)
  clips = vae_training.render_clips(jax.random.key(1), 2, 5, "test")
  before = vae_training.latent_statistics(params, graphdef, clips)
  assert all(np.abs(statistic - wanted).max() > 0.1 for statistic, wanted in zip(before, (0.0, 1.0), strict=True))
  scaled = vae_training.with_unit_latents(params, graphdef, *before)
  mean, std = vae_training.latent_statistics(scaled, graphdef, clips)
  np.testing.assert_allclose(mean, 0.0, atol=1e-5)
  np.testing.assert_allclose(std, 1.0, atol=1e-5)
  (_, frames), (_, same) = (vae_training.evaluate(weights, graphdef, clips) for weights in (params, scaled))
  assert np.ptp(frames) > 0.1
  np.testing.assert_allclose(same, frames, atol=1e-5)


def test_tokenizer(tmp_path, capsys):
  """The shipped model, byte for byte."""
  assert tokenizer.main([f"--output={tmp_path / 'deep/tokenizer.model'}"]) == 0
  assert (tmp_path / "deep/tokenizer.model").read_bytes() == (shipped.checkpoint() / "tokenizer.model").read_bytes()
  assert "65 pieces, longest caption 13" in capsys.readouterr().out
  assert len(tokenizer_training.captions()) == 1152 + 2 * 576 + 288


_DIT = ["--run_dir=run", "--codec_dir=."]
_ROLLED = ["--rollouts=9", "--rollout_probability=0.5"]
_CODEC = shipped.checkpoint() / "codec"


@pytest.mark.parametrize(
  ("program", "arguments", "fragments"),
  [
    (vae, ["--preset=golden", "--run_dir=run"], ["--preset=golden", "backbone alone"]),
    (vae, ["--run_dir=run", "--clip_frames=18"], ["--clip_frames", "multiple of 4 more", "18"]),
    (vae, ["--run_dir=run", "--init_from=missing"], ["--init_from=missing is not a folder"]),
    (vae, ["--run_dir=run", "--init_from=."], ["no part.json"]),
    (dit, ["--run_dir=run"], ["--codec_dir", "must have a value"]),
    (dit, ["--preset=bench_mid", *_DIT], ["--preset=bench_mid"]),
    (dit, ["--run_dir=file/run", f"--codec_dir={_CODEC}"], ["--run_dir=file/run", "Not a directory"]),
    (dit, _DIT, ["no part.json"]),
    (dit, ["--run_dir=run", "--codec_dir=missing"], ["--codec_dir=missing is not a folder"]),
    (dit, [*_DIT, "--init_from=file"], ["--init_from=file is not a folder"]),
    (dit, [*_DIT, "--step_weights=1"], ["--step_weights must be 4", "(1.0,)"]),
    (dit, [*_DIT, "--rollouts=9"], ["--rollouts=9 and --rollout_probability=0.0: give both"]),
    (dit, [*_DIT, "--crossing=0.5", "--two_objects=0"], ["--crossing=0.5 needs --two_objects above 0"]),
    (dit, [*_DIT, *_ROLLED, "--whole_clips=3"], ["--rollouts=9 must be at most --whole_clips=3"]),
    (dit, [*_DIT, *_ROLLED], ["--rollouts=9 needs a model", "--init_from"]),
    (dit, [*_DIT, *_ROLLED, "--init_from=.", "--init_parts=text"], ["--rollouts=9 needs a model", "--init_parts"]),
    (dit, [*_DIT, "--ema_decay=1.5"], ["--ema_decay=1.5", "[0.0, 1.0]"]),
    (reward, ["--reward=clip", "--run_dir=run"], ["--reward=clip", "hpsv3|videoalign"]),
    (reward, ["--reward=hpsv3", "--run_dir=run", "--init_from=missing"], ["missing", "folder of a reward model"]),
    (reward, ["--reward=hpsv3", "--run_dir=run", "--codec_dir=missing"], ["--codec_dir=missing is not a folder"]),
    (reward, ["--reward=hpsv3", "--run_dir=run", "--emphasis=turn:2"], ["--emphasis", "turn:2", "color, "]),
    (reward, ["--reward=hpsv3", "--run_dir=run", "--emphasis=blur"], ["--emphasis", "'blur'", "background:3"]),
    (reward, ["--reward=hpsv3", "--run_dir=run", "--windows=9"], ["--windows=9", "for videoalign"]),
    (reward, ["--reward=videoalign", "--run_dir=run", "--windows=9,5"], ["--windows", "'5'", "9..477"]),
    (tokenizer, ["--output=file/tokenizer.model"], ["--output=file/tokenizer.model", "cannot be written"]),
    (export_checkpoint, ["--codec_dir=a", "--dit_dir=b", "--output=c", "--tokenizer=d"], ["--tokenizer=d", "file"]),
    (export_checkpoint, ["--codec_dir=a", "--dit_dir=b", "--output=c", "--tokenizer=file"], ["a does not exist"]),
    (export_checkpoint, ["--codec_dir=a", "--dit_dir=b", "--output=c", "--dtype=int8"], ["--dtype=int8", "float16"]),
    (evaluate_reward, ["--reward_dir=missing"], ["missing", "folder of a reward model"]),
    (compare_short_frames, ["--frames=3,6"], ["--frames=3,6", "falling numbers in 1..12"]),
    (compare_short_frames, ["--frames=13,1"], ["--frames=13,1", "1..12"]),
    (compare_short_frames, ["--frames=6,few"], ["--frames=6,few"]),
    (compare_short_frames, ["--frames=6,3"], ["--frames=6,3", "the first is 12"]),
    (compare_short_frames, ["--frames=12,0"], ["--frames=12,0", "1..12"]),
    (compare_short_frames, ["--short_frames=3"], ["--short_frames", "--frames"]),
  ],
  ids=lambda value: value.__name__.partition(".")[2] if hasattr(value, "main") else None,
)
def test_bad_input(tmp_path, monkeypatch, capsys, program, arguments, fragments):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("in the way")
  assert program.main(arguments) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  for fragment in fragments:
    assert fragment in line
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_clips_without_second_chunks_are_refused(tmp_path, monkeypatch, capsys):
  """Whether there are any is drawn, so it is found when the clips are there."""
  no, fields = jnp.zeros(3, jnp.int32), dict.fromkeys(Dataset._fields)
  only_late = Dataset(**fields | {"late": jnp.ones(3, bool), "switch": no, "gap": no})
  monkeypatch.setattr(dit.dataset, "read_or_encode", lambda *_: only_late)
  monkeypatch.setattr(dit.dit, "init_modules", lambda *_: ({}, {}))
  assert dit.main([f"--run_dir={tmp_path / 'run'}", f"--codec_dir={_CODEC}", "--late=1"]) == 2
  assert "error: --late=1.0, --far=0.3: no clip has a second chunk to be learned" in capsys.readouterr().err
