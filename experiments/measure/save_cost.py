"""What saving a search costs: time on this machine, and bytes by shapes for the models of the presets.

  python -m experiments.measure.save_cost --save_every=5

searches the same video with and without saves, in turn, and prints one JSON line: seconds and CPU seconds (of all
threads) of a chunk both ways and what the saves add, as a share (`overhead`), and as the share it is where searches are
saved once a minute, as they are without the flag (`overhead_by_default`); the same of one save that nothing runs beside
(`save`, with the part `copy` that a search waits for); and bytes. On a machine that others use, CPU seconds say more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from absl import flags

from streamt1_jax.cli import command, files, flag_types, stopped_searches
from streamt1_jax.config import ConfigError
from streamt1_jax.measuring import saves
from streamt1_jax.pipeline import Pipeline

_PROMPT = "a red circle moves left over a dark blue background"
_SAVE_EVERY = 5


def define_flags(values: flags.FlagValues) -> None:
  """The model, the length, and how often is saved."""
  flag_types.define_checkpoint(values, "Folder of the model whose searches are timed")
  chunks = "Chunks of a search; the first two compile."
  flag_types.define_integer(values, "chunks", 21, chunks, saves.COMPILING + 1)
  repeats = "Searches with saves, and as many without."
  flag_types.define_integer(values, "repeats", 5, repeats, 1)
  stopped_searches.define(values)


def run(values: flags.FlagValues) -> None:
  """Measures and prints."""
  every = _SAVE_EVERY if values.save_every is None else values.save_every
  if not every:
    raise ConfigError("--save_every=0 saves nothing, so there is nothing to measure")
  if every > values.chunks:
    raise ConfigError(f"--save_every={every} is more than --chunks={values.chunks}: nothing would be saved")
  pipeline = Pipeline.load(files.find_checkpoint(values.checkpoint))
  inputs = pipeline, pipeline.condition(_PROMPT, values.chunks), values.chunks, every
  report = {"save_every": every, "chunks": values.chunks}
  report |= saves.time_searches(*inputs, values.repeats, stopped_searches.DEFAULT_SECONDS)
  report |= saves.time_saves(*inputs)
  by_shapes = {name: saves.state_bytes(name) for name in saves.PRESETS}
  print(json.dumps(report | {"bytes_by_shapes": by_shapes}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
