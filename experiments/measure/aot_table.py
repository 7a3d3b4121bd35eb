"""The README's table of full-size compilations: each by `experiments.measure.aot_compile` in a process of its own.

  python -m experiments.measure.aot_table --output=runs/aot.jsonl

writes a JSON line per compilation as soon as it is made, and prints the table of all lines. Run again it makes what is
missing. A compilation takes minutes of CPU time and a few GB. Needs `libtpu` (`pip install -e '.[tpu]'`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic

_OUTPUT = common.define_path("output", "runs/aot.jsonl", "JSON lines, kept from run to run.")
_NUM_LAYERS = common.define_integer("num_layers", None, "Blocks of the backbone, for a quick look; all by default.", 1)

_GIB = 1 << 30
_ONE_CHIP = {"topology": "v6e:1x1", "mesh": "candidate:1", "decoding": "twice"}
_SLICES = (
  {"topology": "v5e:2x4", "mesh": "candidate:2,model:4", "decoding": "in_turn"},
  {"topology": "v6e:2x4", "mesh": "candidate:4,model:2", "decoding": "in_turn"},
  {"topology": "v5p:2x2x1", "mesh": "candidate:4", "decoding": "in_turn"},
  {"topology": "tpu7x:2x2x1", "mesh": "candidate:4,model:2", "decoding": "in_turn"},
  {"topology": "v5e:16x16", "mesh": "data:32,candidate:2,model:4", "decoding": "in_turn"},
)
CASES = (
  {**_ONE_CHIP, "rewards": False},
  # Both rewards beside the search: on one chip only in int8 and without added sinks.
  {**_ONE_CHIP, "rewards": True, "reward_dtype": "int8", "max_sink_frames": 3},
  {**_SLICES[0], "rewards": True},
  *({**one, "rewards": False} for one in _SLICES),
  {**_SLICES[0], "mesh": "candidate:2,seq:4", "rewards": False},
  *({**one, "rewards": True} for one in _SLICES[1:]),
)
"""Flags of `experiments.measure.aot_compile`, one compilation each."""

COLUMNS = (
  "slice", "mesh", "decoding", "rewards", "sink frames", "arguments", "outputs", "temporaries", "peak", "of", "fits",
  "collectives, GB", "per block", "between candidates", "compile, s",
)  # fmt: skip


def compile_one(case: dict[str, Any]) -> dict[str, Any]:
  """The JSON line of one compilation. Raises RunFailed, with the line of its errors that says the most."""
  options = [f"--{name}={value}" for name, value in case.items() if name != "rewards"]
  command = [
    sys.executable,
    "-m",
    "experiments.measure.aot_compile",
    *options,
    f"--rewards={str(case['rewards']).lower()}",
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    # A compiler that dies says why before it lists where.
    reason = next((line for line in lines if "Check failed" in line), lines[-1])
    raise common.RunFailed(f"{' '.join(command[1:])} ended with {done.returncode}: {reason}")
  return json.loads(done.stdout.splitlines()[-1])


def row(case: Mapping[str, Any], report: Mapping[str, Any]) -> str:
  """One line of the table; sizes are GiB per chip, collectives GB sent by a device in one chunk."""
  size = lambda name: "" if report[name] is None else f"{report[name] / _GIB:.2f}"
  sent = report["collectives"]
  kinds = "" if sent is None else ", ".join(f"{kind} {one['bytes'] / 1e9:.2f}" for kind, one in sent.items()) or "none"
  of_model = lambda name: "" if sent is None else f"{report[name]:g}"
  cells = (
    case["topology"],
    case["mesh"],
    case["decoding"],
    report["reward_dtype"] or "built in",
    str(report["max_sink_frames"]),
    *(size(name) for name in ("argument_bytes", "output_bytes", "temporary_bytes")),
    size("hbm_peak_bytes_per_chip"),
    size("hbm_limit_bytes"),
    "yes" if report["fits"] else "no",
    kinds,
    of_model("activation_collectives_per_block"),
    of_model("candidate_collectives_in_denoising"),
    f"{report['compile_seconds']:.0f}",
  )
  return f"| {' | '.join(cells)} |"


def read(path: epath.Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
  """Cases and reports of earlier runs. Raises ConfigError for a file that is something else."""
  try:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["case"], line["report"]) for line in lines]
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"--output={path} does not hold the lines of an earlier run: {error}") from error


def main() -> None:
  common.require_writable("output", _OUTPUT.value)
  path = epath.Path(_OUTPUT.value)
  made = read(path)
  for case in CASES:
    if _NUM_LAYERS.value is not None:
      case = {**case, "num_layers": _NUM_LAYERS.value}
    if any(case == earlier for earlier, _ in made):
      continue
    made.append((case, compile_one(case)))
    lines = "".join(json.dumps({"case": one, "report": report}) + "\n" for one, report in made)
    atomic.replace_bytes(path, lines.encode())
    print(row(*made[-1]), flush=True)
  print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
  for case, report in made:
    print(row(case, report))


if __name__ == "__main__":
  common.run(main)
