"""Compiles the chunk step for TPUs that are not there, and reports what it would need of them; lowers it for GPUs.

  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --topology=v5e:2x4 --beam_size=2 --top_k=2
  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --topology=v6e:1x1 --decoding=twice
  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --topology=v5e:2x4 --mesh=candidate:2,model:4 \
    --rewards
  python -m experiments.measure.aot_compile --checkpoint_preset=wan_1_3b --platform=cuda

prints a table and one JSON line. The program is the one that a search runs for every chunk but the first, with the
memory at its largest; weights, state and prompt are shapes without values. Needs `libtpu` (`pip install -e '.[tpu]'`)
and no TPU.

Bytes are per chip, by the compiler's own account: what the program is given (weights, state, prompt), what it returns
besides the state, which it writes over the old one, and what it needs in between. FLOP are counted from shapes.

For a GPU that is not there the program is lowered, with attention by Triton, and not compiled: what it takes in between
is not known, and `fits` is null.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from absl import flags
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from streamt1_jax import drivers
from streamt1_jax.backbone.dit import CausalWanDiT, TextMemory
from streamt1_jax.chunk_step import Models, chunk_step, init_state
from streamt1_jax.cli import common, device_flags
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.codec.streaming import StreamingDecoder
from streamt1_jax.codec.vae import VideoDecoder
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, preset
from streamt1_jax.execution import Execution
from streamt1_jax.measuring import flop_count, hlo_collectives, tpu_compiler
from streamt1_jax.measuring.hlo_collectives import Collective
from streamt1_jax.noise_propagation import gaussian_noise
from streamt1_jax.parallel.sharding import ARRAYS, RULES, placed
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.table import DEFAULT_REWARDS, REWARDS
from streamt1_jax.state import Condition, SearchState

_PRESET = flags.DEFINE_string("checkpoint_preset", "wan_1_3b", "Model preset.")
_PLATFORM = flags.DEFINE_enum("platform", "tpu", ["tpu", "cuda"], "Compile for TPUs, or lower for one NVIDIA GPU.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "Chips, as in v6e:1x1, v5e:2x4, v5p:2x2x1, tpu7x:2x2x1.")
_BEAM_SIZE = common.define_integer("beam_size", 2, "Candidates per beam.")
_TOP_K = common.define_integer("top_k", 2, "Beams.")
_MAX_SINK_FRAMES = common.define_integer("max_sink_frames", 15, "Latent frames the sinks may grow to.")
_NUM_LAYERS = common.define_integer("num_layers", None, "Blocks of the backbone, for a quick look; all by default.", 1)
_FULL_SIZE = ("hpsv3", "videoalign")
_REWARD_AXES = tuple(axes for name in _FULL_SIZE for axes in REWARDS[name].axes)
_REWARDS = flags.DEFINE_bool("rewards", False, "Judge by HPSv3 and VideoAlign at full size, not by built-in rewards.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of weights and activations.")
_REWARD_DTYPE = flags.DEFINE_enum(
  "reward_dtype", None, ["float32", "bfloat16", "int8"], "Of --rewards; the model's by default."
)
_HLO_FILE = common.define_path("hlo_file", None, "Where the compiled program is written, as text.")
flags.adopt_module_key_flags(device_flags)

GIB = 1 << 30
_TRITON_CALL = "__gpu$xla.gpu.triton"
# By the compiler's own message when a program does not fit: what is left of the chip's memory for programs.
_DEVICE_GIB = {"TPU v4": 15.25, "TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24, "TPU7x": 94.74}
PHASES = ("evict", "denoise", "judge", "prune", "commit")


@dataclasses.dataclass(frozen=True)
class Program:
  """A chunk step and the shapes it is compiled for.

  Attributes:
    models: static half of the step.
    search: the search.
    params: shapes of all weights.
    state: shape of the state.
    condition: shape of the prompt.
  """

  models: Models
  search: SearchConfig
  params: dict[str, Any]
  state: SearchState
  condition: Condition

  def on(self, place: Any) -> Program:
    """The same with every shape placed by `place(name, tree)`."""
    return dataclasses.replace(
      self,
      params={name: place(name, part) for name, part in self.params.items()},
      state=place("state", self.state),
      condition=place("condition", self.condition),
    )


def build(model: ModelConfig, search: SearchConfig, mesh: Mesh | None, dtype: jnp.dtype) -> Program:
  """The program for a mesh, its shapes not yet placed; with a prompt axis if the mesh divides prompts."""
  cast = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
  backbone, backbone_params = nnx.split(nnx.eval_shape(lambda: CausalWanDiT(model, nnx.Rngs(0))), nnx.Param)
  attention = device_flags.ATTENTION.value or ("triton" if _PLATFORM.value == "cuda" else None)
  decoding = device_flags.DECODING.value or "in_turn"
  if model.codec is None:
    codec, codec_params = LatentCodec(model.latent_shape[1:]), {}
  else:
    decoder, codec_params = nnx.split(nnx.eval_shape(lambda: VideoDecoder(model.codec, rngs=nnx.Rngs(0))), nnx.Param)
    size = model.latent_height, model.latent_width
    codec = StreamingDecoder(decoder, model.codec, size, frame_by_frame=decoding != "together")
    codec_params = nnx.to_pure_dict(codec_params)
  image, video, reward_params, reward_conditions = _rewards(model, jnp.dtype(_REWARD_DTYPE.value or dtype))
  models = Models(
    config=model,
    backbone=backbone,
    codec=codec,
    image_reward=image,
    video_reward=video,
    draw_noise=gaussian_noise(model.latent_shape, len(model.schedule.denoising_steps)),
    execution=Execution(mesh=mesh, attention=attention, decoding=decoding),
  )
  params = {"backbone": cast(nnx.to_pure_dict(backbone_params)), "codec": cast(codec_params), **reward_params}
  b = model.backbone
  text = jax.ShapeDtypeStruct((b.num_layers, b.num_heads, b.text_len, b.head_dim), dtype)
  condition = Condition(TextMemory(text, text), *reward_conditions, jax.ShapeDtypeStruct((), jnp.int32))
  alone = dataclasses.replace(models, execution=Execution())
  state = jax.eval_shape(lambda params: init_state(alone, params, search, 0), params)
  program = Program(models, search, params, state, condition)
  prompts = 1 if mesh is None else mesh.shape[RULES["prompt"]]
  return program if prompts == 1 else _with_prompts(program, prompts)


def _rewards(model: ModelConfig, dtype: jnp.dtype) -> tuple[Any, Any, dict[str, Any], list[Any]]:
  """Image and video reward, and the shapes of their weights and conditions."""
  if not _REWARDS.value:
    rewards = [REWARDS[name].make(None, model.fps) for name in DEFAULT_REWARDS]
    return *rewards, {"image_reward": {}, "video_reward": {}}, [{}, {}]
  specs = [REWARDS[name] for name in _FULL_SIZE]
  params = [loading.without_table(spec.abstract_params(spec.config_type(), dtype)) for spec in specs]
  return (
    *(spec.make(spec.config_type(), model.fps) for spec in specs),
    dict(zip(("image_reward", "video_reward"), params, strict=True)),
    [tpu_compiler.prompt_shapes(spec, dtype) for spec in specs],
  )


def _with_prompts(program: Program, prompts: int) -> Program:
  """The same program for several prompts at once."""
  lead = lambda x: jax.ShapeDtypeStruct((prompts, *x.shape), x.dtype)
  state, condition = jax.tree.map(lead, (program.state, program.condition))
  return dataclasses.replace(
    program,
    state=state._replace(chunk_index=program.state.chunk_index, num_past=program.state.num_past),
    condition=condition._replace(num_chunks=program.condition.num_chunks),
  )


def place_on(mesh: Mesh | None, device: jax.Device, prompts: bool) -> Any:
  """Gives trees of shapes their shardings on a mesh, or on one device where there is none."""
  if mesh is None:
    alone = SingleDeviceSharding(device)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone)
    return lambda name, tree: jax.tree.map(shape, tree)
  of_prompts = lambda name: ("prompt",) if prompts and name in ("state", "condition") else ()
  patterns = {name: _REWARD_AXES if name.endswith("_reward") else name for name in ARRAYS}
  return lambda name, tree: placed(mesh, patterns[name], tree, leading=of_prompts(name))


def count_flop(program: Program) -> float:
  """FLOP of one chunk of one prompt, all candidates and beams."""
  models = dataclasses.replace(program.models, execution=Execution(attention="flash", decoding="in_turn"))

  def step(params, state, condition):
    return chunk_step(params, state, condition, models, program.search, first=False)

  return flop_count.count(jax.make_jaxpr(step)(program.params, program.state, program.condition))


def lower_for_cuda(program: Program) -> dict[str, Any]:
  """The JSON line of a program that is lowered for one NVIDIA GPU."""
  step = functools.partial(chunk_step, models=program.models, search=program.search, first=False)
  arguments = program.params, program.state, program.condition
  began = time.perf_counter()
  # Exported programs are meant to be kept for years, which Triton's call does not promise.
  unstable = [jax.export.DisabledSafetyCheck.custom_call(_TRITON_CALL)]
  jitted = jax.jit(step, donate_argnums=1)
  text = jax.export.export(jitted, platforms=["cuda"], disabled_checks=unstable)(*arguments).mlir_module()
  seconds = time.perf_counter() - began
  if _HLO_FILE.value:
    epath.Path(_HLO_FILE.value).write_text(text)
  return _settings(program) | {
    "platform": "cuda",
    "mesh": None,
    "attention": program.models.execution.attention,
    "attention_calls": text.count(f"custom_call @{_TRITON_CALL}("),
    "argument_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments)),
    "fits": None,
    "flop": count_flop(program),
    "lower_seconds": round(seconds, 1),
  }


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What the compiler says of a program, per device; only `peak` is known of one that does not fit.

  Attributes:
    peak: bytes of all below together.
    arguments: bytes of weights, state and prompt.
    outputs: bytes of results that do not take the place of arguments.
    temporaries: bytes needed in between, the code included.
    collectives: what devices send each other; None too where jaxlib cannot read the compiled program.
    seconds: spent in the compiler.
  """

  peak: int
  arguments: int | None
  outputs: int | None
  temporaries: int | None
  collectives: list[Collective] | None
  seconds: float


