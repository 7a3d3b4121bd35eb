"""Does the score put the candidates of a chunk in the order in which they are right? On the model's own candidates.

  python -m experiments.evaluate.candidate_order --objects=2 --seconds=5 --output=runs/order_two_5s.jsonl

From one beam several candidates of every chunk are drawn and judged; the video goes on with the first, as in plain
streaming. Prints a Markdown table and in the last line JSON: of all pairs of candidates whose PSNR against the nearest
ideal clip differs enough, the share that each score has in the same order, with a 95 % bootstrap interval over
captions; and the same of those pairs in which one fails a verdict and the other does not.

Every caption is one line of `--output`. A run that was interrupted goes on behind the last one.
"""

import json
import sys
from collections.abc import Callable, Sequence

from absl import flags

from streamt1_jax.cli import caption_flags, command, files, flag_types, search_flags
from streamt1_jax.evaluation import candidate_order
from streamt1_jax.io.rows import Row


def define_flags(values: flags.FlagValues) -> None:
  """The captions, the candidates, the file and the rewards."""
  caption_flags.define(values, "num_captions", 64)
  flag_types.define_integer(values, "candidates", 4, "Candidates of every chunk.", 2, 10)
  flag_types.define_path(values, "output", None, "JSON lines: settings, then a line per caption.", required=True)
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Judges caption by caption, then prints what all rows say."""
  files.require_writable("output", values.output)
  checkpoint, model = caption_flags.require_shapes_world(values)
  chunks = search_flags.video_chunks(model, seconds=values.seconds)
  choice = search_flags.reward_choice(values, checkpoint, model)
  names = ("split", "seconds", "seed", "objects", "candidates")
  settings = {name: values[name].value for name in names}
  settings |= {"checkpoint_sha256": files.checkpoint_sha256(checkpoint, choice.stored)}
  settings |= search_flags.reward_settings(choice, values.reward_dtype or "float32")
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_captions)

  def begin(made: int) -> Callable[[int], Row]:
    pipeline = search_flags.load_pipeline(values, checkpoint)
    pipeline.text.prepare(captions[made:])
    return lambda index: candidate_order.judge_candidates(
      pipeline, values.candidates, chunks, captions[index], seeds[index]
    )

  made = caption_flags.rows_of(values, settings, values.num_captions, begin, is_row=candidate_order.is_row)
  result = candidate_order.summary(made)
  print(candidate_order.table(result))
  print(json.dumps({"settings": settings, "results": result}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
