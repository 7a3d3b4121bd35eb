"""Kills `experiments.generate` at random moments, starts it again, and compares with a run that was never disturbed.

  python -m experiments.measure.kill_test --kills=60 --work_dir=runs/kill_test
  python -m experiments.measure.kill_test --kills=60 --work_dir=runs/kill_test --model=checkpoints/tiny

The first command makes a small random model, with which a start takes seconds. Two prompts are searched, with a save
after every chunk. Every start of the program gets `kill -9` at a random moment of a phase that is drawn before; sooner
or later one comes to its end, and then everything begins again with an empty folder. It is checked

  after every kill   that a result's folder is there whole, the undisturbed one bit by bit, or not at all
  at every end       that video, contact sheet and trace are the undisturbed ones byte by byte, latents and frames by
                     their SHA-256; that both prompts are there once, and nothing else

and printed in which phase each kill fell: by what the program had written down when it died. A chunk's denoising and
its rewards are one compiled program, which writes down nothing: they are told apart by the share of its time that each
takes, measured beforehand. Most of a save is written while the next chunk is searched: such kills have both names. The
last line is JSON; the exit code is 3 if anything differs.
"""

from __future__ import annotations

import functools
import json
import pathlib
import random
import shutil
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath

from streamt1_jax import shipped
from streamt1_jax.cli import command, flag_types, generate, results
from streamt1_jax.config import ConfigError
from streamt1_jax.io.checkpoint import TOKENIZER_FILE
from streamt1_jax.measuring import kill_moments, kill_trials

_UNDISTURBED = "undisturbed"


def define_flags(values: flags.FlagValues) -> None:
  """How often is killed, and what."""
  flag_types.define_integer(values, "kills", 60, "How often to kill.", 1)
  work = "Where everything is written; removes an earlier test."
  flag_types.define_path(values, "work_dir", "runs/kill_test", work, url=False)
  model = "Folder of the model; by default a small random one is made."
  flag_types.define_path(values, "model", None, model, url=False)
  flag_types.define_integer(values, "length", 5, "Chunks of a video.", 2)
  flag_types.define_integer(values, "kill_seed", 0, "Seed of the moments.")


def run(values: flags.FlagValues) -> None:
  """Prepares, kills, and prints the report."""
  random.seed(values.kill_seed)
  work = pathlib.Path(values.work_dir).resolve()
  if work.exists() and not (work / _UNDISTURBED).is_dir():
    raise ConfigError(f"--work_dir={work} is there and holds no earlier test; give another folder")
  quick = values.model is None
  model = work / "model" if quick else pathlib.Path(values.model).resolve()
  if not quick and not model.is_dir():
    raise ConfigError(f"--model={model} does not exist")
  shutil.rmtree(work, ignore_errors=True)
  if quick:
    kill_moments.save_model(epath.Path(model), shipped.checkpoint() / TOKENIZER_FILE)
  began, say = time.monotonic(), functools.partial(print, flush=True)
  jax.config.update("jax_disable_most_optimizations", quick)
  shares = kill_moments.measure_shares(model, kill_trials.PROMPTS[0], values.length)
  say(f"a chunk denoises until {shares.denoise:.2f} of its time, and is judged until {shares.reward:.2f}")
  setting = kill_trials.Setting(generate.main, results.result_folder, model, work / "cache", values.length, quick)
  kill_trials.preload(setting)
  try:
    report = kill_trials.kill_often(values.kills, kill_trials.Trial(work / _UNDISTURBED, setting), shares, say)
  except kill_trials.UndisturbedFailed as error:
    raise command.RunFailed(str(error)) from error
  say(json.dumps(report | {"seconds": round(time.monotonic() - began)}))
  if report["problems"]:
    raise command.RunFailed(f"{len(report['problems'])} problems")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