def compile_and_analyse(program: Program) -> Analysis:
  """Compiles a program whose shapes are placed."""
  began = time.perf_counter()
  arguments = program.params, program.state, program.condition
  lowered = drivers.jitted_chunk_step.lower(*arguments, program.models, program.search, first=False)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)", str(error))
    if needed is None:
      raise
    # What takes the most, with where it comes from.
    print(str(error), file=sys.stderr, flush=True)
    peak = int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))
    return Analysis(peak, None, None, None, None, time.perf_counter() - began)
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    # A compiler newer than jaxlib may use operations that jaxlib does not know; the sizes are known all the same.
    print(f"the compiled program cannot be read, nor what devices send: {error}", file=sys.stderr, flush=True)
    text = None
  if _HLO_FILE.value and text is not None:
    epath.Path(_HLO_FILE.value).write_text(text)
  mesh = program.models.execution.mesh
  sizes = {"none": 1} if mesh is None else dict(mesh.shape)
  return Analysis(
    peak=memory.argument_size_in_bytes + outputs + temporaries,
    arguments=memory.argument_size_in_bytes,
    outputs=outputs,
    temporaries=temporaries,
    collectives=None if text is None else hlo_collectives.find(text, sizes, PHASES),
    seconds=seconds,
  )


def describe(program: Program, devices: list[jax.Device], analysis: Analysis, flop: float) -> dict[str, Any]:
  """The JSON line."""
  mesh = program.models.execution.mesh
  # Chips with two cores show as two devices of one place.
  cores = len(devices) // len({tuple(device.coords) for device in devices})
  limit = int(_DEVICE_GIB[devices[0].device_kind] * GIB)
  report = _settings(program) | {
    "topology": _TOPOLOGY.value,
    "chip": devices[0].device_kind,
    "mesh": None if mesh is None else dict(mesh.shape),
    "hbm_peak_bytes_per_chip": analysis.peak * cores,
    "hbm_limit_bytes": limit * cores,
    "fits": analysis.arguments is not None and analysis.peak <= limit,
    "argument_bytes": _times(analysis.arguments, cores),
    "output_bytes": _times(analysis.outputs, cores),
    "temporary_bytes": _times(analysis.temporaries, cores),
    "flop": flop * (1 if mesh is None else mesh.shape[RULES["prompt"]]),
    "collectives": None,
    "compile_seconds": round(analysis.seconds, 1),
  }
  if analysis.collectives is not None:
    report |= {"collectives": hlo_collectives.by_kind(analysis.collectives)} | _in_blocks(program, analysis.collectives)
  return report


