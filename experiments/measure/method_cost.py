"""What a chunk of every named search costs at full size: forwards, decoded frames, judged frames and TFLOP.

  python -m experiments.measure.method_cost --seconds=30
  python -m experiments.measure.method_cost --seconds=30 --short_frames=3

Nothing runs and no weights are needed: everything follows from shapes. The model is Wan 2.1 1.3B at 832x480, the
rewards are HPSv3 and VideoAlign with a prompt of 127 tokens. Products and convolutions count, 2 FLOP per multiply-add.
"times plain" divides by plain streaming of the same length, which judges nothing and sees 12 latent frames, the chunk
included. "all sinks" is the same with the memory of a search whose sinks are at their maximum as soon as they can be:
what really happens lies between the two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from streamt1_jax.cli import command, flag_types, search_flags
from streamt1_jax.config import preset
from streamt1_jax.io import markdown
from streamt1_jax.measuring import method_cost


def define_flags(values: flags.FlagValues) -> None:
  """The length of the video."""
  flag_types.define_float(values, "seconds", 30.0, "Length of the video.")
  flag_types.define_integer(
    values, "short_frames", None, "Frames of a chunk that the image reward sees; all by default.", 1
  )


def run(values: flags.FlagValues) -> None:
  """Prints a line of the table for every search."""
  model = preset("wan_1_3b")
  num_chunks = search_flags.video_chunks(model, seconds=values.seconds)
  print(markdown.head(method_cost.COLUMNS), flush=True)
  for row in method_cost.rows(model, num_chunks, values.short_frames):
    print(markdown.row(row), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
