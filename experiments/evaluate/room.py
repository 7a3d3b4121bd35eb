"""How much room there is for a search: pools of plain videos of held-out prompts, judged by the verifiers.

  python -m experiments.evaluate.room --objects=2 --seconds=5 --output=runs/room_two_5s.jsonl
  python -m experiments.evaluate.room --objects=2 --seconds=30 --output=runs/room_two_30s.jsonl
  python -m experiments.evaluate.room --segments=5 --seconds=30 --output=runs/room_timelines.jsonl

Prints a Markdown table, and in the last line JSON: the share of videos that show all that their captions say, and what
a perfect judge of 4 and of all would reach, each with a 95 % bootstrap interval over prompts; and how often each
verdict fails. For timelines a second table says how often a caption holds, by what happens with it. Every prompt is one
line of `--output`. A run that was interrupted goes on behind the last one.
"""

import json
import sys
from collections.abc import Callable, Sequence

from absl import flags

from streamt1_jax.cli import caption_flags, command, files, flag_types, search_flags
from streamt1_jax.evaluation import room
from streamt1_jax.io import markdown
from streamt1_jax.io.rows import Row


def define_flags(values: flags.FlagValues) -> None:
  """The prompts, the pools and the file."""
  caption_flags.define(values, "num_captions", 64)
  flag_types.define_integer(values, "segments", 1, "Captions of every video, one after the other.", 1, 20)
  flag_types.define_integer(values, "pool", 16, "Plain videos of every prompt.", 1, 100)
  flag_types.define_path(values, "output", None, "JSON lines: settings, then a line per prompt.", required=True)
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Makes and judges pools, prompt by prompt, then prints what all rows say."""
  files.require_writable("output", values.output)
  checkpoint, model = caption_flags.require_shapes_world(values)
  chunks = search_flags.video_chunks(model, seconds=values.seconds)
  names = ("split", "seconds", "seed", "objects", "segments", "pool")
  settings = {name: values[name].value for name in names}
  settings["checkpoint_sha256"] = files.checkpoint_sha256(checkpoint, ())
  count, segments = values.num_captions, values.segments
  prompts = room.prompts(values.split, count, segments, chunks, values.objects, values.seed)
  _, seeds = caption_flags.captions_and_seeds(values, count)

  def begin(made: int) -> Callable[[int], Row]:
    pipeline = search_flags.load_pipeline(values, checkpoint)
    pool = lambda seed: range(seed, seed + values.pool)
    return lambda index: room.pool(pipeline, prompts[index], chunks, pool(seeds[index]))

  made = caption_flags.rows_of(values, settings, count, begin)
  result = room.summary(made)
  print(room.table(result))
  if segments > 1:
    print(markdown.table(["what happens", "objects", "captions", "it holds"], room.by_event(made)))
  print(json.dumps({"settings": settings, "results": result, "failures": room.failures(made)}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
