"""The table of full-size compilations: each by `experiments.measure.aot_compile` in a process of its own.

  python -m experiments.measure.aot_table --output=runs/aot.jsonl

writes a JSON line per compilation as soon as it is made, and prints the table of all lines. Run again it makes what is
missing. A compilation takes minutes of CPU time and a few GB. It needs `libtpu` (`pip install -e '.[tpu]'`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from streamt1_jax.cli import command, files, flag_types
from streamt1_jax.io import markdown, rows
from streamt1_jax.measuring.compilation_table import CASES, COLUMNS, cells, is_row


def define_flags(values: flags.FlagValues) -> None:
  """The file, and how much is compiled."""
  flag_types.define_path(values, "output", "runs/aot.jsonl", "JSON lines, kept from run to run.")
  layers = "Blocks of the backbone, for a quick look; all by default."
  flag_types.define_integer(values, "num_layers", None, layers, 1)


def compile_one(case: dict[str, Any], num_layers: int | None) -> dict[str, Any]:
  """The JSON line of one compilation. Raises RunFailed, with the line of its errors that says the most."""
  switches = {name: str(value).lower() for name, value in case.items() if value in (True, False)}
  given = case | switches | ({} if num_layers is None else {"num_layers": num_layers})
  command_line = ["-m", "experiments.measure.aot_compile", *(f"--{name}={value}" for name, value in given.items())]
  done = subprocess.run([sys.executable, *command_line], capture_output=True, text=True)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    # A compiler that dies says why before it lists where.
    reason = next((line for line in lines if "Check failed" in line), lines[-1])
    raise command.RunFailed(f"{' '.join(command_line)} ended with {done.returncode}: {reason}")
  return json.loads(done.stdout.splitlines()[-1])


def run(values: flags.FlagValues) -> None:
  """Makes what is missing, then prints the table."""
  files.require_writable("output", values.output)
  path, settings = epath.Path(values.output), {"num_layers": values.num_layers}
  made = rows.read(path, settings, name=f"--output={path}", is_row=is_row)
  missing = [case for case in CASES if case not in [row["case"] for row in made]]
  if missing:
    writer = rows.Writer(path, settings, made)
  for case in missing:
    made.append({"case": case, "report": compile_one(case, values.num_layers)})
    writer.append(made[-1])
    print(markdown.row(cells(**made[-1])), flush=True)
  print(markdown.table(COLUMNS, (cells(**row) for row in made)))


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
