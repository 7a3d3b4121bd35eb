"""Measures videos: motion, flicker, coherence over time, exposure, and how they drift. Nothing is downloaded.

  streamt1 measure --videos=outputs/ --output=metrics.jsonl
  streamt1 measure --videos='clips/*.mp4' --torus
  streamt1 measure --videos=outputs/ --torus --shrink=4 --period=64

Needs the extra `eval`: pip install 'streamt1_jax[eval]'. The metrics judge any video and know no prompt; the search's
rewards never see them. Motion is in every table, because a frozen video has the best of all other figures. Lengths are
in pixels, of the file unless --shrink is given.

Every row is safe as soon as it is made, and the same command goes on where it stopped. Exit codes: 0; 2 for bad input;
3 when some videos could not be measured; 130 when interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import command, device_flags, flag_types, score_inputs
from streamt1_jax.cli.files import require_writable
from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.metrics import flow, lite0, report
from streamt1_jax.io import part_files, rows, video
from streamt1_jax.messages import one_line

_MOST_BYTES = 8 << 30
_VERSION = 1
"""The version of the definitions: rows of another version are not mixed with these."""


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  flag_types.define_path(values, "videos", None, "Video file, folder of videos, or glob.", required=True)
  flag_types.define_path(values, "output", "metrics.jsonl", "Rows, one a video, as lines of JSON.")
  flag_types.define_switch(values, "torus", False, "Objects leave on one side and come in at the other.")
  flag_types.define_integer(
    values,
    "period",
    None,
    "Frames after which a perfect video of a torus is the same again, 64 in the shapes world: measures what differs.",
    1,
    100_000,
  )
  flag_types.define_integer(
    values, "shrink", 1, "Takes one pixel of this many: small models' videos are enlarged for people to see.", 1, 64
  )
  flag_types.define_switch(values, "overwrite", False, "Replaces earlier rows, also those of other settings.")
  device_flags.define_compilation_cache(values)


def run(values: flags.FlagValues) -> None:
  """Measures the videos and prints the table."""
  if values.period is not None and not values.torus:
    raise ConfigError(f"--period={values.period} needs --torus: frames are moved over their borders")
  videos = score_inputs.find_videos(values.videos)
  output, settings = epath.Path(values.output), {"torus": values.torus, "shrink": values.shrink, "version": _VERSION}
  # Rows without it are the same as before there was such a flag.
  settings |= {} if values.period is None else {"period": values.period}
  known = [] if values.overwrite else rows.read(output, settings, name=f"--output={values.output}", is_row=_is_row)
  require_writable("output", values.output)
  flow.opencv()
  lite0.load()
  device_flags.use_compilation_cache(values)
  identities = [{"video": str(path), "sha256": part_files.file_sha256(path)} for path in videos]
  earlier = {(row["video"], row["sha256"]): row for row in known if "metrics" in row}
  kept = {key: earlier[key] for key in map(_key, identities) if key in earlier}
  writer = rows.Writer(output, settings, kept.values())
  finished = []
  for path, identity in zip(videos, tqdm.tqdm(identities, unit="video", disable=None), strict=True):
    command.raise_if_interrupted()
    row = kept.get(_key(identity))
    if row is None:
      row = identity | _measured(path, values.torus, values.shrink, values.period)
      writer.append(row)
    finished.append(row)
  print(report.table(finished))
  failed = [f"{row['video']} ({row['error']})" for row in finished if "error" in row]
  if failed:
    told = part_files.list_some(failed, "; ")
    raise command.RunFailed(f"{len(failed)} of {len(finished)} videos could not be measured: {told}")


def _key(row: dict[str, Any]) -> tuple[str, str]:
  return row["video"], row["sha256"]


def _is_row(row: rows.Row) -> bool:
  whole = isinstance(row.get("video"), str) and isinstance(row.get("sha256"), str)
  return whole and (isinstance(row.get("metrics"), dict) or isinstance(row.get("error"), str))


def _measured(path: epath.Path, torus: bool, shrink: int, period: int | None) -> dict[str, Any]:
  try:
    info = video.probe_video(path)
    size = info.num_frames * info.height * info.width * 3
    if size > _MOST_BYTES:
      raise ConfigError(f"its frames take {size / 2**30:.1f} GiB of memory, at most {_MOST_BYTES >> 30} are allowed")
    frames = video.read_frames(path, np.arange(info.num_frames), info.num_frames)
    middle = slice(shrink // 2, None, shrink)
    return {"metrics": report.measure(frames[:, middle, middle], info.fps, torus=torus, repeats_after=period)}
  except ConfigError as error:
    return {"error": one_line(str(error))}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
