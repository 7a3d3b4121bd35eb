"""Makes a long video twice, once without a disturbance and once killed with `kill -9` in the middle and started again.

  python -m experiments.measure.long_video --seconds=1800 --work_dir=runs/long_video
  python -m experiments.measure.long_video --seconds=60 --work_dir=runs/long_video_60 --nokill

The search is plain streaming with the sink distance of endless sessions, and the model is the small one if no other is
given. Both videos are made at the same time. While `streamt1 generate` runs it is watched from outside: resident
memory, CPU seconds and rows of its trace. Prints one JSON line: resident memory by tenths of the video, seconds and CPU
seconds of a chunk in the second and the last hundred, how much was compiled, and whether both videos have the same
latents and frames, by their SHA-256. Exit code 3 if they differ.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from concurrent import futures

from absl import flags

from streamt1_jax.cli import command, files, flag_types, search_flags
from streamt1_jax.cli.growing_result import ROWS
from streamt1_jax.config import SINK_DISTANCE, SearchConfig
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.measuring import watched_run

PROMPT = "a red circle moves left over a dark blue background"


def define_flags(values: flags.FlagValues) -> None:
  """The video, and whether it is made a second time."""
  flag_types.define_float(values, "seconds", 1800.0, "Length of the video.")
  flag_types.define_path(
    values, "work_dir", "runs/long_video", "Where all is written; removes what is there.", url=False
  )
  flag_types.define_path(values, "model", None, "Folder of the model; the small one by default.", url=False)
  flag_types.define_integer(values, "save_every", None, "Chunks between two saves; by default one save a minute.", 1)
  flag_types.define_switch(values, "kill", True, "Make it a second time and kill that in the middle.")


def run(values: flags.FlagValues) -> None:
  """Makes the videos and compares them. Raises RunFailed if they differ."""
  work = pathlib.Path(values.work_dir)
  shutil.rmtree(work, ignore_errors=True)
  arguments = [f"--prompt={PROMPT}", "--search=none", f"--seconds={values.seconds}", f"--sink_distance={SINK_DISTANCE}"]
  arguments += [] if values.model is None else [f"--checkpoint={values.model}"]
  arguments += [] if values.save_every is None else [f"--save_every={values.save_every}"]
  half = num_chunks(values) // 2
  runs = {name: watched_run.Run(work / name, arguments, ROWS) for name in ("undisturbed", "killed")[: 1 + values.kill]}
  kills = {"undisturbed": None, "killed": half}
  with futures.ThreadPoolExecutor(len(runs)) as threads:
    watched = {name: threads.submit(finish, run, kills[name]) for name, run in runs.items()}
    finished = {name: future.result() for name, future in watched.items()}
  report = {"seconds": values.seconds} | {name: run.report() for name, run in finished.items()}
  if values.kill:
    report |= {
      "killed_at_chunk": half,
      "same": report["undisturbed"]["sha256"] == report["killed"]["sha256"],
    }
  print(json.dumps(report), flush=True)
  if not report.get("same", True):
    raise command.RunFailed("the video that was killed in the middle is another one")


def num_chunks(values: flags.FlagValues) -> int:
  """Chunks of the video."""
  model = load_config(files.find_checkpoint(values.model))
  return search_flags.video_chunks(model, seconds=values.seconds, search=SearchConfig(sink_distance=SINK_DISTANCE))


def finish(run: watched_run.Run, kill_at: int | None) -> watched_run.Run:
  """The run that came to its end: this one, or the one after it was killed."""
  run.watch(kill_at=kill_at)
  if kill_at is None:
    return run
  again = watched_run.Run(run.folder, run.arguments, ROWS)
  again.watch()
  return again


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
