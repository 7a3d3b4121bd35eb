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

import hashlib
import itertools
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from streamt1_jax.cli import command, flag_types
from streamt1_jax.config import ConfigError, ModelConfig, preset
from streamt1_jax.io import manifest, part_files
from streamt1_jax.measuring import full_size_checks, published_sources, stages
from streamt1_jax.measuring.published_sources import Source

CHECKPOINT = "checkpoint"
CHECKS = ("restore_backbone", "encode_prompt", "search")
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
  flag_types.define_choice(values, "check", None, CHECKS, check)


def run_check(values: flags.FlagValues) -> None:
  """One check, in this process; the last line on stdout is its result in JSON."""
  folder, dtype = pathlib.Path(values.work_dir) / CHECKPOINT, jnp.dtype(values.dtype)
  if values.check == "search":
    size = (values.latent_height, values.latent_width)
    result = full_size_checks.search(folder, dtype, size, values.chunks)
  else:
    result = getattr(full_size_checks, values.check)(folder, preset(values.model), dtype)
  print(json.dumps({**result, "environment": manifest.environment()}))


def convert_source(values: flags.FlagValues, source: Source, output: pathlib.Path) -> dict[str, Any]:
  """Writes a source, converts it into the folder `output`, and deletes it."""
  start, path = time.perf_counter(), pathlib.Path(values.work_dir) / source.name
  try:
    source.write(path)
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
  written = {"written_bytes": stages.disk_bytes(path), "write_seconds": time.perf_counter() - start}
  arguments = [argument.format(path=path) for argument in source.arguments]
  command_line = ["-m", "streamt1_jax", "convert", f"--model={values.model}", f"--output={output}", *arguments]
  stage = f"convert {source.name}"
  result = stages.measure(stage, [*command_line, f"--dtype={values.dtype}"], output / source.part)
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  return result | written


def weight_checksums(part: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file with weights in a converted part."""
  files = part_files.read_part_file(epath.Path(part))["files"]
  return {name: entry["sha256"] for name, entry in files.items() if "/" in name}


def convert_all(values: flags.FlagValues, chosen: Sequence[Source]) -> Iterator[dict[str, Any]]:
  """Results of all conversions. Raises ConfigError if flavours that hold the same weights become different parts."""
  seen: dict[tuple[str, bool], tuple[str, dict[str, str]]] = {}
  for source in chosen:
    output = pathlib.Path(values.work_dir) / (CHECKPOINT if source.final else f"{source.name}_converted")
    result = convert_source(values, source, output)
    checksums = weight_checksums(output / source.part)
    yield result | {"weights_sha256": hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()}
    first, expected = seen.setdefault((source.part, source.with_adapter), (source.name, checksums))
    if checksums != expected:
      raise ConfigError(f"{source.name} and {first} hold the same weights, but became different {source.part} parts")
    if not source.final:
      shutil.rmtree(output)


def run_checks(values: flags.FlagValues) -> Iterator[dict[str, Any]]:
  """Results of all checks of the converted checkpoint."""
  same = [f"--{name}={values[name].value}" for name in _OF_CHECKS]
  for check in CHECKS:
    command_line = ["-m", "experiments.measure.full_size_check", *same, f"--check={check}"]
    yield stages.measure(check.replace("_", " "), command_line)


def choose_sources(values: flags.FlagValues, model: ModelConfig) -> list[Source]:
  """The sources of the flag, in the order of `sources`; all if it is not given."""
  known = published_sources.sources(model)
  unknown = sorted(set(values.sources or ()) - {source.name for source in known})
  if unknown:
    raise ConfigError(f"--sources: {unknown[0]!r} is not one of {', '.join(source.name for source in known)}")
  return [source for source in known if not values.sources or source.name in values.sources]


def prepare(folder: pathlib.Path, model: ModelConfig) -> None:
  """Raises ConfigError unless the work can be done in `folder`."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
      raise ConfigError(f"--work_dir={folder} is not empty")
  except OSError as error:
    raise ConfigError(f"--work_dir={folder} cannot be used: {error.strerror}") from error
  needed, free = published_sources.bytes_at_worst(model), shutil.disk_usage(folder).free
  if free < needed:
    raise ConfigError(f"--work_dir={folder} has {free / 1e9:.0f} GB free, the check needs {needed / 1e9:.0f}")


def run(values: flags.FlagValues) -> None:
  """Converts and checks, with a row of the table for each stage as soon as it is through."""
  if values.check is not None:
    run_check(values)
    return
  # The accelerator belongs to the processes that this one starts.
  jax.config.update("jax_platforms", "cpu")
  model, folder = preset(values.model), pathlib.Path(values.work_dir)
  chosen = choose_sources(values, model)
  prepare(folder, model)
  results = []
  try:
    complete = {source.part for source in chosen if source.final} == {"backbone", "codec", "text"}
    print(stages.head())
    for result in itertools.chain(convert_all(values, chosen), run_checks(values) if complete else ()):
      print(stages.row(result), flush=True)
      results.append(result)
  finally:
    if not values.keep:
      for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
  settings = {name: values[name].value for name in _OF_CHECKS if name != "work_dir"}
  print(json.dumps({**settings, "stages": results}))


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
