"""Kills `experiments.generate` at random moments, starts it again, and compares with a run that was never disturbed.

  python -m experiments.measure.kill_test --kills=60 --work_dir=runs/kill_test
  python -m experiments.measure.kill_test --kills=60 --work_dir=runs/kill_test --model=checkpoints/tiny

The first command makes a small random model, with which a start takes seconds. Two prompts, a save after every chunk.
Every start of the program gets `kill -9` at a random moment of a phase that is drawn before; sooner or later one comes
to its end, and then everything begins again with an empty folder. It is checked

  after every kill   that a result's folder is there whole, the undisturbed one bit for bit, or not at all
  at every end       that video, contact sheet and trace are the undisturbed ones byte for byte, latents and frames by
                     their SHA-256; that both prompts are there once, and nothing else

and printed in which phase each kill fell: by what the program had written down when it died. A chunk's denoising and
its rewards are one compiled program, which writes down nothing: they are told apart by the share of its time that each
takes, measured beforehand. Most of a save is written while the next chunk is searched: such kills have both names. The
last line is JSON; the exit code is 3 if anything differs.
"""

from __future__ import annotations

import collections
import dataclasses
import filecmp
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import statistics
import time

import jax
from etils import epath

from experiments.measure import marked_generate
from streamt1_jax import drivers
from streamt1_jax.cli import common, results
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.config import ConfigError, SearchConfig, preset
from streamt1_jax.measuring import random_model
from streamt1_jax.measuring.random_model import ConstantReward
from streamt1_jax.pipeline import TOKENIZER_FILE, Pipeline

_KILLS = common.define_integer("kills", 60, "How often to kill.", 1)
_WORK_DIR = common.define_path(
  "work_dir", "runs/kill_test", "Where everything is written; removes an earlier test.", url=False
)
_MODEL = common.define_path("model", None, "Folder of the model; by default a small random one is made.", url=False)
_LENGTH = common.define_integer("length", 5, "Chunks of a video.", 2)
_KILL_SEED = common.define_integer("kill_seed", 0, "Of the moments.")

PROMPTS = ("a red circle moves left over a dark blue background", "a green square moves up over a white background")
PHASES = ("load", "compile", "denoise", "reward", "commit", "save", "assemble", "write")
_DRAWN = ("compile", "denoise", "reward", "save", "write", "any")
_FILES = (results.VIDEO, results.CONTACT_SHEET, results.TRACE)
_UNDISTURBED = "undisturbed"
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
  ["experiments.measure.marked_generate", "streamt1_jax.cli.results", "streamt1_jax.pipeline"]
)


def make_model(folder: epath.Path) -> None:
  """The tiny preset with less of everything, and random weights; most of a chunk is spent in denoising."""
  tiny, width = preset("tiny"), 16
  model = dataclasses.replace(
    tiny,
    backbone=dataclasses.replace(tiny.backbone, dim=128, ffn_dim=256, num_layers=8, freq_dim=32, text_dim=width),
    codec=dataclasses.replace(tiny.codec, base_dim=4),
    text=dataclasses.replace(tiny.text, dim=width, attn_dim=16, ffn_dim=32, num_heads=2, num_layers=1),
    latent_height=4,
    latent_width=4,
  )
  random_model.save(folder, model, common.find_folder("checkpoints/tiny") / TOKENIZER_FILE)


@dataclasses.dataclass(frozen=True)
class Shares:
  """Ends of the parts of a chunk, as fractions of its time; the rest is the winners' clean pass."""

  denoise: float
  reward: float


def measure_shares(folder: pathlib.Path) -> Shares:
  """Compares a chunk with one that is neither decoded nor judged."""
  pipeline, search = Pipeline.load(folder), SearchConfig.released()
  condition, model = pipeline.condition(PROMPTS[0], _LENGTH.value), pipeline.config
  bare = dataclasses.replace(
    pipeline.models,
    codec=LatentCodec(model.latent_shape[1:]),
    image_reward=ConstantReward(),
    video_reward=ConstantReward(),
  )
  whole, without = (_chunk_seconds(pipeline.params, condition, models, search) for models in (pipeline.models, bare))
  passes = len(model.schedule.denoising_steps) * search.num_candidates
  judge, denoise = max(0.0, 1 - without / whole), passes / (passes + search.top_k)
  return Shares(denoise=(1 - judge) * denoise, reward=(1 - judge) * denoise + judge)


