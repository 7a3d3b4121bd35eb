"""Judges generated videos of the shapes world with the verifiers that no search and no reward has seen.

  python -m experiments.evaluate.small_model --split=test --num_captions=64 --search=none
  python -m experiments.evaluate.small_model --split=test --num_captions=64 --search=none --seconds=30

prints one JSON line: the share of videos for which each verdict holds, over the whole video and, where it is longer
than 5 s, window by window.

Captions of the split "tune" are for choosing anything at all; those of "test" are for reporting. `--reconstruct`
judges true clips after a trip through the VAE instead: what the decoder can reach at best.
"""

import json
import sys
from collections.abc import Sequence

import tqdm
from absl import flags

from streamt1_jax.cli import caption_flags, command, files, flag_types, search_flags
from streamt1_jax.evaluation import small_model
from streamt1_jax.io.video import write_png

_SHEET_VIDEOS = 16


def define_flags(values: flags.FlagValues) -> None:
  """The captions, what is judged, and the flags of a search."""
  caption_flags.define(values, "num_captions", 64)
  flag_types.define_switch(values, "reconstruct", False, "Judge true clips that went through the VAE.")
  flag_types.define_path(values, "contact_sheet", None, "PNG of the first videos, for looking at.")
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Makes the videos, judges them and prints the report."""
  if values.contact_sheet is not None:
    files.require_writable("contact_sheet", values.contact_sheet)
  checkpoint, model = caption_flags.require_shapes_world(values)
  search = search_flags.search_config(values, model)
  chunks = search_flags.video_chunks(model, seconds=values.seconds)
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_captions)
  if values.reconstruct:
    made = small_model.reconstructed_videos(checkpoint, model, chunks, captions, values.seed)
  else:
    pipeline = search_flags.load_pipeline(values, checkpoint, num_prompts=len(captions))
    made = small_model.generated_videos(pipeline, search, chunks, captions, seeds)
  videos = list(tqdm.tqdm(made, total=len(captions), desc="videos", file=sys.stderr))
  report = {"split": values.split, "captions": len(captions), "seconds": values.seconds}
  print(json.dumps(report | small_model.judge(videos, captions)), flush=True)
  if values.contact_sheet is not None:
    write_png(values.contact_sheet, small_model.contact_sheet(videos[:_SHEET_VIDEOS]))


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
