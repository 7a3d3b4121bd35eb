"""Plain and searched videos of the same captions in one moving picture, with what the verifiers say of each.

  python -m experiments.evaluate.gallery --split=test --objects=2 --output=docs/side_by_side.gif

Nothing is selected: the captions are the first of the split. The plain video of every pair is above, and both have one
seed. Prints a Markdown table, and in the last line its rows as JSON.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from streamt1_jax.cli import caption_flags, command, files, flag_types, search_flags
from streamt1_jax.config import SearchConfig
from streamt1_jax.evaluation import gallery, small_model
from streamt1_jax.io import markdown
from streamt1_jax.io.moving_picture import write_gif

COLUMNS = ("caption", "plain misses", "searched misses")


def define_flags(values: flags.FlagValues) -> None:
  """The captions, the picture and the flags of a search."""
  caption_flags.define(values, "num_captions", 12)
  flag_types.define_integer(values, "columns", 6, "Pairs side by side.", 1, 20)
  flag_types.define_integer(values, "every", 2, "Frames from one that is shown to the next.", 1, 16)
  flag_types.define_path(values, "output", None, "The moving picture, a GIF.", required=True)
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Makes both videos of every caption, then the picture and the table."""
  files.require_writable("output", values.output)
  checkpoint, model = caption_flags.require_shapes_world(values)
  search = search_flags.search_config(values, model)
  chunks = search_flags.video_chunks(model, seconds=values.seconds)
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_captions)
  pipeline = search_flags.load_pipeline(values, checkpoint, num_prompts=len(captions))
  plain, searched = (
    list(small_model.generated_videos(pipeline, one, chunks, captions, seeds))
    for one in (SearchConfig.streaming(model), search)
  )
  picture = gallery.sheet(plain, searched, values.columns)[:: values.every]
  write_gif(values.output, picture, model.fps / values.every)
  missed = lambda frames, caption: ", ".join(gallery.failures(frames, caption)) or "nothing"
  rows = [
    [caption, *(missed(frames, caption) for frames in pair)]
    for caption, *pair in zip(captions, plain, searched, strict=True)
  ]
  print(markdown.table(COLUMNS, rows))
  print(json.dumps({"columns": COLUMNS, "rows": rows}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
