"""What the reward models cost at full size: memory of one call by XLA's account for a TPU, and TFLOP of a candidate.

  python -m experiments.measure.reward_cost --topology=v6e:1x1
  python -m experiments.measure.reward_cost --reward=hpsv3 --beam_size=4

It needs the compiler for TPUs (`pip install -e '.[tpu]'`), but no TPU and no weights. Every row is one call of the
search on one chip: all candidates, frames of 832x480, an instruction text with a prompt of 127 tokens, bfloat16.
HPSv3 sees frames of a chunk, VideoAlign some of the frames of a window.

TFLOP are counted from shapes (see `streamt1_jax.rewards.qwen2_vl.flop`), tokens that fill up a prompt included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax.numpy as jnp
from absl import flags

from streamt1_jax.cli import command, flag_types
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io import markdown
from streamt1_jax.measuring import full_size_rewards, tpu_compiler
from streamt1_jax.rewards.table import REWARDS

_COLUMNS = ("reward", "frames", "arguments, GB", "temporary, GB", "peak, GB", "TFLOP per candidate")


def define_flags(values: flags.FlagValues) -> None:
  """The calls, and what they are compiled for."""
  which = "Only this reward; all by default."
  flag_types.define_choice(values, "reward", None, list(CONVERSIONS), which)
  chips = "Chips to compile for; the program uses one of them. A v6e has 32 GB."
  flag_types.define_string(values, "topology", "v6e:1x1", chips)
  flag_types.define_integer(values, "top_k", 2, "Beams.", 1)
  flag_types.define_integer(values, "beam_size", 2, "Candidates per beam.", 1)
  dtype = "Dtype of weights; activations of int8 are bfloat16."
  flag_types.define_choice(values, "dtype", "bfloat16", ["bfloat16", "float32", "int8"], dtype)


def run(values: flags.FlagValues) -> None:
  """Prints a line of the table as soon as its call is compiled."""
  device = tpu_compiler.get_devices(values.topology)[0]
  print(markdown.head(_COLUMNS), flush=True)
  for name in [values.reward] if values.reward else CONVERSIONS:
    spec = REWARDS[name]
    for frames in full_size_rewards.FRAMES[spec.kind]:
      cost = full_size_rewards.compile_call(
        spec, frames, values.top_k, values.beam_size, jnp.dtype(values.dtype), device
      )
      memory = (f"{size / 1e9:.2f}" for size in (cost.arguments, cost.temporary, cost.peak))
      print(markdown.row([name, str(frames), *memory, f"{cost.tflop:.1f}"]), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
