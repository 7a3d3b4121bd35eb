"""From published files to a searched video, at full size, with random weights: seconds, memory and disk of every stage.

  python -m experiments.measure.full_size_check --work_dir=/scratch/check
  python -m experiments.measure.full_size_check --work_dir=/scratch/check --latent_height=60 --latent_width=104

No real checkpoint is needed: every file (`streamt1_jax.measuring.published_sources`) has the names, shapes, dtypes and
format of a published one, and values of N(0, 0.02). Each is written, converted and deleted; two flavours of one part
must become the same files, byte by byte. Then the parts are restored, a prompt is encoded, and chunks are searched.

Every conversion and check runs in a process of its own, so that its peak memory is its own. The program prints a table,
then one line of JSON.
Disk: 51 GB at the worst moment, all of it in `work_dir`, which must be empty and is left so unless --keep is given.
Memory: the search needs most; 10.4 GB on a CPU at the default size. `--model=tiny` does the same in a minute or two.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from streamt1_jax.cli import command, flag_types
from streamt1_jax.config import preset
from streamt1_jax.io import manifest
from streamt1_jax.measuring import full_size_checks, full_size_stages, published_sources, stages

_OF_CHECKS = ("model", "work_dir", "latent_height", "latent_width", "chunks", "dtype")


def define_flags(values: flags.FlagValues) -> None:
  """The sizes, the folder, and how much is done."""
  models = sorted(published_sources.LORA_RANKS)
  flag_types.define_choice(values, "model", "wan_1_3b", models, "Preset that gives the sizes.")
  work = "Folder for all files; must be empty or missing."
  flag_types.define_path(values, "work_dir", None, work, required=True, url=False)
  flag_types.define_integer(values, "latent_height", 6, "Rows of the latent (60 for 480 pixels).", 2)
  flag_types.define_integer(values, "latent_width", 8, "Columns of the latent (104 for 832 pixels).", 2)
  flag_types.define_integer(values, "chunks", 1, "Chunks to search.", 1)
  flag_types.define_choice(values, "dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of weights and activations.")
  flag_types.define_switch(values, "keep", False, "Leave the converted checkpoint.")
  chosen = "Names of files to convert; all by default, and then all is checked."
  flag_types.define_list(values, "sources", None, chosen)
  check = "Used by the program itself: run one check on what is in work_dir."
  flag_types.define_choice(values, "check", None, list(full_size_checks.CHECKS), check)


def run_check(values: flags.FlagValues) -> None:
  """One check, in this process; the last line on stdout is its result in JSON."""
  folder = pathlib.Path(values.work_dir) / full_size_stages.CHECKPOINT
  size = (values.latent_height, values.latent_width)
  checked = full_size_checks.Checked(folder, preset(values.model), jnp.dtype(values.dtype), size, values.chunks)
  result = full_size_checks.CHECKS[values.check](checked)
  print(json.dumps({**result, "environment": manifest.environment()}))


def run(values: flags.FlagValues) -> None:
  """Converts and checks, with a row of the table for each stage as soon as it is through."""
  if values.check is not None:
    run_check(values)
    return
  # The accelerator belongs to the processes that this one starts.
  jax.config.update("jax_platforms", "cpu")
  model, folder = preset(values.model), pathlib.Path(values.work_dir)
  chosen = full_size_stages.choose_sources(values.sources, model)
  full_size_stages.prepare(folder, model)
  same = [f"--{name}={values[name].value}" for name in _OF_CHECKS]
  checks = full_size_stages.run_checks(["-m", "experiments.measure.full_size_check", *same])
  conversions = full_size_stages.convert_all(full_size_stages.Work(folder, values.model, values.dtype), chosen)
  results = []
  try:
    print(stages.head())
    for result in itertools.chain(conversions, checks if full_size_stages.is_complete(chosen) else ()):
      print(stages.row(result), flush=True)
      results.append(result)
  finally:
    if not values.keep:
      full_size_stages.clear(folder)
  settings = {name: values[name].value for name in _OF_CHECKS if name != "work_dir"}
  print(json.dumps({**settings, "stages": results}))


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
