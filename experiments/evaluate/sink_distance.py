"""What long videos of the shapes world keep, by the largest distance at which a chunk sees its first sink.

  python -m experiments.evaluate.sink_distance --split=tune --num_captions=8 --seconds=240 --distances=90,none,9,45,21

Videos are streamed without a search. Verifiers judge five seconds at the beginning and five at the end of every minute.
Prints a JSON line per distance, in latent frames (`none`: no limit): by window the share of videos for which each
verdict holds. All videos of a row begin with the same captions and seeds.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm
from absl import flags

from streamt1_jax.cli import caption_flags, command, flag_types
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.data import verify, world
from streamt1_jax.pipeline import Pipeline

_WINDOW = 5
_MINUTE = 60


def define_flags(values: flags.FlagValues) -> None:
  """The captions, how long the videos are, and the distances."""
  caption_flags.define(values, "num_captions", 8)
  flag_types.define_list(values, "distances", ["none", "90", "45", "21", "9"], "Distances, or none for no limit.")


def windows(seconds: float) -> list[tuple[int, int]]:
  """(begin, end) in seconds of what is judged."""
  ends = [_WINDOW, *range(_MINUTE, int(seconds) + 1, _MINUTE)]
  # A video is a little shorter than its whole minutes: one latent frame stands for one frame.
  return [(0, _WINDOW), *((end - _WINDOW - 1, end - 1) for end in ends[1:])]


def judged_windows(
  pipeline: Pipeline, search: SearchConfig, caption: str, seed: int, num_chunks: int, spans: Sequence[tuple[int, int]]
) -> Iterator[dict[str, bool]]:
  """The verdicts of each window of one video, whose other frames are forgotten."""
  fps, kept, start = pipeline.config.fps, [[] for _ in spans], 0
  condition = pipeline.condition(caption, num_chunks)
  for trace in pipeline.stream(condition, search, num_chunks=num_chunks, seed=seed):
    frames = np.asarray(trace.frames[0])
    for window, (begin, end) in zip(kept, spans, strict=True):
      window.append(frames[max(0, begin * fps - start) : max(0, end * fps - start)])
    start += len(frames)
  for window in kept:
    yield verify.verify(np.concatenate(window), world.parse(caption))


def run(values: flags.FlagValues) -> None:
  """Makes and judges the videos of every distance."""
  checkpoint, model = caption_flags.require_shapes_world(values)
  if not all(text == "none" or text.isdecimal() for text in values.distances):
    raise ConfigError(f"--distances: whole numbers and none, got {','.join(values.distances)}")
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_captions)
  pipeline = Pipeline.load(checkpoint)
  pipeline.text.prepare(captions)
  num_chunks = pipeline.num_chunks(seconds=values.seconds)
  spans = windows(values.seconds)
  for text in values.distances:
    distance = None if text == "none" else int(text)
    search = dataclasses.replace(SearchConfig.streaming(model), sink_distance=distance)
    search.validate_for(model)
    given = tqdm.tqdm(zip(captions, seeds, strict=True), total=len(captions), desc=text, file=sys.stderr)
    found = [list(judged_windows(pipeline, search, *each, num_chunks, spans)) for each in given]
    rates = {f"{begin}-{end}s": verify.verify_rates(column) for (begin, end), column in zip(spans, zip(*found))}
    print(json.dumps({"sink_distance": text, "captions": len(captions)} | rates), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
