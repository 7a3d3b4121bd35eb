"""Does the search choose well? Plain streaming, best of N, and the search, from equal seeds, judged by the verifiers.

  python -m experiments.evaluate.compare_search --split=test --num_prompts=64 --output=runs/compare_5s.jsonl
  python -m experiments.evaluate.compare_search --split=test --seconds=30 --output=runs/compare_30s.jsonl

There are three ways to spend one prompt and one seed:

  plain      one candidate per chunk
  best_of_n  as many plain videos as the search draws candidates, from the noises of its first chunk; the video reward
             picks one by looking at whole videos
  search     the search of the flags, 2 beams of 2 candidates by default

The verifiers (`streamt1_jax.data.verify`) have seen no reward and no reward has seen them. The program prints a
Markdown table and, in the last line, JSON: the mean of every verdict with a 95 % bootstrap interval over captions, and
the same of the paired differences. `oracle_of_n` is what a perfect judge would reach with the plain videos, verdict by
verdict.

Every prompt is one line of `--output`. A run that was interrupted, or is asked for more prompts, goes on behind the
last one.
"""

import json
import sys
from collections.abc import Sequence

import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import caption_flags, command, files, flag_types, search_flags
from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation import comparison
from streamt1_jax.io import config_json, rows


def define_flags(values: flags.FlagValues) -> None:
  """The captions, the file, and the flags of a search."""
  caption_flags.define(values, "num_prompts", 64, 2)
  flag_types.define_path(values, "output", None, "JSON lines: settings, then a line per prompt.", required=True)
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Compares prompt by prompt, then prints what all rows say."""
  files.require_writable("output", values.output)
  checkpoint, model = caption_flags.require_shapes_world(values)
  output = epath.Path(values.output)
  search = search_flags.search_config(values, model)
  if search.num_candidates == 1:
    raise ConfigError("a search with a single candidate has nothing to choose; compare another")
  chunks = search_flags.video_chunks(model, seconds=values.seconds)
  choice = search_flags.reward_choice(values, checkpoint, model)
  settings = {
    "split": values.split,
    "seconds": values.seconds,
    "chunks": chunks,
    "seed": values.seed,
    "candidates": search.num_candidates,
    "checkpoint_sha256": files.checkpoint_sha256(checkpoint, choice.stored),
    **search_flags.reward_settings(values, choice, "float32"),
    **config_json.to_json_value(search),
  }
  made = rows.read(output, settings, name=f"--output={output}", is_row=comparison.is_row)
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_prompts)
  pipeline = search_flags.load_pipeline(values, checkpoint)
  pipeline.text.prepare(captions[len(made) :])
  writer = rows.Writer(output, settings, made)
  indices = range(len(made), len(captions))
  for index in tqdm.tqdm(indices, initial=len(made), total=len(captions), desc="prompts", file=sys.stderr):
    command.raise_if_interrupted()
    made.append(comparison.compare(pipeline, search, chunks, captions[index], seeds[index]))
    writer.append(made[-1])
  result = comparison.summary(made[: values.num_prompts])
  print(comparison.table(result))
  print(json.dumps({"settings": settings, "results": result}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
