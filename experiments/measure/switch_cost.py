"""Measures what a new prompt in the middle of a video costs, in the time of a chunk of the same search.

  python -m experiments.measure.switch_cost --preset=bench_mid
  python -m experiments.measure.switch_cost --preset=bench_mid --beam_size=1 --top_k=1 --max_sink_frames=3

Prints one JSON line. Weights are random and rewards cost nothing, so that a chunk is denoising and memory alone.
"""

import json
import sys
from collections.abc import Sequence
from typing import get_args, get_type_hints

import jax.numpy as jnp
from absl import flags

from streamt1_jax.cli import command, device_flags, flag_types
from streamt1_jax.config import SearchConfig, SwitchConfig, preset
from streamt1_jax.execution import Execution
from streamt1_jax.measuring import random_search, switch_cost


def define_flags(values: flags.FlagValues) -> None:
  """The search that is interrupted."""
  flag_types.define_string(values, "preset", "bench_mid", "Model preset.")
  flag_types.define_integer(values, "beam_size", 2, "Candidates per beam.")
  flag_types.define_integer(values, "top_k", 2, "Beams.")
  flag_types.define_integer(values, "max_sink_frames", 9, "Latent frames the sinks may grow to.")
  flag_types.define_integer(values, "repeats", 3, "Timed rounds; the fastest counts.", 1)
  device_flags.define_dtype(values, ["float32", "bfloat16"], "Compute dtype.")


def run(values: flags.FlagValues) -> None:
  """Measures every way to recache, and prints it."""
  model, dtype = preset(values.preset), jnp.dtype(device_flags.use_dtype(values.dtype))
  sizes = {name: values[name].value for name in ("beam_size", "top_k", "max_sink_frames")}
  search = SearchConfig.released(**sizes)
  search.validate_for(model)
  built = random_search.build(model, Execution(), dtype, model.max_chunks, append_always=True)
  recaches = get_args(get_type_hints(SwitchConfig)["recache"])
  switches = [SwitchConfig(recache=recache) for recache in recaches] + [SwitchConfig(sinks="recache")]
  report = (
    {"preset": model.name, "dtype": dtype.name} | sizes | switch_cost.measure(built, search, switches, values.repeats)
  )
  print(json.dumps(report), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