def _chunk_seconds(params, condition, models, search) -> float:
  seconds = []
  state = drivers.jitted_init_state(params, 0, models, search)
  for index in range(_LENGTH.value + 3):
    began = time.perf_counter()
    state, _ = jax.block_until_ready(
      drivers.jitted_chunk_step(params, state, condition, models, search, first=index == 0)
    )
    seconds.append(time.perf_counter() - began)
  return min(seconds[2:])


def phase_at(marks: list[tuple[float, str]], moment: float, shares: Shares, chunk_seconds: float) -> tuple[str, bool]:
  """What the program was doing, and whether a save was under way beside it."""
  running: dict[str, float] = {}
  compiled = 0.0
  for seconds, event in marks:
    if seconds > moment:
      break
    if event[0] == "+":
      running[event[1:]] = seconds
    else:
      running.pop(event[1:], None)
      compiled = seconds if event == "-compile" else compiled
  for phase in ("copy", "write", "assemble", "compile"):
    if phase in running:
      return {"copy": "save"}.get(phase, phase), "save" in running
  began = max(running.get("search", 0.0), compiled if "first_chunk" in running else 0.0)
  if not began:
    return "load", "save" in running
  share = min(1.0, (moment - began) / chunk_seconds)
  phase = "denoise" if share < shares.denoise else "reward" if share < shares.reward else "commit"
  return phase, "save" in running


class Trial:
  """Starts the program in a folder until it ends."""

  def __init__(self, folder: pathlib.Path, model: pathlib.Path, cache: pathlib.Path):
    self.folder, self.model, self.cache = folder, model, cache
    self.marks = folder / "marks"
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))

  def start(self, cold: bool = False):
    self.marks.unlink(missing_ok=True)
    cache = self.folder / "cold"
    if cold:
      shutil.rmtree(cache, ignore_errors=True)
    arguments = [
      f"--checkpoint={self.model}", "--prompts_file=prompts.txt", f"--num_latent_frames={3 * _LENGTH.value}",
      "--save_every=1", "--mesh=data:1",
    ]  # fmt: skip
    options = (str(self.folder), arguments, str(self.marks), str(cache if cold else self.cache), _MODEL.value is None)
    process = _PROCESSES.Process(target=marked_generate.run, args=options)
    process.start()
    return process

  def results(self) -> dict[str, pathlib.Path]:
    folders = {prompt: self.folder / results.result_folder("outputs", prompt) for prompt in PROMPTS}
    return {prompt: pathlib.Path(folder) for prompt, folder in folders.items() if folder.exists()}

  def visible(self) -> set[str]:
    outputs = self.folder / "outputs"
    return {path.name for path in outputs.iterdir() if path.name[0] != "."} if outputs.exists() else set()

  def problems(self, reference: Trial, ended: bool) -> list[str]:
    """What differs from the undisturbed run."""
    found = self.results()
    problems = [f"{name} is no result" for name in self.visible() - {path.name for path in found.values()}]
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
      problems += [f"{path.name} is left" for path in (self.folder / "outputs").iterdir() if path.name[0] == "."]
      lines = (self.folder / ".stdout").read_text().splitlines()
      videos = [line for line in lines if line.endswith("video.mp4")]
      if len(videos) != len(PROMPTS) or len(set(videos)) != len(PROMPTS):
        problems.append(f"the program names {videos}")
    return problems


def durations(marks: list[tuple[float, str]]) -> dict[str, float]:
  """Longest of each phase."""
  running, longest = {}, collections.defaultdict(float)
  for seconds, event in marks:
    if event[0] == "+":
      running[event[1:]] = seconds
    elif event[1:] in running:
      longest[event[1:]] = max(longest[event[1:]], seconds - running.pop(event[1:]))
  return longest


def chunk_median(marks: list[tuple[float, str]]) -> float:
  starts, lengths = 0.0, []
  for seconds, event in marks:
    if event == "+search":
      starts = seconds
    elif event == "-search":
      lengths.append(seconds - starts)
  return statistics.median(lengths)


