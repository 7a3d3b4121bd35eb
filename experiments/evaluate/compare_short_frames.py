"""What `--short_frames` changes: how often the image reward, seeing fewer frames of a chunk, picks other winners.

  python -m experiments.evaluate.compare_short_frames --split=test --num_prompts=16 --seconds=5

Every chunk of a search is decided once with all frames and once with each smaller number of `--frames`, from the same
beams and the same noises; the search goes on with the winners of all frames. The program prints a Markdown table and,
in the last line, JSON. By number of frames:

  chunks          chunks compared
  same_best       share of them with the same best candidate
  same_survivors  share of them with the same survivors, in any order
  same_order      share of the pairs of candidates that the image reward alone puts into the same order
"""

import json
import sys
from collections.abc import Sequence

import tqdm
from absl import flags

from streamt1_jax.cli import caption_flags, command, files, flag_types, search_flags
from streamt1_jax.config import ConfigError, require_video_model
from streamt1_jax.evaluation import decisions
from streamt1_jax.io.checkpoint import load_config


def define_flags(values: flags.FlagValues) -> None:
  """The captions, the numbers of frames, and the flags of a search."""
  caption_flags.define(values, "num_prompts", 16)
  frames = "Numbers of frames to compare, all of a chunk first."
  flag_types.define_list(values, "frames", ["12", "6", "3", "1"], frames)
  search_flags.define(values)


def read_frames(values: flags.FlagValues, longest: int) -> list[int]:
  """The numbers of `--frames`. Raises ConfigError unless they fall, from `longest`, all frames of a chunk."""
  try:
    numbers = [int(number) for number in values.frames]
  except ValueError:
    numbers = []
  if len(numbers) < 2 or numbers != sorted(set(numbers), reverse=True) or numbers[0] != longest or numbers[-1] < 1:
    raise ConfigError(
      f"--frames={','.join(values.frames)}: give at least two falling numbers in 1..{longest}; the first is {longest}, "
      "all of a chunk"
    )
  return numbers


def run(values: flags.FlagValues) -> None:
  """Decides every chunk of every caption, then prints the shares."""
  if values["short_frames"].present:
    raise ConfigError("--short_frames is what is compared: give the numbers as --frames")
  checkpoint = files.find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, f"--checkpoint={checkpoint}")
  search = search_flags.search_config(values, model)
  if search.num_candidates == 1:
    raise ConfigError("a search with a single candidate has nothing to choose; compare another")
  frames = read_frames(values, model.required_codec.temporal_stride * model.chunk_frames)
  chunks = search_flags.video_chunks(model, seconds=values.seconds)
  choice = search_flags.reward_choice(values, checkpoint, model)
  pipeline = search_flags.load_pipeline(values, checkpoint)
  if pipeline.prompts_together > 1:
    raise ConfigError("prompts are compared one after the other: give a --mesh with data:1")
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_prompts)
  pipeline.text.prepare(captions)
  decided = []
  for caption, seed in zip(tqdm.tqdm(captions, desc="prompts", file=sys.stderr), seeds, strict=True):
    command.raise_if_interrupted()
    decided += decisions.decide(pipeline, search, frames, chunks, caption, seed)
  report = decisions.agreement(decided, frames)
  print(decisions.agreement_table(report))
  rewards = search_flags.reward_settings(choice, values.reward_dtype or "float32")
  del rewards["short_frames"]
  settings = {"split": values.split, "prompts": len(captions), "frames": frames, **rewards}
  print(json.dumps({"settings": settings, "results": report}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
