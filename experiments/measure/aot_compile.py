"""Compiles the chunk step for TPUs that are not there, and reports what it would need of them; lowers it for GPUs.

  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --topology=v5e:2x4 --beam_size=2 --top_k=2
  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --topology=v6e:1x1
  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --topology=v5e:2x4 --mesh=candidate:2,model:4 \
    --rewards
  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --platform=cuda

prints a table and one JSON line. The program is the one that a search runs for every chunk but the first, or with
--first_chunk the one for that, or with --switch what a new prompt does between two, with the memory at its largest.
Weights, state and prompt are shapes without values. It needs `libtpu` and no TPU: `pip install -e '.[tpu]'`.

Without --decoding it decodes as a search would on such chips. Bytes are per chip, by the compiler's own account: what
the program is given (weights, state, prompt), what it returns besides the state, which it writes over the old one, and
what it needs in between. FLOP are counted from shapes.

Where there is no GPU the program is lowered for one, with attention by Triton, and not compiled: what it takes in
between is not known, and `fits` is null.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from etils import epath

from streamt1_jax.cli import command, device_flags, files, flag_types
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, SwitchConfig, choices, preset
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.measuring import compilation_report, compiled_step, tpu_compiler
from streamt1_jax.planning import request as requests
from streamt1_jax.planning.request import Request
from streamt1_jax.rewards.table import LEARNED_REWARDS, REWARDS


def define_flags(values: flags.FlagValues) -> None:
  """The program, what it is compiled for, and how devices are used."""
  flag_types.define_string(values, "checkpoint_preset", "wan_1_3b", "Model preset.")
  platform = "Compile for TPUs, or lower for one NVIDIA GPU."
  flag_types.define_choice(values, "platform", "tpu", ["tpu", "cuda"], platform)
  chips = "Chips, as in v6e:1x1, v5e:2x4, v5p:2x2x1, tpu7x:2x2x1."
  flag_types.define_string(values, "topology", "v5e:2x4", chips)
  flag_types.define_integer(values, "beam_size", 2, "Candidates per beam.")
  flag_types.define_integer(values, "top_k", 2, "Beams.")
  flag_types.define_integer(values, "max_sink_frames", 15, "Latent frames the sinks may grow to.")
  layers = "Blocks of the backbone, for a quick look; all by default."
  flag_types.define_integer(values, "num_layers", None, layers, 1)
  rewards = "Judge by HPSv3 and VideoAlign at full size, not by built-in rewards."
  flag_types.define_switch(values, "rewards", False, rewards)
  first = "The program of the first chunk, not that of every later one."
  flag_types.define_switch(values, "first_chunk", False, first)
  switch = "What a new prompt does between two chunks, recached so, and not a chunk."
  flag_types.define_choice(values, "switch", None, choices(SwitchConfig, "recache"), switch)
  flag_types.define_choice(values, "dtype", "bfloat16", ["float32", "bfloat16"], "Dtype of weights and activations.")
  of_rewards = "Dtype of --rewards; the model's by default."
  flag_types.define_choice(values, "reward_dtype", None, ["float32", "bfloat16", "int8"], of_rewards)
  flag_types.define_path(values, "hlo_file", None, "Where the compiled program is written, as text.")
  device_flags.define(values)


def _check(values: flags.FlagValues) -> None:
  if values.reward_dtype is not None and not values.rewards:
    raise ConfigError("--reward_dtype needs --rewards: built-in rewards have no weights")
  for name in ("topology", "mesh"):
    if values.platform == "cuda" and values[name].present:
      raise ConfigError(f"--platform=cuda lowers for one GPU and takes no --{name}")
  if values.switch is not None and values.first_chunk:
    raise ConfigError("--switch compiles what happens between two chunks: leave --first_chunk out")
  if values.hlo_file is not None:
    files.require_writable("hlo_file", values.hlo_file)


def _read_model(values: flags.FlagValues) -> tuple[ModelConfig, SearchConfig]:
  model = preset(values.checkpoint_preset)
  if values.num_layers is not None:
    model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, num_layers=values.num_layers))
  sizes = {name: values[name].value for name in ("beam_size", "top_k", "max_sink_frames")}
  search = SearchConfig.released(**sizes)
  search.validate_for(model)
  return model, search


def choose_decoding(
  values: flags.FlagValues, model: ModelConfig, search: SearchConfig, execution: Execution, limit: int | None
) -> Decoding:
  """--decoding, or the first way that fits a device of `limit` bytes, as a search chooses it; None for any size."""
  rewards = LEARNED_REWARDS if values.rewards else ()
  asked = Request(
    model=model,
    search=search,
    rewards={name: (REWARDS[name], REWARDS[name].make_config()) for name in rewards},
    dtype=jnp.dtype(values.dtype),
    reward_dtype=jnp.dtype(values.reward_dtype or values.dtype),
    execution=execution,
    kernel=requests.uses_kernel(execution.attention, values.platform, model.backbone.head_dim),
    decoding=values.decoding,
  )
  return requests.plan(asked, limit).chosen.decoding


def _settings(values: flags.FlagValues, model: ModelConfig) -> dict[str, Any]:
  return {
    "preset": model.name,
    "layers": model.backbone.num_layers,
    "beam_size": values.beam_size,
    "top_k": values.top_k,
    "max_sink_frames": values.max_sink_frames,
    "rewards": values.rewards,
    "reward_dtype": (values.reward_dtype or values.dtype) if values.rewards else None,
    "first_chunk": values.first_chunk,
    "switch": values.switch,
  }


def run(values: flags.FlagValues) -> None:
  """Compiles or lowers, and prints what was found."""
  _check(values)
  model, search = _read_model(values)
  settings = _settings(values, model)
  dtypes = jnp.dtype(values.dtype), jnp.dtype(settings["reward_dtype"]) if values.rewards else None
  switch = None if values.switch is None else SwitchConfig(recache=values.switch)
  build = lambda execution: dataclasses.replace(
    compiled_step.build(model, search, execution, *dtypes), first=values.first_chunk, switch=switch
  )
  if values.platform == "cuda":
    execution = Execution(None, values.attention or "triton")
    decoding = choose_decoding(values, model, search, execution, None)
    program = build(dataclasses.replace(execution, decoding=decoding))
    text, report = compiled_step.lower_for_cuda(program)
    report |= {"platform": "cuda", "mesh": None, "fits": None, "flop": compiled_step.count_flop(program)}
  else:
    device_flags.use_compilation_cache(values)
    devices = tpu_compiler.get_devices(values.topology)
    mesh = device_flags.make_mesh(values, model, search, devices=devices)
    execution = Execution(mesh, values.attention)
    limit = compilation_report.device_limit(devices[0].device_kind)
    decoding = choose_decoding(values, model, search, execution, limit)
    execution = dataclasses.replace(execution, decoding=decoding)
    program = build(execution)
    analysis = compiled_step.compile_and_analyse(program.placed(devices[0]))
    flop = compiled_step.count_flop(build(dataclasses.replace(execution, mesh=None)))
    text, report = analysis.text, {"topology": values.topology}
    report |= compilation_report.describe(program, devices, analysis, flop)
    print("\n".join(compilation_report.lines(report, analysis.collectives)))
  if values.hlo_file is not None and text is not None:
    epath.Path(values.hlo_file).write_text(text)
  print(json.dumps(settings | {"decoding": decoding} | report), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
