"""Scores videos: any files, by any rewards.

  streamt1 score --videos=outputs/
  streamt1 score --videos='clips/*.mp4' --prompts_file=prompts.txt --reward=hpsv3+videoalign \\
    --checkpoint=checkpoints/wan_1_3b --output=scores.csv

Rewards are read from `CHECKPOINT/rewards/NAME`; `quality` and `coherence` are built in and need neither weights nor
prompts. Prints a table and writes a CSV and a JSON file side by side. Columns of VideoAlign: its `_VQ`, `_MQ` and
`_TA`, each less its mean and over its standard deviation, and their sum, `_Overall`; of HPSv3: the mean over frames,
and `_frames`, every frame's.

A prompts file has one prompt per line, for the videos in sorted order; or lines `name<TAB>prompt`; or lines of JSON
with `video` and `prompt`. Without one, the prompts are those of the manifests that `streamt1 generate` leaves.

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
import itertools
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
from jaxtyping import Int, UInt8

from streamt1_jax.cli import command, device_flags, flag_types, score_inputs, search_flags
from streamt1_jax.cli.files import find_checkpoint, require_writable
from streamt1_jax.cli.score_inputs import Task
from streamt1_jax.cli.score_rows import Output, Row, to_table
from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest, part_files, video
from streamt1_jax.messages import one_line
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards import scoring
from streamt1_jax.rewards.scorers import ScoringOptions, VideoScorer, VideoScores
from streamt1_jax.rewards.table import DEFAULT_REWARDS, REWARDS
from streamt1_jax.rewards.window_codecs import find as find_codec

_MOST_BYTES = 8 << 30
_BUILT_IN = [name for name, spec in REWARDS.items() if not spec.is_stored]


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  flag_types.define_path(values, "videos", None, "Video file, folder of videos, or glob.", required=True)
  flag_types.define_path(values, "prompts_file", None, "Prompts of the videos; the manifests beside them otherwise.")
  flag_types.define_string(
    values,
    "reward",
    None,
    "Names of rewards joined by '+'; all that the checkpoint has, or quality+coherence, by default.",
  )
  flag_types.define_checkpoint(values, "Folder whose rewards/ holds the rewards")
  flag_types.define_path(values, "output", "scores.csv", "CSV or JSON file; the other one is written beside it.")
  device_flags.define_dtype(values, ["float32", "bfloat16", "int8"], "Dtype of the rewards' backbones.")
  flag_types.define_integer(values, "image_frames", None, "Frames that image rewards see; all by default.", 1, 10**6)
  flag_types.define_integer(values, "batch", 8, "Frames that an image reward scores at a time.", 1, 4096)
  search_flags.define_reward_codec(values)
  flag_types.define_switch(values, "overwrite", False, "Replace earlier scores, also those of other videos.")
  device_flags.define_compilation_cache(values)


def find_rewards(values: flags.FlagValues) -> dict[str, epath.Path]:
  """Folders of the rewards of the flags, by name; those of built-in ones do not exist."""
  rewards = find_checkpoint(values.checkpoint) / reward_folder.REWARDS_FOLDER
  present = sorted(path.name for path in rewards.iterdir() if path.is_dir()) if rewards.is_dir() else []
  names = values.reward.split("+") if values.reward is not None else present or list(DEFAULT_REWARDS)
  for name in names:
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9]", name) or names.count(name) > 1:
      raise ConfigError(f"--reward={values.reward} must be different names joined by '+', such as quality+coherence")
    if name not in (*_BUILT_IN, *present):
      found = ", ".join((*_BUILT_IN, *present))
      raise ConfigError(f"--reward={values.reward}: {rewards} has no {name}; there are: {found}")
  return {name: rewards / name for name in names}


def needs_prompt(folder: epath.Path) -> bool:
  """Whether the reward in `folder` reads a prompt. Raises ConfigError if there is no reward."""
  spec, _ = reward_folder.load_config(folder)
  return spec.reads_prompt


def reward_sha256(folder: epath.Path) -> str:
  """Identifies a reward wherever its folder is. Raises ConfigError if the folder holds no reward."""
  reward_folder.load_config(folder)
  # It has the checksums of all other files.
  return hashlib.sha256((folder / part_files.PART_FILE).read_bytes()).hexdigest()


def run_settings(values: flags.FlagValues, dtype: str, rewards: dict[str, epath.Path]) -> dict[str, Any]:
  """Everything but the videos and prompts that decides the scores."""
  weights = {f"{name}_sha256": reward_sha256(path) for name, path in rewards.items() if name not in _BUILT_IN}
  settings = {"reward": "+".join(rewards), "dtype": dtype, "image_frames": values.image_frames, **weights}
  # Scores that were made before there was a choice have none.
  return settings | ({"reward_codec": values.reward_codec} if find_codec(values.reward_codec).on_host else {})


def read_tasks(values: flags.FlagValues, rewards: dict[str, epath.Path]) -> list[Task]:
  """The videos of the flags with their prompts; raises ConfigError if a reward needs one that is nowhere."""
  videos = score_inputs.find_videos(values.videos)
  if values.prompts_file is not None:
    return score_inputs.with_given_prompts(videos, values.prompts_file)
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


def start_row(task: Task) -> Row:
  """The row of a video before anything of it is read."""
  # The name of a file may be no text at all; JSON and CSV are.
  name = os.fspath(task.video).encode(errors="backslashreplace").decode()
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
  except MemoryError:
    errors.append("there is not enough memory for its frames")
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
          parts = task.parts(info.num_frames, reads_prompt=scorer.reads_prompt)
          indices[scorer] = [(part, part.begin + scorer.look_at(part.end - part.begin, info.fps)) for part in parts]
    if indices:
      needed = np.unique(np.concatenate([own for looked_at in indices.values() for _, own in looked_at]))
      frames = read_needed(task, info, needed)
      row = dataclasses.replace(row, height=frames.shape[1], width=frames.shape[2])
    for scorer, looked_at in indices.items():
      with noting_in(errors, task):
        of = lambda own: frames if len(own) == len(needed) else frames[np.searchsorted(needed, own)]
        scores |= joined([(part.end - part.begin, scorer(part.prompt, of(own))) for part, own in looked_at])
  return dataclasses.replace(row, scores=scores, error=one_line("; ".join(dict.fromkeys(errors))) or None)


def joined(parts: Sequence[tuple[int, VideoScores]]) -> VideoScores:
  """Scores of a video from lengths and scores of its parts: means weighted by length; scores of frames in a row."""
  if len(parts) == 1:
    return parts[0][1]
  lengths, by_part = zip(*parts)
  return {
    column: list(itertools.chain(*values))
    if isinstance(values[0], list)
    else float(np.average(values, weights=lengths))
    for column, values in ((column, [scores[column] for scores in by_part]) for column in by_part[0])
  }


def read_needed(task: Task, info: video.VideoInfo, indices: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N H W 3"]:
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
      command.raise_if_interrupted()
      rows[row.video] = score_video(task, row, scorers)
      file.append(rows[row.video])
      bar.update()
  return [rows[row.video] for row in started]


def is_finished(row: Row, rows: dict[str, Row]) -> bool:
  """Whether `rows` has the scores of the same file and prompt; failures are tried again."""
  earlier = rows.get(row.video)
  return earlier is not None and earlier.source == row.source and earlier.error is None


def earlier_rows(
  values: flags.FlagValues, output: Output, tasks: list[Task], settings: dict[str, Any]
) -> dict[str, Row]:
  """Rows of an earlier run. Raises ConfigError if it had other settings, or videos that would be lost now."""
  if values.overwrite:
    return {}
  rows = output.earlier_rows(settings)
  others = sorted(set(rows) - {start_row(task).video for task in tasks})
  if others:
    raise ConfigError(
      f"{output.path} has scores of {len(others)} other videos ({others[0]}); use --overwrite or another --output"
    )
  return rows


def run(values: flags.FlagValues) -> None:
  """Scores the videos and writes the table."""
  start = time.perf_counter()
  rewards = find_rewards(values)
  tasks = read_tasks(values, rewards)
  dtype = device_flags.use_dtype(values.dtype)
  settings = run_settings(values, dtype, rewards)
  output = Output(epath.Path(values.output))
  rows = earlier_rows(values, output, tasks, settings)
  for file in (output.csv, output.json):
    require_writable("output", str(file))
  device_flags.use_compilation_cache(values)
  options = ScoringOptions(values.image_frames, values.batch)
  scorers = [
    scoring.make_scorer(name, path, dtype=jnp.dtype(dtype), options=options, reward_codec=values.reward_codec)
    for name, path in rewards.items()
  ]
  device_flags.tell_devices(dtype)
  columns = [column for scorer in scorers for column in scorer.columns]
  with manifest.CompileCounter() as compilations:
    finished = score_all(tasks, rows, scorers, output, settings)
  account = {
    "settings": settings,
    "environment": manifest.environment(),
    "wall_seconds": time.perf_counter() - start,
    "compilations": {"count": compilations.count, "seconds": compilations.seconds},
  }
  output.write(account, finished, columns)
  print(to_table(finished, columns))
  print(f"{output.csv}, {output.json}", flush=True)
  failed = [row for row in finished if row.error is not None]
  if failed:
    told = part_files.list_some([f"{row.video} ({row.error})" for row in failed], "; ")
    raise command.RunFailed(f"{len(failed)} of {len(finished)} videos could not be scored: {told}")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
