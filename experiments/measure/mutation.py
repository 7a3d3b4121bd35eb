"""Puts single-place faults into the core, one at a time, and counts how many of them the nearest tests notice.

  python -m experiments.measure.mutation --output=runs/mutation.jsonl
  python -m experiments.measure.mutation --output=runs/mutation.jsonl --modules=sampling,backbone/schedule --again

A fault is a comparison, an operator, a number, an order of arguments or a statement that is another one or not there
(`streamt1_jax/measuring/faults.py` has the list). Every module gets `--faults` of them. Each one is written into a copy
of the repository, and the module's tests run there until the first of them fails or the time is over: that is noticed.
The repository itself is never touched. A fault takes 5 to 60 s of one core, so this is a program for the night.

Every fault is a row of `--output` as soon as it is known; the same command goes on where it was stopped. A row counts
as long as its module stays as it was. `--again` tries once more what was not noticed, as after new tests. The last
lines are those not noticed, and the share of every module as JSON; the exit code is 3 if less than `--share` was
noticed.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import sys
import tempfile
from collections.abc import Sequence

from absl import flags
from etils import epath

from streamt1_jax.cli import command, flag_types
from streamt1_jax.cli.command import RunFailed
from streamt1_jax.config import ConfigError
from streamt1_jax.io import rows
from streamt1_jax.measuring import faults
from streamt1_jax.measuring.test_runs import TestRuns

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SEARCH = ("drivers", "chunk_step")
_KINDS = ("judge_every", "reject")
TESTS: dict[str, tuple[str, ...]] = {
  "sampling": ("sampling",),
  "noise_propagation": ("noise_propagation",),
  "reward_pruning": ("reward_pruning",),
  "policies/base": ("policies",),
  "policies/selection": ("policies",),
  "policies/resampling": ("resampling",),
  "policies/particles": ("particles",),
  "policies/widths": ("reject",),
  "backbone/schedule": ("schedule",),
  "backbone/attention": ("attention",),
  "rewards/coherence": ("coherence", "rewards"),
  "rewards/quality": ("rewards",),
  "codec/layers": ("codec",),
  "codec/vae": ("codec",),
  "codec/streaming": ("codec", "chunk_step"),
  "memory_sinking": ("memory_sinking",),
  "state": _SEARCH,
  "drivers": ("drivers", *_KINDS),
  "chunk_step": ("chunk_step", "drivers", *_KINDS),
  "step": ("chunk_step", "drivers", *_KINDS),
  "rounds": ("rounds",),
  "look_ahead": ("look_ahead",),
  "nn/rotary": ("attention",),
  "recache": ("between_chunks",),
  "between_chunks": ("between_chunks",),
  "steering": ("session",),
  "session": ("session",),
}
"""Modules of the core, and the tests next to them, which run in this order."""


def define_flags(values: flags.FlagValues) -> None:
  """Which faults, and how long a run may take."""
  flag_types.define_path(values, "output", None, "Rows, one a fault.", required=True)
  flag_types.define_list(values, "modules", list(TESTS), "Modules of the core, as in policies/base; by default all.")
  flag_types.define_integer(values, "faults", 1000, "Faults of a module at most, drawn at random.", 1)
  flag_types.define_integer(values, "seed", 0, "Seed of what is drawn.")
  flag_types.define_float(values, "seconds", 300.0, "Longest time of a run; what takes longer is noticed.", 1.0)
  flag_types.define_switch(values, "again", False, "Tries again what was not noticed.")
  flag_types.define_float(values, "share", 0.95, "Share that must be noticed.", 0.0, 1.0)


def drawn(source: str, count: int, seed: int) -> list[int]:
  """Places of `count` of the source's faults, or of all of them, in the order of its text."""
  known = range(len(faults.faults(source)))
  return sorted(random.Random(seed).sample(known, min(count, len(known))))


def run(values: flags.FlagValues) -> None:
  """Tries the faults and prints what was not noticed."""
  for module in values.modules:
    if module not in TESTS:
      raise ConfigError(f"--modules={module} is not one of {', '.join(TESTS)}")
  output, settings = epath.Path(values.output), {"seconds": values.seconds}
  known = [row for row in rows.read(output, settings, name=f"--output={values.output}") if _is_current(row)]
  if values.again:
    known = [row for row in known if row["noticed"] or row["module"] not in values.modules]
  writer = rows.Writer(output, settings, known)
  done = {(row["module"], row["place"]): row for row in known}
  wanted = []
  with tempfile.TemporaryDirectory(prefix="streamt1_jax_mutation_") as folder:
    for module in values.modules:
      source = _source(module)
      indices = drawn(source, values.faults, values.seed)
      names = [str(fault) for fault in faults.faults(source)]
      wanted += [(module, index) for index in indices]
      todo = [index for index in indices if (module, index) not in done]
      if not todo:
        continue
      with TestRuns(_ROOT, pathlib.Path(folder), values.seconds) as runs:
        tests = [f"tests/{name}_test.py" for name in TESTS[module]]
        runs.require_good(tests)
        for index in todo:
          command.raise_if_interrupted()
          noticed, seconds = runs.fails(f"streamt1_jax/{module}.py", faults.with_fault(source, index), tests)
          row = {"module": module, "source": _digest(source), "place": index, "fault": names[index]}
          row |= {"noticed": noticed, "seconds": seconds}
          writer.append(row)
          done[module, index] = row
          print(f"{'noticed' if noticed else 'MISSED '} {seconds:5.1f} s  {module}: {names[index]}", flush=True)
  _report([done[key] for key in wanted], values.share)


def _source(module: str) -> str:
  return (_ROOT / "streamt1_jax" / f"{module}.py").read_text(encoding="utf-8")


def _digest(source: str) -> str:
  return hashlib.sha256(source.encode()).hexdigest()[:12]


def _is_current(row: rows.Row) -> bool:
  return row["module"] in TESTS and row["source"] == _digest(_source(row["module"]))


def _report(tried: list[rows.Row], share: float) -> None:
  missed = [row for row in tried if not row["noticed"]]
  for row in missed:
    print(f"not noticed: {row['module']}: {row['fault']}")
  by_module = {}
  for row in tried:
    counts = by_module.setdefault(row["module"], {"faults": 0, "noticed": 0})
    counts["faults"] += 1
    counts["noticed"] += row["noticed"]
  noticed = 1 - len(missed) / len(tried)
  print(json.dumps({"faults": len(tried), "share": round(noticed, 3), "modules": by_module}), flush=True)
  if noticed < share:
    raise RunFailed(f"{noticed:.3f} of the faults were noticed, less than --share={share}")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
