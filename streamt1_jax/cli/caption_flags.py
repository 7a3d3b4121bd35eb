"""The flags of programs that make a video of each of many captions of the shapes world."""

from __future__ import annotations

from absl import flags

from streamt1_jax.cli import flag_types
from streamt1_jax.data import shapes

# Seeds grow by 1000 a chunk: captions with videos of up to 100 chunks share none.
_SEED_STEP = 100_000


def define(values: flags.FlagValues, count: str, default: int, lower: int = 1) -> None:
  """Defines them; `count` names the flag of how many captions there are, `default` of them and at least `lower`."""
  flag_types.define_checkpoint(values)
  flag_types.define_choice(values, "split", "tune", shapes.SPLITS, "Whose captions.")
  flag_types.define_integer(values, count, default, "Captions, each with a video of its own.", lower, 10_000)
  flag_types.define_float(values, "seconds", 5.0, "Length of each video, rounded to whole chunks.")
  flag_types.define_integer(values, "seed", 0, "Choice of captions, and seed of the first video.", 0, 10**9)


def captions_and_seeds(values: flags.FlagValues, count: int) -> tuple[list[str], list[int]]:
  """`count` held-out captions, and the seed of each one's video."""
  captions = shapes.held_out_captions(values.split, count, values.seed)
  return captions, [values.seed + _SEED_STEP * index for index in range(count)]