def _settings(program: Program) -> dict[str, Any]:
  return {
    "preset": program.models.config.name,
    "layers": program.models.config.backbone.num_layers,
    "beam_size": program.search.beam_size,
    "top_k": program.search.top_k,
    "max_sink_frames": program.search.max_sink_frames,
    "rewards": _REWARDS.value,
    "reward_dtype": (_REWARD_DTYPE.value or _DTYPE.value) if _REWARDS.value else None,
    "decoding": program.models.execution.decoding,
  }


def _times(number: int | None, factor: int) -> int | None:
  return None if number is None else number * factor


def _in_blocks(program: Program, collectives: list[Collective]) -> dict[str, Any]:
  """What the targets speak of: activation-sized collectives per block, and any between candidates while denoising."""
  model = program.models.config
  denoising = [one for one in collectives if one.phase == "denoise"]
  passes = len(model.schedule.denoising_steps) * model.backbone.num_layers
  one_candidate = model.chunk_tokens * model.backbone.dim * 2
  mesh = program.models.execution.mesh
  part = one_candidate // (1 if mesh is None else mesh.shape[RULES["patch"]])
  in_blocks = [one for one in denoising if one.executions >= model.backbone.num_layers]
  large = sum(one.executions for one in in_blocks if one.bytes >= part // 2) / passes
  between = sum(one.executions for one in denoising if {"beam", "sibling"} & set(one.axes.split("+")))
  return {"activation_collectives_per_block": large, "candidate_collectives_in_denoising": between}


def print_tables(report: dict[str, Any], collectives: list[Collective] | None) -> None:
  """For people: memory, then what is sent, by phase and axis."""
  for name in ("argument_bytes", "output_bytes", "temporary_bytes", "hbm_peak_bytes_per_chip", "hbm_limit_bytes"):
    if report[name] is not None:
      print(f"{name:<26}{report[name] / GIB:10.2f} GiB")
  print(f"{'fits':<26}{'yes' if report['fits'] else 'no':>10}")
  print(f"{'flop of a chunk':<26}{report['flop'] / 1e12:10.1f} TFLOP")
  print(f"{'compile_seconds':<26}{report['compile_seconds']:10.1f} s")
  for one in sorted(collectives or [], key=lambda one: -one.bytes * one.executions):
    print(f"{one.phase or 'elsewhere':<10}{one.axes:<16}{one.kind:<20}{one.bytes:>14,} bytes{one.executions:>7,} times")


def _refuse_flags_of_tpus() -> None:
  for name in ("topology", "mesh"):
    if flags.FLAGS[name].present:
      raise ConfigError(f"--platform=cuda lowers for one GPU and takes no --{name}")


def main() -> None:
  if _REWARD_DTYPE.value is not None and not _REWARDS.value:
    raise ConfigError("--reward_dtype needs --rewards: built-in rewards have no weights")
  if _HLO_FILE.value:
    common.require_writable("hlo_file", _HLO_FILE.value)
  model = preset(_PRESET.value)
  if _NUM_LAYERS.value is not None:
    backbone = dataclasses.replace(model.backbone, num_layers=_NUM_LAYERS.value)
    model = dataclasses.replace(model, backbone=backbone)
  search = SearchConfig.released(beam_size=_BEAM_SIZE.value, top_k=_TOP_K.value, max_sink_frames=_MAX_SINK_FRAMES.value)
  search.validate_for(model)
  dtype = jnp.dtype(_DTYPE.value)
  if _PLATFORM.value == "cuda":
    _refuse_flags_of_tpus()
    print(json.dumps(lower_for_cuda(build(model, search, None, dtype))), flush=True)
    return
  device_flags.use_compilation_cache()
  devices = tpu_compiler.get_devices(_TOPOLOGY.value)
  mesh = device_flags.make_mesh(model, search, devices=devices)
  program = build(model, search, mesh, dtype)
  prompts = mesh is not None and mesh.shape[RULES["prompt"]] > 1
  analysis = compile_and_analyse(program.on(place_on(mesh, devices[0], prompts)))
  flop = count_flop(build(model, search, None, dtype))
  report = describe(program, devices, analysis, flop)
  print_tables(report, analysis.collectives)
  print(json.dumps(report), flush=True)


if __name__ == "__main__":
  common.run(main)
