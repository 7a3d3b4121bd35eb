"""Stages of a long check, each in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from streamt1_jax.config import ConfigError

_COLUMNS = ("source, GB", "write, s", "stage, s", "CPU, s", "peak memory, GB", "result, GB")


def measure(stage: str, command: Sequence[str], output: pathlib.Path | None = None) -> dict[str, Any]:
  """Runs a process to its end.

  Args:
    stage: its name in the report.
    command: arguments of the Python interpreter.
    output: what it makes, to report its size.

  Returns:
    "stage", "seconds", "cpu_seconds" (of all its threads), "peak_rss_bytes", "disk_bytes", and the fields of the JSON
    line it prints, if it prints one.

  Raises:
    ConfigError: it failed; the message has its last line.
  """
  print(f"{stage} ...", file=sys.stderr, flush=True)
  start = time.perf_counter()
  with tempfile.TemporaryFile() as errors:
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=errors)
    try:
      assert process.stdout is not None
      printed = process.stdout.read().decode().splitlines()
      # `wait4` tells the memory of this one process; `getrusage` only of the largest of all so far.
      _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
      process.kill()
      raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
      errors.seek(0)
      said = errors.read().decode(errors="replace").strip().splitlines()
      raise ConfigError(f"stage {stage} failed ({process.returncode}): {said[-1] if said else 'it said nothing'}")
  seconds = time.perf_counter() - start
  result = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
  disk = disk_bytes(output) if output else 0
  measured = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
  return {"stage": stage, **measured, "peak_rss_bytes": usage.ru_maxrss * 1024, "disk_bytes": disk, **result}


def disk_bytes(path: pathlib.Path) -> int:
  """Size of a file, or of all files below a folder."""
  return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def head() -> str:
  """The two lines above the rows of a table of stages, in Markdown."""
  rule = "|".join("-" * (len(column) + 1) + ":" for column in _COLUMNS)
  return f"| {'stage':32} | {' | '.join(_COLUMNS)} |\n|{'-' * 34}|{rule}|"


def row(result: Mapping[str, Any]) -> str:
  """One row of it; `result` is from `measure`, with "written_bytes" and "write_seconds" where a source was written."""
  numbers = [
    result.get("written_bytes", 0) / 1e9, result.get("write_seconds", 0), result["seconds"], result["cpu_seconds"],
    result["peak_rss_bytes"] / 1e9, result["disk_bytes"] / 1e9,
  ]  # fmt: skip
  cells = (f"{number:{len(column)}.2f}" for number, column in zip(numbers, _COLUMNS, strict=True))
  return f"| {result['stage']:32} | {' | '.join(cells)} |"
