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

import collections
import filecmp
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import jax
from absl import flags
from etils import epath

from streamt1_jax import shipped
from streamt1_jax.cli import command, flag_types, results
from streamt1_jax.config import ConfigError
from streamt1_jax.io.checkpoint import TOKENIZER_FILE
from streamt1_jax.measuring import kill_moments, marks
from streamt1_jax.measuring.kill_moments import DRAWN, PHASES

PROMPTS = ("a red circle moves left over a dark blue background", "a green square moves up over a white background")
_FILES = (results.VIDEO, results.CONTACT_SHEET, results.TRACE)
_UNDISTURBED = "undisturbed"
_PROCESSES = multiprocessing.get_context("forkserver")


def define_flags(values: flags.FlagValues) -> None:
  """How often is killed, and what."""
  flag_types.define_integer(values, "kills", 60, "How often to kill.", 1)
  work = "Where everything is written; removes an earlier test."
  flag_types.define_path(values, "work_dir", "runs/kill_test", work, url=False)
  model = "Folder of the model; by default a small random one is made."
  flag_types.define_path(values, "model", None, model, url=False)
  flag_types.define_integer(values, "length", 5, "Chunks of a video.", 2)
  flag_types.define_integer(values, "kill_seed", 0, "Seed of the moments.")


def generate_with_marks(folder: pathlib.Path, arguments: Sequence[str], cache: pathlib.Path, quick: bool) -> None:
  """The target of a process: makes videos in `folder`, with its output in `.stdout` and `.stderr` and marks in `marks`.

  Args:
    folder: where it runs.
    arguments: flags of `generate`.
    cache: folder of compiled programs.
    quick: whether XLA optimises little.
  """
  os.chdir(folder)
  for stream, name in ((1, ".stdout"), (2, ".stderr")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
  jax.config.update("jax_disable_most_optimizations", quick)
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  marks.install(folder / "marks")
  from streamt1_jax.cli import generate

  sys.exit(generate.main(arguments))


class Trial:
  """Starts the program in a folder until it ends."""

  def __init__(self, folder: pathlib.Path, model: pathlib.Path, cache: pathlib.Path, length: int, quick: bool):
    self.folder, self.marks = folder, folder / "marks"
    self._model, self._cache, self._length, self._quick = model, cache, length, quick
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))

  def again(self, name: str) -> Trial:
    """The same in another folder beside this one."""
    return Trial(self.folder.parent / name, self._model, self._cache, self._length, self._quick)

  def start(self, cold: bool = False) -> BaseProcess:
    """Starts the program; `cold` without anything compiled before."""
    self.marks.unlink(missing_ok=True)
    cache = self.folder / "cold"
    if cold:
      shutil.rmtree(cache, ignore_errors=True)
    arguments = [
      f"--checkpoint={self._model}", "--prompts_file=prompts.txt", f"--num_latent_frames={3 * self._length}",
      "--save_every=1", "--mesh=data:1",
    ]  # fmt: skip
    options = (self.folder, arguments, cache if cold else self._cache, self._quick)
    process = _PROCESSES.Process(target=generate_with_marks, args=options)
    process.start()
    return process

  def error(self) -> str:
    """The end of what the program said on stderr."""
    return (self.folder / ".stderr").read_text()[-300:]

  def results(self) -> dict[str, pathlib.Path]:
    """Folders of the results that are there, by prompt."""
    folders = {prompt: self.folder / results.result_folder("outputs", prompt) for prompt in PROMPTS}
    return {prompt: pathlib.Path(folder) for prompt, folder in folders.items() if folder.exists()}

  def problems(self, reference: Trial, ended: bool) -> list[str]:
    """What differs from the undisturbed run."""
    found, outputs = self.results(), self.folder / "outputs"
    names = {path.name for path in outputs.iterdir()} if outputs.exists() else set()
    visible = {name for name in names if name[0] != "."}
    problems = [f"{name} is no result" for name in visible - {path.name for path in found.values()}]
    for prompt, folder in found.items():
      expected = reference.results()[prompt]
      for name in _FILES:
        if not (folder / name).is_file() or not filecmp.cmp(folder / name, expected / name, shallow=False):
          problems.append(f"{folder.name}/{name} differs")
      sums = [json.loads((path / "manifest.json").read_text())["sha256"] for path in (folder, expected)]
      if sums[0] != sums[1]:
        problems.append(f"{folder.name}: latents or frames differ")
    if ended:
      problems += [f"{prompt!r} is missing" for prompt in PROMPTS if prompt not in found]
      problems += [f"{name} is left" for name in names - visible]
      lines = (self.folder / ".stdout").read_text().splitlines()
      videos = [line for line in lines if line.endswith("video.mp4")]
      if len(videos) != len(PROMPTS) or len(set(videos)) != len(PROMPTS):
        problems.append(f"the program names {videos}")
    return problems


