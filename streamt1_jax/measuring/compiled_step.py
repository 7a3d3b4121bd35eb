"""Chunk steps and new prompts compiled for TPUs that are not there, or lowered for a GPU, and what compilers say."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from streamt1_jax import drivers
from streamt1_jax.backbone.dit import TextMemory
from streamt1_jax.between_chunks import switch_prompt
from streamt1_jax.chunk_step import chunk_step
from streamt1_jax.config import ModelConfig, SearchConfig, SwitchConfig, required
from streamt1_jax.execution import Execution
from streamt1_jax.generator import Models
from streamt1_jax.measuring import flop_count, hlo_collectives, tpu_compiler
from streamt1_jax.measuring.hlo_collectives import Collective
from streamt1_jax.measuring.random_search import ConstantReward
from streamt1_jax.models import abstract_params, make_models
from streamt1_jax.parallel.sharding import LAYOUTS, RULES, placed
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.table import DEFAULT_REWARDS, PUBLISHED_REWARDS, REWARDS
from streamt1_jax.state import Condition, SearchState, init_state
from streamt1_jax.typing import Device, Params

PHASES = ("open", "propose", "denoise", "judge", "select", "prune", "commit")
"""Scopes of the chunk step."""
_TRITON_CALL = "__gpu$xla.gpu.triton"
_REWARD_LAYOUT = tuple(axes for name in PUBLISHED_REWARDS for axes in REWARDS[name].layout)


@dataclasses.dataclass(frozen=True)
class Program:
  """A chunk step, or what a new prompt does between two of them, and the shapes it is compiled for.

  Attributes:
    params: shapes of all weights.
    state: shape of the state.
    condition: shape of the prompt.
    models: static half of the step.
    search: the search.
    model: sizes.
    first: whether the step is that of a video's first chunk.
    switch: what a new prompt does; None for a chunk step.
  """

  params: Params
  state: SearchState
  condition: Condition
  models: Models
  search: SearchConfig
  model: ModelConfig
  first: bool = False
  switch: SwitchConfig | None = None

  def lower(self) -> jax.stages.Lowered:
    """Traces and lowers it."""
    if self.switch is not None:
      return switch_prompt.lower(*self.arguments, self.models, self.search, self.switch)
    return drivers.jitted_chunk_step.lower(*self.arguments, self.models, self.search, first=self.first)

  def run(self, params: Params, state: SearchState, condition: Condition) -> Any:
    """What is compiled, as a function of the arguments."""
    if self.switch is not None:
      return switch_prompt(params, state, condition, self.models, self.search, self.switch)
    return chunk_step(params, state, condition, self.models, self.search, first=self.first)

  @property
  def arguments(self) -> tuple[Params, SearchState, Condition]:
    """What the step is given."""
    return self.params, self.state, self.condition

  @property
  def num_prompts(self) -> int:
    """Prompts that are searched together."""
    mesh = self.models.execution.mesh
    return 1 if mesh is None else mesh.shape[RULES["prompt"]]

  def placed(self, device: Device) -> Program:
    """The same with every shape where it belongs on the mesh, or on `device` where there is no mesh."""
    place = self._place_on(device)
    return dataclasses.replace(
      self,
      params={name: place(name, part) for name, part in self.params.items()},
      state=place("state", self.state),
      condition=place("condition", self.condition),
    )

  def _place_on(self, device: Device) -> Callable[[str, Any], Any]:
    mesh = self.models.execution.mesh
    if mesh is None:
      alone = SingleDeviceSharding(device)
      shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone)
      return lambda name, tree: jax.tree.map(shape, tree)
    of_prompts = lambda name: ("prompt",) if self.num_prompts > 1 and name in ("state", "condition") else ()
    patterns = {name: _REWARD_LAYOUT if name.endswith("_reward") else name for name in LAYOUTS}
    return lambda name, tree: placed(mesh, patterns[name], tree, leading=of_prompts(name))


def build(
  model: ModelConfig,
  search: SearchConfig,
  execution: Execution,
  dtype: DTypeLike,
  reward_dtype: DTypeLike | None,
) -> Program:
  """The program for a mesh, its shapes not yet placed; with a prompt axis if the mesh divides prompts.

  Args:
    model: sizes.
    search: the search.
    execution: devices, attention and decoding.
    dtype: dtype of weights and activations.
    reward_dtype: dtype of HPSv3 and VideoAlign at full size; None judges by the built-in rewards, or not at
      all where the model has no codec.
  """
  rewards, reward_params, reward_conditions = _rewards(model, reward_dtype)
  alone = make_models(model, *rewards)
  params = {**abstract_params(model, dtype), **reward_params}
  state = jax.eval_shape(lambda params: init_state(params, alone, search, 0), params)
  b = model.backbone
  text = jax.ShapeDtypeStruct((b.num_layers, b.num_heads, b.text_len, b.head_dim), dtype)
  # Shapes stand where a search has arrays.
  condition = cast(Any, Condition)(
    cast(Any, TextMemory)(text, text), *reward_conditions, jax.ShapeDtypeStruct((), jnp.int32)
  )
  program = Program(params, state, condition, make_models(model, *rewards, execution=execution), search, model)
  return program if program.num_prompts == 1 else _with_prompts(program)


def _rewards(model: ModelConfig, dtype: DTypeLike | None) -> tuple[list[Any], dict[str, Params], list[Any]]:
  """Image and video reward, and the shapes of their weights and conditions."""
  names = ("image_reward", "video_reward")
  if dtype is None:
    # Without a codec there are no pictures to judge.
    built_in = [REWARDS[name].make(None, model.fps) for name in DEFAULT_REWARDS]
    rewards = [ConstantReward(), ConstantReward()] if model.codec is None else built_in
    return rewards, {name: {} for name in names}, [{}, {}]
  specs = [REWARDS[name] for name in PUBLISHED_REWARDS]
  rewards = [spec.make(spec.make_config(), model.fps) for spec in specs]
  params = [loading.without_table(spec.weight_shapes(spec.make_config(), dtype)) for spec in specs]
  conditions = [tpu_compiler.prompt_shapes(spec, dtype) for spec in specs]
  return rewards, dict(zip(names, params, strict=True)), conditions


def _with_prompts(program: Program) -> Program:
  """The same program for several prompts at once."""
  lead = lambda x: jax.ShapeDtypeStruct((program.num_prompts, *x.shape), x.dtype)
  state, condition = jax.tree.map(lead, (program.state, program.condition))
  return dataclasses.replace(
    program,
    state=state._replace(**{name: getattr(program.state, name) for name in ("chunk_index", "begin", "num_past")}),
    condition=condition._replace(num_chunks=program.condition.num_chunks),
  )


def count_flop(program: Program) -> float:
  """FLOP of the program for one prompt, all candidates and beams; `program` is built for one device."""
  models = dataclasses.replace(program.models, execution=Execution(attention="flash", decoding="in_turn"))
  if program.switch is None:
    return flop_count.count(jax.make_jaxpr(dataclasses.replace(program, models=models).run)(*program.arguments))
  generator, search, switch = models.generator, program.search, program.switch
  # One beam alone: JAX cannot trace this kernel where beams are mapped around the choice of what is recached.
  memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), program.state.beams.memory)
  one = lambda params, memory, chunk, text: generator.recache(
    params, memory, chunk, text, search, switch, models.execution
  )
  inputs = program.params["backbone"], memory, program.state.chunk_index, program.condition.text
  return search.top_k * flop_count.count(jax.make_jaxpr(one)(*inputs))


def lower_for_cuda(program: Program) -> tuple[str, dict[str, Any]]:
  """The text of a program that is lowered for one NVIDIA GPU, and what is known of it."""
  began = time.perf_counter()
  # Exported programs are meant to be kept for years, which Triton's call does not promise.
  unstable = [jax.export.DisabledSafetyCheck.custom_call(_TRITON_CALL)]
  jitted = jax.jit(program.run, donate_argnums=1)
  text = jax.export.export(jitted, platforms=["cuda"], disabled_checks=unstable)(*program.arguments).mlir_module()
  seconds = time.perf_counter() - began
  return text, {
    "attention": program.models.execution.attention,
    "attention_calls": text.count(f"custom_call @{_TRITON_CALL}("),
    "argument_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.arguments)),
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
    collectives: what devices send each other; None also where jaxlib cannot read the compiled program.
    text: the compiled program; None where jaxlib cannot read it.
    seconds: spent in the compiler.
  """

  peak: int
  arguments: int | None
  outputs: int | None
  temporaries: int | None
  collectives: list[Collective] | None
  text: str | None
  seconds: float


def compile_and_analyse(program: Program) -> Analysis:
  """Compiles a program whose shapes are placed."""
  began = time.perf_counter()
  lowered = program.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)", str(error))
    if needed is None:
      raise
    # What takes the most, with where it comes from.
    print(str(error), file=sys.stderr, flush=True)
    peak = int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))
    return Analysis(peak, None, None, None, None, None, time.perf_counter() - began)
  seconds = time.perf_counter() - began
  memory = required(compiled.memory_analysis(), "the compiler's account of memory")
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    # A compiler newer than jaxlib may use operations that jaxlib does not know; the sizes are known all the same.
    print(f"the compiled program cannot be read, nor what devices send: {error}", file=sys.stderr, flush=True)
    text = None
  return Analysis(
    peak=memory.argument_size_in_bytes + outputs + temporaries,
    arguments=memory.argument_size_in_bytes,
    outputs=outputs,
    temporaries=temporaries,
    collectives=None if text is None else hlo_collectives.find(text, _sizes(program.models.execution.mesh), PHASES),
    text=text,
    seconds=seconds,
  )


def _sizes(mesh: Mesh | None) -> dict[str, int]:
  return {"none": 1} if mesh is None else dict(mesh.shape)
