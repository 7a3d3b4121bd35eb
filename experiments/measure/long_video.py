"""Makes a long video twice, once without a disturbance and once killed with `kill -9` in the middle and started again.

  python -m experiments.measure.long_video --seconds=1800 --work_dir=runs/long_video
  python -m experiments.measure.long_video --seconds=60 --work_dir=runs/long_video_60 --nokill

The search is plain streaming with the sink distance of endless sessions, and the small model if no other is given. While
`streamt1 generate` runs it is watched from outside: resident memory, CPU seconds and rows of its trace. Prints one
JSON line: resident memory by tenths of the video, seconds and CPU seconds of a chunk in the first and the last hundred,
what was compiled, and whether both videos have the same latents and frames, by their SHA-256. Exit code 3 if they
differ.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Sequence

from absl import flags

from streamt1_jax.cli import command, flag_types
from streamt1_jax.config import SINK_DISTANCE
from streamt1_jax.measuring import watched_run

PROMPT = "a red circle moves left over a dark blue background"


def define_flags(values: flags.FlagValues) -> None:
  """The video, and whether it is made a second time."""
  flag_types.define_float(values, "seconds", 1800.0, "Length of the video.")
  flag_types.define_path(
    values, "work_dir", "runs/long_video", "Where all is written; removes what is there.", url=False
  )
  flag_types.define_path(values, "model", None, "Folder of the model; the small one by default.", url=False)
  flag_types.define_switch(values, "kill", True, "Make it a second time and kill that in the middle.")


def run(values: flags.FlagValues) -> None:
  """Makes the videos and compares them. Raises RunFailed if they differ."""
  work = pathlib.Path(values.work_dir)
  shutil.rmtree(work, ignore_errors=True)
  arguments = [f"--prompt={PROMPT}", "--search=none", f"--seconds={values.seconds}", f"--sink_distance={SINK_DISTANCE}"]
  arguments += [] if values.model is None else [f"--checkpoint={values.model}"]
  undisturbed = watched_run.Run(work / "undisturbed", arguments)
  undisturbed.watch()
  report = {"seconds": values.seconds, "undisturbed": undisturbed.report()}
  if values.kill:
    killed = watched_run.Run(work / "killed", arguments)
    half = report["undisturbed"]["chunks"] // 2
    killed.watch(kill_at=half)
    again = watched_run.Run(work / "killed", arguments)
    again.watch()
    report |= {"killed_at_chunk": half, "resumed": again.report()}
    report["same"] = undisturbed.manifest["sha256"] == again.manifest["sha256"]
  print(json.dumps(report), flush=True)
  if not report.get("same", True):
    raise command.RunFailed("the video that was killed in the middle is another one")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
