"""Plays a scripted viewer of `streamt1 serve` and prints the numbers that a live service is judged by.

  python -m experiments.measure.live --seconds=3600 --output=docs/evidence/live.json

Each search gets a server of its own, which has compiled nothing: its first session is cold, its second is warm and is
watched. The prompt changes every `--switch_every` seconds. On Linux.
"""

import asyncio
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from streamt1_jax.cli import command, flag_types
from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest
from streamt1_jax.measuring import device_check, live_viewer
from streamt1_jax.serve.presets import PRESETS

PROMPTS = (
  "a red circle moves left over a dark blue background",
  "a blue square moves up over a gray background",
  "a small green triangle moves quickly right over a black background",
)
ROWS = {
  "chunks": "chunks",
  "cold_first_chunk": "first chunk of a server that has compiled nothing, s",
  "first_chunk": "first chunk, warm, s",
  "gap_p50": "gap between chunks, median, s",
  "gap_p95": "95th percentile, s",
  "gap_p99": "99th percentile, s",
  "real_time_factor": "real-time factor",
  "on_time": "share of chunks on time",
  "switches": "prompts",
  "switch_median": "prompt to its first frame, median, s",
  "switch_worst": "the longest, s",
  "most_lag": "chunks that beams waited for, at most",
  "resident_begin": "memory of the server after a tenth of the time, MB",
  "resident_end": "at the end, MB",
}


def define_flags(values: flags.FlagValues) -> None:
  """The sessions that are watched."""
  flag_types.define_checkpoint(values)
  flag_types.define_list(values, "searches", ["1x4", "2x2"], f"Any of {', '.join(PRESETS)}.")
  flag_types.define_float(values, "seconds", 60.0, "How long each is watched.", 1.0, 24 * 3600.0)
  flag_types.define_float(values, "switch_every", 7.0, "Seconds between two prompts.", 0.5, 3600.0)
  flag_types.define_path(values, "output", None, "JSON file for the table, as the documentation reads it.", url=False)


def run(values: flags.FlagValues) -> None:
  """Measures every search, and prints each."""
  unknown = [search for search in values.searches if search not in PRESETS]
  if unknown or not values.searches:
    raise ConfigError(f"--searches must be of {', '.join(PRESETS)}, got {', '.join(unknown) or 'none'}")
  reports = {}
  for search in values.searches:
    reports[search] = measure(values, search)
    print(json.dumps({"search": search} | reports[search]), flush=True)
  if values.output is not None:
    manifest.write_json(pathlib.Path(values.output), document(values, reports))


def measure(values: flags.FlagValues, search: str) -> dict[str, Any]:
  """The figures of one search, on a server of its own."""
  with tempfile.TemporaryDirectory() as folder:
    arguments = [f"--search={search}", f"--output_dir={folder}/out", f"--compilation_cache_dir={folder}/compiled"]
    arguments += [] if values.checkpoint is None else [f"--checkpoint={values.checkpoint}"]
    program = [sys.executable, "-m", "streamt1_jax", "serve", "--port=0", "--warm_up=false", *arguments]
    minutes = f"--max_minutes={values.seconds / 60 + 1}"
    with subprocess.Popen([*program, minutes], stdout=subprocess.PIPE, text=True) as server:
      try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        if not address:
          raise command.RunFailed("the server has not started")
        return asyncio.run(watch_twice(values, search, address, server.pid))
      finally:
        server.terminate()


async def watch_twice(values: flags.FlagValues, search: str, address: str, server: int) -> dict[str, Any]:
  """The figures of a cold session and a warm one. The cold one has a switch too, so that it is compiled."""
  cold = await live_viewer.watch(address, search, PROMPTS, seconds=0, switch_every=0, least_switches=1)
  options = {"seconds": values.seconds, "switch_every": values.switch_every}
  watching = asyncio.create_task(live_viewer.watch(address, search, PROMPTS, **options))
  resident = [resident_megabytes(server)]
  while not watching.done():
    await asyncio.wait([watching], timeout=1)
    resident.append(resident_megabytes(server))
  memory = {"resident_begin": round(resident[len(resident) // 10]), "resident_end": round(resident[-1])}
  return {"cold_first_chunk": cold.first} | (await watching).report() | memory


def resident_megabytes(process: int) -> float:
  """Memory of a process that is in use."""
  lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
  return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def document(values: flags.FlagValues, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """The file of the documentation."""
  names = ("seconds", "switch_every", "checkpoint")
  given = [f"--{name}={values[name].value}" for name in names if values[name].present]
  rows = [[label, *(_cell(report[name]) for report in reports.values())] for name, label in ROWS.items()]
  return {
    "title": "A live search, as its viewer sees it",
    "command": [" ".join(["python -m experiments.measure.live", *given, f"--output={values.output}"])],
    "date": datetime.date.today().isoformat(),
    "commit": device_check.commit(),
    "note": f"Watched for {values.seconds:g} s after the first chunk; another prompt every {values.switch_every:g} s. "
    "Real-time factor: seconds it takes to make a second of video. To its first frame: until a player shows it that "
    "first plays what was there.",
    "columns": ["", *reports],
    "rows": rows,
    "reports": reports,
  }


def _cell(value: float | None) -> str:
  return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
