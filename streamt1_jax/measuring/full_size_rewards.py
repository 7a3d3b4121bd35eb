"""The reward models at full size: one call of each, compiled for a TPU that is not there."""

from __future__ import annotations

import dataclasses

import jax
from jax.typing import DTypeLike

from streamt1_jax.config import required
from streamt1_jax.measuring import reward_calls, tpu_compiler
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.typing import Device

FRAMES = {"image": (1, 12), "video": (9, 57, 117)}
"""The numbers of frames of a chunk or of a window that are measured, by the kind of the reward."""
_FRAME = (480, 832, 3)
_FPS = 16


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one call takes.

  Attributes:
    arguments: bytes per chip of weights, prompt and frames.
    temporary: bytes per chip that are needed in between.
    peak: bytes per chip, the most at one time.
    tflop: TFLOP of one candidate.
  """

  arguments: int
  temporary: int
  peak: int
  tflop: float


def compile_call(spec: RewardSpec, frames: int, top_k: int, beam_size: int, dtype: DTypeLike, device: Device) -> Cost:
  """One call of a published reward on all candidates, compiled for `device`."""
  reward, prompt = spec.make(spec.make_config(), _FPS), tpu_compiler.prompt_shapes(spec, dtype)
  past, chunk = reward_calls.clip_shapes(spec, frames, top_k, beam_size, _FRAME)
  on_device = jax.sharding.SingleDeviceSharding(device)
  # As in a search, prompts are embedded on the host.
  params = loading.without_table(spec.weight_shapes(spec.make_config(), dtype))
  call = jax.jit(reward_calls.judge(spec, reward), in_shardings=on_device, out_shardings=on_device)
  compiled = call.lower(params, prompt, past, chunk).compile()
  memory = required(compiled.memory_analysis(), "the compiler's account of memory")
  return Cost(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.peak_memory_in_bytes,
    spec.flop(reward, frames, _FRAME[:2], sum(spec.required_text.length)) / 1e12,
  )
