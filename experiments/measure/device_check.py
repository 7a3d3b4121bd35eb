"""Checks and measures a machine with an accelerator, by one command.

  python -m experiments.measure.device_check
  python -m experiments.measure.device_check --minutes=20 --output=docs/evidence/device_check.json
  python -m experiments.measure.device_check --sizes=small --minutes=3

In order of value, within the minutes that it is given: numerics of attention and of the rewards against float32 on the
host; plain streaming and the 2x2 search of `wan_1_3b` with random weights (seconds a chunk, frames a second with and
without decoding, peak memory); a recorded search; the video decoder alone; one call of each large reward, in bfloat16
and int8; compilation, cold and warm. `streamt1_jax.measuring.device_check` has the table of parts.

Prints a row when its part is through, and writes all of them each time. With the file in `docs/evidence`,
`python docs/make_evidence.py` puts the table into the documentation. A full check takes about 20 minutes, most of it
compilation; what there was no time for has a row that says so. Numerics need the host beside the device:
JAX_PLATFORMS must not name the device alone.

Exit codes: 0; 2 for bad input; 3 when a part failed, and the others have their rows.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from streamt1_jax.cli import command, files, flag_types
from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest, markdown
from streamt1_jax.measuring import device_check
from streamt1_jax.measuring.device_check import COLUMNS, FAILED, OK, PARTS, SKIPPED, Part
from streamt1_jax.measuring.device_sizes import SIZES, NotHere

_MODULE = "experiments.measure.device_check"


def define_flags(values: flags.FlagValues) -> None:
  """How long, how large, and where the results go."""
  flag_types.define_float(values, "minutes", 8.0, "For all parts together.", 0.05)
  flag_types.define_choice(values, "sizes", "full", list(SIZES), "Full size, or so small that a CPU is enough.")
  flag_types.define_path(values, "output", "runs/device_check.json", "File of the results.")
  flag_types.define_list(
    values, "only", None, "Names of parts, joined by commas as in machine,decoder; all by default."
  )
  used = "Used by the program itself: run one part in this process and print its result."
  flag_types.define_choice(values, "part", None, [part.name for part in PARTS], used)


def chosen_parts(values: flags.FlagValues) -> list[Part]:
  """The parts of --only. Raises ConfigError for a name that is no part."""
  known = {part.name: part for part in PARTS}
  names = list(known) if values.only is None else values.only
  for name in names:
    if name not in known:
      raise ConfigError(f"--only: {name!r} is not one of {', '.join(known)}")
  return [known[name] for name in names]


def run_part(values: flags.FlagValues) -> None:
  """One part, in this process; its last line on stdout is its result."""
  (part,) = [part for part in PARTS if part.name == values.part]
  try:
    result = {"status": OK, "found": part.check(SIZES[values.sizes]())}
  except NotHere as reason:
    result = {"status": SKIPPED, "reason": str(reason)}
  print(json.dumps(result | {"environment": manifest.environment()}), flush=True)


def run(values: flags.FlagValues) -> None:
  """Runs the parts and writes what they found."""
  if values.part is not None:
    run_part(values)
    return
  parts = chosen_parts(values)
  files.require_writable("output", values.output)
  given = [f"--sizes={values.sizes}", f"--minutes={values.minutes:g}"]
  given += [] if values.only is None else [f"--only={','.join(values.only)}"]
  told = shlex.join(["python", "-m", _MODULE, *given])
  arguments = lambda part: ["-m", _MODULE, f"--part={part.name}", f"--sizes={values.sizes}"]
  outcomes = []
  print(markdown.head(COLUMNS), flush=True)
  for outcome in device_check.run(parts, arguments, 60 * values.minutes):
    outcomes.append(outcome)
    device_check.write(values.output, device_check.document(told, values.sizes, outcomes))
    print(markdown.row(outcome.cells()), flush=True)
  failed = [outcome.name for outcome in outcomes if outcome.status == FAILED]
  if failed:
    raise command.RunFailed(f"{len(failed)} of {len(parts)} parts failed: {', '.join(failed)}")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
