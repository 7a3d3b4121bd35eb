"""Scores videos: any files, by any rewards.

  python -m experiments.score --videos=outputs/
  python -m experiments.score --videos='clips/*.mp4' --prompts_file=prompts.txt --reward=hpsv3+videoalign \\
    --checkpoint=checkpoints/wan_1_3b --output=scores.csv

Rewards are read from `CHECKPOINT/rewards/NAME`; `quality` and `coherence` are built in and need neither weights nor
prompts. Prints a table and writes a CSV and a JSON file side by side. Columns of VideoAlign: its `_VQ`, `_MQ` and
`_TA`, each less its mean and over its standard deviation, and their sum, `_Overall`; of HPSv3: the mean over frames,
and `_frames`, every frame's.

A prompts file has one prompt per line, for the videos in sorted order; or lines `name<TAB>prompt`; or lines of JSON
with `video` and `prompt`. Without one, the prompts are those of the manifests that `experiments.generate` leaves.

The frame rate is the file's own, and decides what VideoAlign looks at: a file that does not say it is not scored.
XLA compiles once per frame size (see `streamt1_jax.rewards.scoring`), so files of one size are quickest.

Every row is safe as soon as it is made: an interrupted run goes on where it stopped, and a later run with more videos
scores those alone. Files that cannot be scored have the reason in their row. Exit codes: 0; 2 for bad input; 3 when
some videos have no score; 130 when interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import common, score_inputs
from streamt1_jax.cli.score_inputs import Task
from streamt1_jax.cli.score_rows import Output, Row, to_table
from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest, part_files, video
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards import scoring
from streamt1_jax.rewards.scorers import ScoringOptions, VideoScorer
from streamt1_jax.rewards.table import DEFAULT_REWARDS, REWARDS

_VIDEOS = common.define_path("videos", None, "Video file, folder of videos, or glob.", required=True)
_PROMPTS_FILE = common.define_path("prompts_file", None, "Prompts of the videos; the manifests beside them otherwise.")
_REWARD = flags.DEFINE_string(
  "reward", None, "Names of rewards joined by '+'; all that the checkpoint has, or quality+coherence, by default."
)
_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder whose rewards/ holds the rewards.")
_OUTPUT = common.define_path("output", "scores.csv", "CSV or JSON file; the other one is written beside it.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "int8"], "Of the rewards' backbones.")
_IMAGE_FRAMES = common.define_integer("image_frames", None, "Frames that image rewards see; all by default.", 1, 10**6)
_BATCH = common.define_integer("batch", 8, "Frames that an image reward scores at a time.", 1, 4096)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace earlier scores, whatever they are of.")

_MOST_BYTES = 8 << 30
_BUILT_IN = [name for name, spec in REWARDS.items() if not spec.is_stored]


def find_rewards() -> dict[str, epath.Path]:
  """Folders of the rewards of the flags, by name; those of built-in ones do not exist."""
  rewards = common.find_folder(_CHECKPOINT.value) / reward_folder.REWARDS_FOLDER
  present = sorted(path.name for path in rewards.iterdir() if path.is_dir()) if rewards.is_dir() else []
  names = _REWARD.value.split("+") if _REWARD.value is not None else present or list(DEFAULT_REWARDS)
  for name in names:
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9]", name) or names.count(name) > 1:
      raise ConfigError(f"--reward={_REWARD.value} must be different names joined by '+', such as quality+coherence")
    if name not in (*_BUILT_IN, *present):
      found = ", ".join((*_BUILT_IN, *present))
      raise ConfigError(f"--reward={_REWARD.value}: {rewards} has no {name}; there are: {found}")
  return {name: rewards / name for name in names}


def needs_prompt(folder: epath.Path) -> bool:
  """Whether the reward in `folder` reads a prompt. Raises ConfigError if there is no reward."""
  spec, _ = reward_folder.load_config(folder)
  return spec.reads_prompt


def reward_sha256(folder: epath.Path) -> str:
  """Identifies a reward wherever its folder is. Raises ConfigError if it is none."""
  reward_folder.load_config(folder)
  # It has the checksums of all other files.
  return hashlib.sha256((folder / part_files.PART_FILE).read_bytes()).hexdigest()


def run_settings(rewards: dict[str, epath.Path]) -> dict[str, Any]:
  """Everything but the videos and prompts that decides the scores."""
  weights = {f"{name}_sha256": reward_sha256(path) for name, path in rewards.items() if name not in _BUILT_IN}
  return {"reward": "+".join(rewards), "dtype": _DTYPE.value, "image_frames": _IMAGE_FRAMES.value, **weights}


def read_tasks(rewards: dict[str, epath.Path]) -> list[Task]:
  """The videos of the flags with their prompts; raises ConfigError if a reward needs one that is nowhere."""
  videos = score_inputs.find_videos(_VIDEOS.value)
  if _PROMPTS_FILE.value is not None:
    return score_inputs.with_given_prompts(videos, _PROMPTS_FILE.value)
  tasks = score_inputs.with_own_prompts(videos)
  needy = [name for name, path in rewards.items() if name not in _BUILT_IN and needs_prompt(path)]
  if not needy:
    return [Task(task.video, task.prompt) for task in tasks]
  without = [task for task in tasks if task.prompt is None and task.fault is None]
  if without:
    raise ConfigError(
      f"{needy[0]} needs a prompt for each video, and {len(without)} of {len(tasks)} have none "
      f"({without[0].video}); give --prompts_file"
    )
  return tasks


def as_text(name: str) -> str:
  """The name of a file may be no text at all; JSON and CSV are."""
  return name.encode(errors="backslashreplace").decode()


def start_row(task: Task) -> Row:
  """The row of a video before anything of it is read."""
  name = as_text(os.fspath(task.video))
  try:
    stat = task.video.stat()
    return Row(name, task.prompt, stat.length, int(stat.mtime))
  except OSError:
    return Row(name, task.prompt, 0, 0)  # a broken link; reading it will tell


@contextlib.contextmanager
def noting_in(errors: list[str], task: Task) -> Iterator[None]:
  """Adds what goes wrong in the body to `errors`; a fault of the program itself is raised on."""
  try:
    yield
  except (ConfigError, OSError) as error:
    errors.append(" ".join(str(error).removeprefix(f"{task.video} ").split()))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    errors.append(f"the device has not enough memory: {str(error).splitlines()[0]}")


def score_video(task: Task, row: Row, scorers: Sequence[VideoScorer]) -> Row:
  """`row` with the scores of its video. What fails costs its own scores alone, and is told in `error`."""
  errors = [] if task.fault is None else [task.fault]
  scores = {}
  with noting_in(errors, task):
    info = video.probe_video(task.video)
    row = dataclasses.replace(row, **info._asdict())
    indices = {}
    for scorer in scorers:
      if task.prompt is not None or not scorer.reads_prompt:
        with noting_in(errors, task):
          indices[scorer] = scorer.look_at(info.num_frames, info.fps)
    if indices:
      needed = np.unique(np.concatenate(list(indices.values())))
      frames = read_needed(task, info, needed)
      row = dataclasses.replace(row, height=frames.shape[1], width=frames.shape[2])
    for scorer, own in indices.items():
      with noting_in(errors, task):
        scores |= scorer(task.prompt, frames if len(own) == len(needed) else frames[np.searchsorted(needed, own)])
  return dataclasses.replace(row, scores=scores, error=as_text("; ".join(dict.fromkeys(errors))) or None)


def read_needed(task: Task, info: video.VideoInfo, indices: np.ndarray) -> np.ndarray:
  """Frames [N, H, W, 3] uint8. Raises ConfigError if they cannot be read, or are more than a machine should hold."""
  size = len(indices) * info.height * info.width * 3
  if size > _MOST_BYTES:
    raise ConfigError(
      f"{len(indices)} frames of {info.height}x{info.width} take {size / 2**30:.1f} GiB of memory, at most "
      f"{_MOST_BYTES >> 30} are allowed; --image_frames makes them fewer"
    )
  return video.read_frames(task.video, indices, info.num_frames)


def score_all(
  tasks: list[Task], rows: dict[str, Row], scorers: Sequence[VideoScorer], output: Output, settings: dict[str, Any]
) -> list[Row]:
  """Rows of all tasks, those that are finished in `rows` taken from there."""
  started = [start_row(task) for task in tasks]
  kept = [row for row in started if is_finished(row, rows)]
  file = output.start(settings, [rows[row.video] for row in kept])
  bar = tqdm.tqdm(total=len(tasks), initial=len(kept), desc="videos", unit="video", file=sys.stderr)
  with bar:
    for task, row in zip(tasks, started, strict=True):
      if is_finished(row, rows):
        continue
      common.raise_if_interrupted()
      rows[row.video] = score_video(task, row, scorers)
      file.append(rows[row.video])
      bar.update()
  return [rows[row.video] for row in started]


def is_finished(row: Row, rows: dict[str, Row]) -> bool:
  """Whether `rows` has the scores of the same file and prompt; failures are tried again."""
  earlier = rows.get(row.video)
  return earlier is not None and earlier.source == row.source and earlier.error is None


def earlier_rows(output: Output, tasks: list[Task], settings: dict[str, Any]) -> dict[str, Row]:
  """Rows of an earlier run. Raises ConfigError if it had other settings, or videos that would be lost now."""
  if _OVERWRITE.value:
    return {}
  rows = output.earlier_rows(settings)
  others = sorted(set(rows) - {start_row(task).video for task in tasks})
  if others:
    raise ConfigError(
      f"{output.path} has scores of {len(others)} other videos ({others[0]}); use --overwrite or another --output"
    )
  return rows


def main() -> None:
  start = time.perf_counter()
  rewards = find_rewards()
  tasks = read_tasks(rewards)
  settings = run_settings(rewards)
  output = Output(epath.Path(_OUTPUT.value))
  rows = earlier_rows(output, tasks, settings)
  common.require_writable("output", _OUTPUT.value)
  options = ScoringOptions(_IMAGE_FRAMES.value, _BATCH.value)
  scorers = [
    scoring.make_scorer(name, path, dtype=jnp.dtype(_DTYPE.value), options=options) for name, path in rewards.items()
  ]
  columns = [column for scorer in scorers for column in scorer.columns]
  with manifest.CompileCounter() as compilations:
    finished = score_all(tasks, rows, scorers, output, settings)
  run = {
    "settings": settings,
    "environment": manifest.environment(),
    "wall_seconds": time.perf_counter() - start,
    "compilations": {"count": compilations.count, "seconds": compilations.seconds},
  }
  output.write(run, finished, columns)
  print(to_table(finished, columns))
  print(f"{output.csv}, {output.json}", flush=True)
  failed = [row for row in finished if row.error is not None]
  if failed:
    told = part_files.list_some([f"{row.video} ({row.error})" for row in failed], "; ")
    raise common.RunFailed(f"{len(failed)} of {len(finished)} videos could not be scored: {told}")


if __name__ == "__main__":
  common.run(main)
