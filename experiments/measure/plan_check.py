"""Holds the memory plan of a search against every compilation that is recorded in the documentation.

  python -m experiments.measure.plan_check

prints a row for each: what the plan says for what the compiler said, in GiB. Nothing is compiled; it takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags

from streamt1_jax.cli import command, flag_types
from streamt1_jax.config import ConfigError
from streamt1_jax.io import markdown
from streamt1_jax.measuring import plan_check

_DEVICES = 8
_EVIDENCE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "evidence"


def define_flags(values: flags.FlagValues) -> None:
  """Where the recorded compilations are."""
  flag_types.define_path(values, "evidence_dir", str(_EVIDENCE), "Folder of compiled_slices.json.", url=False)


def run(values: flags.FlagValues) -> None:
  """Prints the table."""
  # Slices have up to eight devices that share a search. A process that has its devices keeps them.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", _DEVICES)
  if jax.device_count() < _DEVICES:
    raise ConfigError(f"this needs {_DEVICES} devices, such as those of JAX_PLATFORMS=cpu")
  read = lambda name: json.loads((pathlib.Path(values.evidence_dir) / f"{name}.json").read_text())
  slices = plan_check.of_slices(read("compiled_slices"))
  candidates = plan_check.of_candidates(read("memory_of_candidates"))
  print(markdown.table(plan_check.COLUMNS, (one.cells() for one in (*slices, *candidates))))


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