def kill_at(trial: Trial, process, event: str, often: int, delay: float) -> float | None:
  """Kills the process; returns the moment, or None if it ended before."""
  while process.is_alive():
    times = [seconds for seconds, name in marks.read(trial.marks) if name == event]
    if len(times) >= often:
      time.sleep(max(0.0, times[often - 1] + delay - time.monotonic()))
      if process.is_alive():
        moment = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return moment if process.exitcode == -signal.SIGKILL else None
    time.sleep(0.002)
  process.join()
  return None


def run_undisturbed(reference: Trial) -> tuple[dict[str, float], float]:
  """Runs the program twice; seconds of its phases, where compiling is that of the first run, and of a chunk."""
  lengths = {}
  for name in ("cold", "warm"):
    shutil.rmtree(reference.folder / "outputs", ignore_errors=True)
    process = reference.start()
    process.join()
    if process.exitcode:
      raise command.RunFailed(f"the undisturbed run failed: {reference.error()}")
    made = marks.read(reference.marks)
    lengths[name] = marks.longest(made) | {"run": made[-1][0] - made[0][0]}
  return lengths["warm"] | {"compile": lengths["cold"]["compile"]}, marks.median_chunk(made)


def kill_often(kills: int, reference: Trial, shares: kill_moments.Shares) -> dict[str, Any]:
  """Kills `kills` times, compares, and lets the last trial end; returns what happened, as JSON values."""
  lengths, chunk = run_undisturbed(reference)
  print(f"undisturbed: {lengths['run']:.1f} s when compiled before, a chunk {chunk:.3f} s", flush=True)
  counts, beside, problems, ends, starts = collections.Counter(), collections.Counter(), [], 0, 0
  trial = reference.again("0")
  while sum(counts.values()) < kills or trial.marks.exists():
    command.raise_if_interrupted()
    enough = sum(counts.values()) >= kills
    drawn = DRAWN[starts % len(DRAWN)]
    starts += 1
    process = trial.start(cold=drawn == "compile" and not enough)
    at = kill_moments.draw_moment(drawn, kill_moments.Program(lengths, shares, chunk, len(PROMPTS)))
    moment = None if enough else kill_at(trial, process, *at)
    process.join()
    ended = moment is None
    found = trial.problems(reference, ended)
    if ended and process.exitcode:
      found.append(f"exit code {process.exitcode}: {trial.error()}")
    if ended:
      ends += 1
      print(f"end {ends}, the videos are {'the undisturbed ones' if not found else 'NOT the same'}", flush=True)
      trial.marks.unlink(missing_ok=True)
    else:
      fell, saving = kill_moments.phase_at(marks.read(trial.marks), moment, shares, chunk)
      counts[fell] += 1
      beside[fell] += saving
      where = f"{fell}{' while saving' if saving else ''}; {len(trial.results())} results are there"
      print(f"kill {sum(counts.values())}: drawn {drawn}, fell into {where}", flush=True)
    problems += found
    for problem in found:
      print(f"  PROBLEM: {problem}", flush=True)
    if ended and sum(counts.values()) < kills:
      shutil.rmtree(trial.folder)
      trial = reference.again(str(ends))
  return {
    "kills": {phase: counts[phase] for phase in PHASES},
    "of_these_while_saving": {phase: beside[phase] for phase in PHASES},
    "ends": ends,
    "starts": starts,
    "problems": problems,
  }


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
  began = time.monotonic()
  jax.config.update("jax_disable_most_optimizations", quick)
  shares = kill_moments.measure_shares(model, PROMPTS[0], values.length)
  print(f"a chunk denoises until {shares.denoise:.2f} of its time, and is judged until {shares.reward:.2f}", flush=True)
  _PROCESSES.set_forkserver_preload(["streamt1_jax.cli.generate", "streamt1_jax.measuring.marks"])
  reference = Trial(work / _UNDISTURBED, model, work / "cache", values.length, quick)
  report = kill_often(values.kills, reference, shares)
  print(json.dumps(report | {"seconds": round(time.monotonic() - began)}), flush=True)
  if report["problems"]:
    raise command.RunFailed(f"{len(report['problems'])} problems")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
