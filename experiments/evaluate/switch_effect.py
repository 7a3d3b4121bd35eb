"""What a new caption in the middle of a video does, for every `recache` and every `switch_sinks`.

  python -m experiments.evaluate.switch_effect --split=tune --num_pairs=16 --beam_size=1 --top_k=1

Each video is searched under one caption for some chunks; from there it goes on under another one, which has another
colour, direction and background, once for every way to change the prompt. Verifiers that no search has seen judge every
chunk by itself. Prints a JSON line per way: the share of videos that ever show the new colour, direction, background,
or all, within the chunks that are made, and the median of the first chunk that does.
"""

import json
import sys
from collections.abc import Sequence
from typing import get_args, get_type_hints

import tqdm
from absl import flags

from streamt1_jax.cli import caption_flags, command, flag_types, search_flags
from streamt1_jax.config import SwitchConfig
from streamt1_jax.data import shapes
from streamt1_jax.evaluation import switch_effect

_SINKS = ("keep", "recache", "first")
_SEED_STEP = 100_000


def define_flags(values: flags.FlagValues) -> None:
  """The pairs of captions, the chunks, and the flags of a search."""
  caption_flags.define(values, "num_pairs", 16)
  flag_types.define_integer(values, "chunks_before", 12, "Chunks under the first caption.", 1)
  flag_types.define_integer(values, "chunks_after", 8, "Chunks under the second.", 1)
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Makes the videos, judges their chunks, and prints what they show."""
  checkpoint, model = caption_flags.require_shapes_world(values)
  search = search_flags.search_config(values, model)
  captions = shapes.held_out_captions(values.split, 4 * values.num_pairs, values.seed)
  pairs = switch_effect.choose_pairs(captions, values.num_pairs)
  pipeline = search_flags.load_pipeline(values, checkpoint)
  pipeline.text.prepare([caption for pair in pairs for caption in pair])
  recaches = get_args(get_type_hints(SwitchConfig)["recache"])
  switches = [SwitchConfig(recache=recache, sinks=sinks) for recache in recaches for sinks in _SINKS]
  options = {"chunks_before": values.chunks_before, "chunks_after": values.chunks_after}
  verdicts = [
    list(switch_effect.after_switches(pipeline, search, switches, pair, _SEED_STEP * index, **options))
    for index, pair in enumerate(tqdm.tqdm(pairs, desc="pairs", file=sys.stderr))
  ]
  before, *after = zip(*verdicts, strict=True)
  print(json.dumps({"way": "before", **switch_effect.summarise(before)}))
  for switch, videos in zip(switches, after, strict=True):
    way = {"recache": switch.recache, "sinks": switch.sinks}
    print(json.dumps(way | switch_effect.summarise(videos)), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
