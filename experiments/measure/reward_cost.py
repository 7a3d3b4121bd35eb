"""What the reward models cost at full size: memory of one call by XLA's account for a TPU, and TFLOP of a candidate.

  python -m experiments.measure.reward_cost --topology=v6e:1x1
  python -m experiments.measure.reward_cost --reward=hpsv3 --beam_size=4

No TPU is needed, only its compiler (`pip install -e '.[tpu]'`), and no weights. Every row is one call of the search on
one chip: all candidates, frames of 832x480, an instruction text with a prompt of 127 tokens, bfloat16.
HPSv3 sees frames of a chunk, VideoAlign some of the frames of a window.

TFLOP are counted from shapes (see `streamt1_jax.rewards.qwen2_vl.flop`), tokens that fill up a prompt included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from streamt1_jax.cli import common
from streamt1_jax.measuring import reward_calls, tpu_compiler
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.table import REWARDS

_REWARD = flags.DEFINE_enum("reward", None, ["hpsv3", "videoalign"], "Only this one; both by default.")
_TOPOLOGY = flags.DEFINE_string("topology", "v6e:1x1", "Chips to compile for, one of which is used; v6e has 32 GB.")
_TOP_K = common.define_integer("top_k", 2, "Beams.", 1)
_BEAM_SIZE = common.define_integer("beam_size", 2, "Candidates per beam.", 1)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32", "int8"], "Of weights; activations of int8 are bfloat16."
)

_FRAME = (480, 832, 3)
_FPS = 16
_LENGTHS = {"hpsv3": (1, 12), "videoalign": (9, 57, 117)}


@dataclasses.dataclass(frozen=True)
class Row:
  """One call; bytes per chip."""

  reward: str
  frames: int
  arguments: int
  temporary: int
  peak: int
  tflop: float


def compile_call(name: str, frames: int, device: Any) -> Row:
  """One call on all candidates, compiled for `device`."""
  spec = REWARDS[name]
  config = spec.config_type()
  reward = spec.make(config, _FPS)
  dtype = jnp.dtype(_DTYPE.value)
  prompt = tpu_compiler.prompt_shapes(spec, dtype)
  past, chunk = reward_calls.clip_shapes(spec.kind, frames, _TOP_K.value, _BEAM_SIZE.value, _FRAME)
  on_device = jax.sharding.SingleDeviceSharding(device)
  # As in a search, prompts are embedded on the host.
  params = loading.without_table(spec.abstract_params(config, dtype))
  call = jax.jit(reward_calls.judge(spec.kind, reward), in_shardings=on_device, out_shardings=on_device)
  memory = call.lower(params, prompt, past, chunk).compile().memory_analysis()
  return Row(
    name,
    frames,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.peak_memory_in_bytes,
    spec.candidate_flop(reward, frames, _FRAME[:2], sum(spec.text.length)) / 1e12,
  )


def table() -> Iterator[str]:
  """Lines of the table, each as soon as it is compiled."""
  device = tpu_compiler.get_devices(_TOPOLOGY.value)[0]
  columns = ("reward", "frames", "arguments, GB", "temporary, GB", "peak, GB", "TFLOP per candidate")
  yield f"| {' | '.join(columns)} |"
  yield f"|{'|'.join('---' for _ in columns)}|"
  for name, lengths in _LENGTHS.items():
    if _REWARD.value in (None, name):
      for frames in lengths:
        row = compile_call(name, frames, device)
        memory = " | ".join(f"{size / 1e9:.2f}" for size in (row.arguments, row.temporary, row.peak))
        yield f"| {row.reward} | {row.frames} | {memory} | {row.tflop:.1f} |"


def main() -> None:
  for line in table():
    print(line, flush=True)


if __name__ == "__main__":
  common.run(main)