def draw_moment(drawn: str, lengths: dict[str, float], shares: Shares, chunk: float) -> tuple[str, int, float]:
  """An event, how often it has to come, and the seconds after it at which to kill."""
  often = random.randint(1, 3)
  if drawn == "compile":
    return "+first_chunk", 1, random.uniform(0.0, lengths["compile"])
  if drawn == "denoise":
    return "+search", often, random.uniform(0.0, shares.denoise) * chunk
  if drawn == "reward":
    return "+search", often, random.uniform(shares.denoise, shares.reward) * chunk
  if drawn == "save":
    return "+save", often, random.uniform(0.0, 1.2) * lengths["save"]
  if drawn == "write":
    return "+assemble", random.randint(1, len(PROMPTS)), random.uniform(0.0, lengths["assemble"] + lengths["write"])
  return "+start", 1, random.uniform(0.0, lengths["run"])


def kill_at(trial: Trial, process, event: str, often: int, delay: float) -> float | None:
  """Kills the process; returns the moment, or None if it ended before."""
  while process.is_alive():
    times = [seconds for seconds, name in marked_generate.read_marks(trial.marks) if name == event]
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


def main() -> None:
  random.seed(_KILL_SEED.value)
  work = pathlib.Path(_WORK_DIR.value).resolve()
  if work.exists() and not (work / _UNDISTURBED).is_dir():
    raise ConfigError(f"--work_dir={work} is there and holds no earlier test; give another folder")
  shutil.rmtree(work, ignore_errors=True)
  if _MODEL.value is None:
    make_model(epath.Path(work / "model"))
  model = work / "model" if _MODEL.value is None else pathlib.Path(common.find_folder(_MODEL.value)).resolve()
  jax.config.update("jax_disable_most_optimizations", _MODEL.value is None)
  shares = measure_shares(model)
  print(f"a chunk denoises until {shares.denoise:.2f} of its time, and is judged until {shares.reward:.2f}", flush=True)
  reference = Trial(work / _UNDISTURBED, model, work / "cache")
  began, lengths = time.monotonic(), {}
  for name in ("cold", "warm"):
    shutil.rmtree(reference.folder / "outputs", ignore_errors=True)
    process = reference.start()
    process.join()
    if process.exitcode:
      raise common.RunFailed(f"the undisturbed run failed: {(reference.folder / '.stderr').read_text()[-300:]}")
    marks = marked_generate.read_marks(reference.marks)
    lengths[name] = durations(marks) | {"run": marks[-1][0] - marks[0][0]}
  lengths, chunk = lengths["warm"] | {"compile": lengths["cold"]["compile"]}, chunk_median(marks)
  print(f"undisturbed: {lengths['run']:.1f} s when compiled before, a chunk {chunk:.3f} s", flush=True)
  counts, beside, problems, ends, starts = collections.Counter(), collections.Counter(), [], 0, 0
  trial = Trial(work / "0", model, reference.cache)
  while sum(counts.values()) < _KILLS.value or trial.marks.exists():
    enough = sum(counts.values()) >= _KILLS.value
    drawn = _DRAWN[starts % len(_DRAWN)]
    starts += 1
    process = trial.start(cold=drawn == "compile" and not enough)
    moment = None if enough else kill_at(trial, process, *draw_moment(drawn, lengths, shares, chunk))
    process.join()
    ended = moment is None
    found = trial.problems(reference, ended)
    if ended and process.exitcode:
      found.append(f"exit code {process.exitcode}: {(trial.folder / '.stderr').read_text()[-300:]}")
    if ended:
      ends += 1
      print(f"end {ends}, the videos are {'the undisturbed ones' if not found else 'NOT the same'}", flush=True)
      trial.marks.unlink(missing_ok=True)
    else:
      fell, saving = phase_at(marked_generate.read_marks(trial.marks), moment, shares, chunk)
      counts[fell] += 1
      beside[fell] += saving
      where = f"{fell}{' while saving' if saving else ''}; {len(trial.results())} results are there"
      print(f"kill {sum(counts.values())}: drawn {drawn}, fell into {where}", flush=True)
    problems += found
    for problem in found:
      print(f"  PROBLEM: {problem}", flush=True)
    if ended and sum(counts.values()) < _KILLS.value:
      shutil.rmtree(trial.folder)
      trial = Trial(work / str(ends), model, reference.cache)
  report = {
    "kills": {phase: counts[phase] for phase in PHASES},
    "of_these_while_saving": {phase: beside[phase] for phase in PHASES},
    "ends": ends,
    "starts": starts,
    "problems": problems,
    "seconds": round(time.monotonic() - began),
  }
  print(json.dumps(report), flush=True)
  if problems:
    raise common.RunFailed(f"{len(problems)} problems")


if __name__ == "__main__":
  common.run(main)
