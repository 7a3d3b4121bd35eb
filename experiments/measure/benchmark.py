"""Measures a whole search: work per second, against the machine's own matrix-product rate in the same run.

  python -m experiments.measure.benchmark --preset=bench_mid --beam_size=2 --top_k=2 --chunks=7
  python -m experiments.measure.benchmark --preset=bench_mid --mesh=data:2,candidate:4
  python -m experiments.measure.benchmark --preset=bench_mid --top_k=1 --live_bytes
  python -m experiments.measure.benchmark --preset=bench_mid --scaling
  python -m experiments.measure.benchmark --reward_dir=checkpoints/tiny/rewards/hpsv3

The first two print one JSON line. The third prints a table of what candidates cost in memory
(`search_speed.memory_rows`). The fourth prints tables of what grows with candidates, beams and the length of a video,
and what does not (`scaling.measure`), and a JSON line of their figures. The last prints a table of what judging a
candidate costs (`reward_speed.measure`). A mesh that divides prompts searches one on each part, and the work is that of
all of them.

All but the last have random weights, latents instead of frames, and rewards that cost nothing, so that what is measured
is the search itself: denoising, memory, pruning. Model FLOP are counted from shapes (2 per multiply-add), for the
forwards that the search really makes and the keys that are really visible.
"""

import json
import sys
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from absl import flags

from streamt1_jax.cli import command, device_flags, flag_types
from streamt1_jax.config import ConfigError, SearchConfig, preset
from streamt1_jax.data import shapes
from streamt1_jax.execution import Execution
from streamt1_jax.measuring import random_search, reward_speed, scaling, search_speed
from streamt1_jax.rewards import folder

# The flags that have no say in the table another flag asks for.
_IGNORED = {
  "reward_dir": ("scaling", "live_bytes", "preset", "chunks", "max_sink_frames", "append_always"),
  "scaling": ("live_bytes", "beam_size", "top_k", "chunks", "repeats", "append_always"),
  "live_bytes": ("beam_size", "chunks", "repeats"),
}


def define_flags(values: flags.FlagValues) -> None:
  """The search, what is reported, and how devices are used."""
  flag_types.define_string(values, "preset", "bench_mid", "Model preset.")
  flag_types.define_integer(values, "beam_size", 2, "Candidates per beam.")
  flag_types.define_integer(values, "top_k", 2, "Beams.")
  flag_types.define_integer(values, "chunks", 7, "Chunks of the video.")
  flag_types.define_integer(values, "max_sink_frames", 9, "Latent frames the sinks may grow to.")
  flag_types.define_integer(values, "repeats", 2, "Timed searches; the fastest counts.", 1)
  append = "Route every chunk to a new sink: the largest memory."
  flag_types.define_switch(values, "append_always", False, append)
  device_flags.define_dtype(values, ["float32", "bfloat16"], "Compute dtype.")
  live = "Report bytes at 1, 4 and 8 candidates per beam instead."
  flag_types.define_switch(values, "live_bytes", False, live)
  flag_types.define_path(values, "reward_dir", None, "Report what this small reward costs instead.")
  grows = "Report what grows with candidates, beams and chunks instead."
  flag_types.define_switch(values, "scaling", False, grows)
  device_flags.define(values)


def refuse_ignored_flags(values: flags.FlagValues) -> None:
  """Raises ConfigError for flags that have no say in what was asked for."""
  for table, ignored in _IGNORED.items():
    given = [name for name in ignored if values[name].present]
    if values[table].value and given:
      raise ConfigError(f"--{table} takes no --{', --'.join(given)}")


def print_table(rows: Sequence[Mapping[str, float]]) -> None:
  """For people: 17 characters a column."""
  show = lambda cell: f"{cell:>17,}" if isinstance(cell, int) else f"{cell:>17.4g}"
  print("  ".join(f"{name:>17}" for name in rows[0]))
  for row in rows:
    print("  ".join(map(show, row.values())), flush=True)


def run(values: flags.FlagValues) -> None:
  """Measures what the flags ask for, and prints it."""
  refuse_ignored_flags(values)
  dtype = jnp.dtype(device_flags.use_dtype(values.dtype))
  if values.reward_dir is not None:
    spec, _ = folder.load_config(values.reward_dir)
    loaded = folder.load_reward(values.reward_dir, fps=shapes.FPS, dtype=dtype)
    print_table(reward_speed.measure(spec, loaded, dtype, values.top_k, values.beam_size, values.repeats))
    return
  model = preset(values.preset)
  sizes = {name: values[name].value for name in ("beam_size", "top_k", "max_sink_frames")}
  search = SearchConfig.released(**sizes)
  search.validate_for(model)
  longest = model.max_chunks
  if not 1 <= values.chunks <= longest:
    raise ConfigError(f"--chunks must be in 1..{longest} (rotary tables), got {values.chunks}")
  device_flags.use_compilation_cache(values)
  mesh = device_flags.make_mesh(values, model, search)
  for name in ("live_bytes", "scaling"):
    if values[name].value and mesh is not None:
      raise ConfigError(f"--{name} takes one device: --mesh=data:1")
  # There are no frames, so every way takes the same memory, and the first one always fits.
  execution = Execution(mesh, values.attention, values.decoding or "together")
  if values.scaling:
    tables = {}
    for name, rows in scaling.measure(model, execution, dtype, values.max_sink_frames):
      tables[name] = rows
      print_table(rows)
    print(json.dumps({"preset": model.name} | tables), flush=True)
    return
  built = random_search.build(model, execution, dtype, values.chunks, values.append_always)
  if values.live_bytes:
    print_table(search_speed.memory_rows(built, search))
    return
  report = {"preset": model.name, "candidates": search.num_candidates, "chunks": values.chunks}
  measured = search_speed.measure(built, search, dtype, values.chunks, values.repeats)
  print(json.dumps(report | measured), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
