"""A program is killed at random moments, started again, and compared with a run that was never disturbed.

One trial is a folder in which the program is started until it comes to its end. Moments and phases are those of
`kill_moments`; the program tells what it does by `marks`. What runs is `streamt1 generate`, whose functions the caller
gives.
"""

from __future__ import annotations

import collections
import dataclasses
import filecmp
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import jax
from etils import epath

from streamt1_jax.io.result_files import CONTACT_SHEET, MANIFEST, TRACE, VIDEO
from streamt1_jax.io.signals import raise_if_interrupted
from streamt1_jax.measuring import kill_moments, marks
from streamt1_jax.measuring.kill_moments import DRAWN, PHASES

PROMPTS = ("a red circle moves left over a dark blue background", "a green square moves up over a white background")
"""What every trial makes a video of."""
_FILES = (VIDEO, CONTACT_SHEET, TRACE)
_LOOK_EVERY = 0.002
_PROCESSES = multiprocessing.get_context("forkserver")


class UndisturbedFailed(Exception):
  """The program failed although nobody killed it."""


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is the same in all trials.

  Attributes:
    main: the program, from its flags to its exit code. Other processes import it by its name.
    result_folder: from the folder of all results and a prompt to the folder of its result.
    model: folder of the model.
    cache: folder of compiled programs.
    length: chunks of a video.
    quick: whether XLA optimises little.
  """

  main: Callable[[Sequence[str]], int]
  result_folder: Callable[[epath.PathLike, str], epath.Path]
  model: pathlib.Path
  cache: pathlib.Path
  length: int
  quick: bool


def preload(setting: Setting) -> None:
  """Makes processes that are started from now on begin with what the program imports."""
  _PROCESSES.set_forkserver_preload([setting.main.__module__, marks.__name__])


def run_with_marks(folder: pathlib.Path, arguments: Sequence[str], cache: pathlib.Path, setting: Setting) -> None:
  """The target of a process: makes videos in `folder`, with its output in `.stdout` and `.stderr` and marks in `marks`.

  Args:
    folder: where it runs.
    arguments: flags of the program.
    cache: folder of compiled programs.
    setting: what runs.
  """
  os.chdir(folder)
  for stream, name in ((1, ".stdout"), (2, ".stderr")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
  jax.config.update("jax_disable_most_optimizations", setting.quick)
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  marks.install(folder / "marks")
  sys.exit(setting.main(arguments))


class Trial:
  """Starts the program in a folder until it ends.

  Attributes:
    folder: where it runs.
    marks: file of what it did in its last start.
  """

  def __init__(self, folder: pathlib.Path, setting: Setting):
    """Makes `folder`, which must not be there."""
    self.folder, self.marks, self._setting = folder, folder / "marks", setting
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))

  def again(self, name: str) -> Trial:
    """The same in another folder beside this one."""
    return Trial(self.folder.parent / name, self._setting)

  def start(self, cold: bool = False) -> BaseProcess:
    """Starts the program; `cold` without anything compiled before."""
    self.marks.unlink(missing_ok=True)
    cache = self.folder / "cold"
    if cold:
      shutil.rmtree(cache, ignore_errors=True)
    setting = self._setting
    arguments = [
      f"--checkpoint={setting.model}", "--prompts_file=prompts.txt", f"--num_latent_frames={3 * setting.length}",
      "--save_every=1", "--mesh=data:1",
    ]  # fmt: skip
    options = (self.folder, arguments, cache if cold else setting.cache, setting)
    process = _PROCESSES.Process(target=run_with_marks, args=options)
    process.start()
    return process

  def error(self) -> str:
    """The end of what the program said on stderr."""
    return (self.folder / ".stderr").read_text()[-300:]

  def results(self) -> dict[str, pathlib.Path]:
    """Folders of the results that are there, by prompt."""
    folders = {prompt: self.folder / self._setting.result_folder("outputs", prompt) for prompt in PROMPTS}
    return {prompt: pathlib.Path(folder) for prompt, folder in folders.items() if folder.exists()}

  def problems(self, reference: Trial, ended: bool) -> list[str]:
    """What differs from the undisturbed run `reference`; `ended` tells that the program came to its end."""
    found, outputs = self.results(), self.folder / "outputs"
    names = {path.name for path in outputs.iterdir()} if outputs.exists() else set()
    visible = {name for name in names if name[0] != "."}
    problems = [f"{name} is no result" for name in visible - {path.name for path in found.values()}]
    for prompt, folder in found.items():
      expected = reference.results()[prompt]
      for name in _FILES:
        if not (folder / name).is_file() or not filecmp.cmp(folder / name, expected / name, shallow=False):
          problems.append(f"{folder.name}/{name} differs")
      sums = [json.loads((path / MANIFEST).read_text())["sha256"] for path in (folder, expected)]
      if sums[0] != sums[1]:
        problems.append(f"{folder.name}: latents or frames differ")
    if ended:
      problems += [f"{prompt!r} is missing" for prompt in PROMPTS if prompt not in found]
      problems += [f"{name} is left" for name in names - visible]
      lines = (self.folder / ".stdout").read_text().splitlines()
      videos = [line for line in lines if line.endswith(VIDEO)]
      if len(videos) != len(PROMPTS) or len(set(videos)) != len(PROMPTS):
        problems.append(f"the program names {videos}")
    return problems


def kill_at(trial: Trial, process: BaseProcess, at: kill_moments.Moment) -> float | None:
  """Kills the process at the moment `at`; returns what the clock said then, in seconds, or None if it ended before."""
  event, often, delay = at
  while process.is_alive():
    times = [seconds for seconds, name in marks.read(trial.marks) if name == event]
    if len(times) >= often:
      time.sleep(max(0.0, times[often - 1] + delay - time.monotonic()))
      if process.is_alive():
        moment = time.monotonic()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return moment if process.exitcode == -signal.SIGKILL else None
    time.sleep(_LOOK_EVERY)
  process.join()
  return None


def run_undisturbed(reference: Trial) -> tuple[dict[str, float], float]:
  """Runs the program twice; seconds of its phases, where compiling is that of the first run, and of a chunk.

  Raises UndisturbedFailed, with the end of what it said, if the program fails.
  """
  lengths = {}
  for name in ("cold", "warm"):
    shutil.rmtree(reference.folder / "outputs", ignore_errors=True)
    process = reference.start()
    process.join()
    if process.exitcode:
      raise UndisturbedFailed(f"the undisturbed run failed: {reference.error()}")
    made = marks.read(reference.marks)
    lengths[name] = marks.longest(made) | {"run": made[-1][0] - made[0][0]}
  return lengths["warm"] | {"compile": lengths["cold"]["compile"]}, marks.median_chunk(made)


def kill_often(kills: int, reference: Trial, shares: kill_moments.Shares, say: Callable[[str], None]) -> dict[str, Any]:
  """Kills `kills` times, compares, and lets the last trial end; returns what happened, as JSON values.

  Args:
    kills: how often.
    reference: where the undisturbed run will be; the trials lie beside it.
    shares: parts of a chunk.
    say: is told, a line each, of every kill, end and problem.

  Raises:
    UndisturbedFailed: the program fails although nobody kills it.
  """
  lengths, chunk = run_undisturbed(reference)
  say(f"undisturbed: {lengths['run']:.1f} s when compiled before, a chunk {chunk:.3f} s")
  program = kill_moments.Program(lengths, shares, chunk, len(PROMPTS))
  counts, beside, problems, ends, starts = collections.Counter(), collections.Counter(), [], 0, 0
  trial = reference.again("0")
  while sum(counts.values()) < kills or trial.marks.exists():
    raise_if_interrupted()
    enough = sum(counts.values()) >= kills
    drawn = DRAWN[starts % len(DRAWN)]
    starts += 1
    process = trial.start(cold=drawn == "compile" and not enough)
    at = kill_moments.draw_moment(drawn, program)
    moment = None if enough else kill_at(trial, process, at)
    process.join()
    ended = moment is None
    found = trial.problems(reference, ended)
    if ended and process.exitcode:
      found.append(f"exit code {process.exitcode}: {trial.error()}")
    if ended:
      ends += 1
      say(f"end {ends}, the videos are {'the undisturbed ones' if not found else 'NOT the same'}")
      trial.marks.unlink(missing_ok=True)
    else:
      fell, saving = kill_moments.phase_at(marks.read(trial.marks), moment, shares, chunk)
      counts[fell] += 1
      beside[fell] += saving
      where = f"{fell}{' while saving' if saving else ''}; {len(trial.results())} results are there"
      say(f"kill {sum(counts.values())}: drawn {drawn}, fell into {where}")
    problems += found
    for problem in found:
      say(f"  PROBLEM: {problem}")
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
