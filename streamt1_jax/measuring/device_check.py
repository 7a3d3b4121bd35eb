"""Everything that needs a device, in order of value: one table of parts, and what runs them one after the other.

Every part runs in a process of its own, with a limit of time, so that one that fails, dies or hangs ends alone, and its
peak memory is its own. Results are on the disk after every part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from etils import epath

from streamt1_jax.io import manifest
from streamt1_jax.measuring import device_numerics, device_speed
from streamt1_jax.measuring.device_sizes import Sizes
from streamt1_jax.messages import one_line


@dataclasses.dataclass(frozen=True)
class Part:
  """One thing that is checked.

  Attributes:
    name: what it is called.
    limit: seconds that it may take at full size, compilation and start of its process included.
    check: what is run; it returns names and values, and raises `NotHere` where there is nothing to run.
  """

  name: str
  limit: float
  check: Callable[[Sizes], dict[str, Any]]


def _reward(name: str, dtype: str) -> Callable[[Sizes], dict[str, Any]]:
  return functools.partial(device_speed.reward, name=name, dtype=jnp.dtype(dtype))


def _attention(implementation: Any) -> Callable[[Sizes], dict[str, Any]]:
  return functools.partial(device_numerics.attention, implementation=implementation)


PARTS = (
  Part("machine", 60, device_speed.machine),
  Part("attention_fold", 90, _attention("fold")),
  Part("attention_flash", 90, _attention("flash")),
  Part("attention_triton", 90, _attention("triton")),
  Part("streaming", 200, device_speed.streaming),
  Part("streaming_triton", 200, functools.partial(device_speed.streaming, attention="triton", platform="gpu")),
  Part("golden_search", 90, device_numerics.golden),
  Part("search_2x2", 240, device_speed.search),
  Part("small_rewards", 90, device_numerics.rewards),
  Part("streaming_latents", 150, functools.partial(device_speed.streaming, decodes=False)),
  Part("decoder", 120, device_speed.decoder),
  Part("hpsv3_bfloat16", 100, _reward("hpsv3", "bfloat16")),
  Part("videoalign_bfloat16", 100, _reward("videoalign", "bfloat16")),
  Part("hpsv3_int8", 100, _reward("hpsv3", "int8")),
  Part("videoalign_int8", 100, _reward("videoalign", "int8")),
  Part("compilation_cold", 180, device_speed.compilation),
  Part("compilation_warm", 90, device_speed.compilation),
)
"""What is checked, in order of value. The last two share a folder of compiled programs that begins empty."""

OK, FAILED, SKIPPED, NO_TIME = "ok", "failed", "not here", "no time"
"""What may become of a part."""
_COMPILES = "compilation"
_LEAST = 5.0  # seconds below which a part is not begun


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a part.

  Attributes:
    name: of the part.
    status: one of the words above.
    seconds: of its process.
    found: names and values, if it is `OK`.
    reason: one line, if it is not.
    environment: versions and devices, as the part's process saw them; empty if it did not get so far.
  """

  name: str
  status: str
  seconds: float
  found: Mapping[str, Any]
  reason: str = ""
  environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def cells(self) -> list[str]:
    """The row of a table."""
    told = "; ".join(f"{name.replace('_', ' ')} {_show(name, value)}" for name, value in self.found.items())
    return [self.name, self.status, f"{self.seconds:.0f}", told or self.reason]


COLUMNS = ("part", "status", "seconds", "found")


def _show(name: str, value: Any) -> str:
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int) and name.split("_")[-1] in ("bytes", "limit"):
    return f"{value / 1e9:.2f} GB"
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def run(parts: Sequence[Part], command: Callable[[Part], Sequence[str]], seconds: float) -> Iterator[Outcome]:
  """Runs parts one after the other.

  Args:
    parts: what is checked.
    command: the arguments of the Python interpreter that run one part, and print its result as a line of JSON.
    seconds: for all of them; a part that is left then is not begun.

  Yields:
    What became of each part, as soon as it is known.
  """
  until = time.monotonic() + seconds
  with tempfile.TemporaryDirectory() as cache:
    for part in parts:
      left = until - time.monotonic()
      if left < min(_LEAST, part.limit):
        yield Outcome(part.name, NO_TIME, 0.0, {}, "the time was over")
      else:
        yield _run_one(part, command(part), min(left, part.limit), cache)


def _run_one(part: Part, command: Sequence[str], limit: float, cache: str) -> Outcome:
  began = time.monotonic()
  # Both parts that compile find what the first of them has compiled, and nothing else.
  settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  variables = os.environ | settings if part.name.startswith(_COMPILES) else None
  process = subprocess.Popen(
    [sys.executable, *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    errors="replace",
    env=variables,
    # A group of its own, so that what the part has started ends with it.
    start_new_session=True,
  )
  try:
    output, errors = process.communicate(timeout=limit)
  except BaseException as error:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not isinstance(error, subprocess.TimeoutExpired):
      raise
    return Outcome(part.name, FAILED, time.monotonic() - began, {}, f"it took more than its {limit:.0f} s")
  return read_outcome(part.name, time.monotonic() - began, process.returncode, output, errors)


def read_outcome(name: str, seconds: float, code: int, output: str, errors: str) -> Outcome:
  """What a part's process said: the last line of its output, or else the last line of its errors."""
  with contextlib.suppress(ValueError, IndexError, KeyError):
    said = json.loads(output.splitlines()[-1])
    if isinstance(said, dict) and said.get("status") in (OK, SKIPPED):
      return Outcome(name, said["status"], seconds, said.get("found", {}), said.get("reason", ""), said["environment"])
  lines = [line.strip() for line in errors.splitlines() if line.strip()]
  # A message of XLA may be followed by where it comes from.
  telling = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Check failed)", line)]
  reason = (telling or lines or ["it said nothing"])[-1]
  return Outcome(name, FAILED, seconds, {}, one_line(f"exit code {code}: {reason}")[:300])


def commit() -> str:
  """The commit of the current folder's checkout; zeros without a checkout."""
  done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
  return done.stdout.strip() if done.returncode == 0 else "0000000"


def document(command: str, sizes: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """The file of the documentation: what `docs/make_evidence.py` renders, and all values beside it."""
  environment = next((outcome.environment for outcome in outcomes if outcome.environment), {})
  versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
  return {
    "title": "What a device computed, and how fast",
    "command": [command],
    "date": datetime.date.today().isoformat(),
    "commit": commit(),
    "machine": f"{environment.get('device_kind', 'unknown device')} ({environment.get('platform', '?')})",
    "note": f"Sizes: {sizes}, random weights. {versions}.",
    "columns": list(COLUMNS),
    "rows": [outcome.cells() for outcome in outcomes],
    "environment": environment,
    "outcomes": [dataclasses.asdict(dataclasses.replace(outcome, environment={})) for outcome in outcomes],
  }


def write(path: epath.PathLike, content: Mapping[str, Any]) -> None:
  """Replaces the file: a reader sees the old one or the new one."""
  manifest.write_json(path, content)
