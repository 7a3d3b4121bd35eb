"""What `--short_frames` changes: how often the image reward, seeing fewer frames of a chunk, picks other winners.

  python -m experiments.evaluate.compare_short_frames --split=test --num_prompts=16 --seconds=5

Every chunk of a search is decided once with all frames and once with each smaller number of `--frames`, from the same
beams and the same noises; the search goes on with the winners of all frames. Prints a Markdown table and, last, one
JSON line, by number of frames:

  chunks          chunks compared
  same_best       share of them with the same best candidate
  same_survivors  share of them with the same survivors, in any order
  same_order      share of the pairs of candidates that the image reward alone puts into the same order
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from streamt1_jax import drivers
from streamt1_jax.cli import common, search_flags
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.data import shapes
from streamt1_jax.evaluation import comparison
from streamt1_jax.pipeline import Pipeline

_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder of the model.")
_SPLIT = flags.DEFINE_enum("split", "tune", shapes.SPLITS, "Whose captions.")
_NUM_PROMPTS = common.define_integer("num_prompts", 16, "Captions.", 1, 10_000)
_SECONDS = common.define_float("seconds", 5.0, "Length of each video, rounded to whole chunks.")
_SEED = common.define_integer("seed", 0, "Choice of captions, and seed of the first prompt.", 0, 10**9)
_FRAMES = flags.DEFINE_list("frames", ["12", "6", "3", "1"], "Numbers of frames to compare, all of a chunk first.")
flags.adopt_module_key_flags(search_flags)

# Seeds grow by 1000 a chunk: prompts with videos of up to 100 chunks share none.
_SEED_STEP = 100_000


def decide(
  pipeline: Pipeline, search: SearchConfig, frames: list[int], chunks: int, caption: str, seed: int
) -> list[list[comparison.Decision]]:
  """[chunks][numbers of frames] decisions; the search goes on with the first number's winners."""
  condition = pipeline.condition(caption, chunks)
  image = pipeline.models.image_reward
  choices = [
    dataclasses.replace(pipeline.models, image_reward=dataclasses.replace(image, num_frames=n)) for n in frames
  ]
  state = drivers.jitted_init_state(pipeline.params, np.int32(seed), pipeline.models, search)
  decided = []
  for chunk in range(chunks):
    after, decisions = None, []
    for models in choices:
      # A step takes its state's buffers.
      given = jax.tree.map(jnp.copy, state)
      found, trace = pipeline.step(pipeline.params, given, condition, models, search, first=chunk == 0)
      drivers.check_usable(trace, chunk, seed)
      after = found if after is None else after
      decisions.append(comparison.Decision.of(trace))
    state = after
    decided.append(decisions)
  return decided


def read_frames(longest: int) -> list[int]:
  """The numbers of `--frames`. Raises ConfigError unless they fall, from `longest`, all frames of a chunk."""
  given = ",".join(_FRAMES.value)
  try:
    numbers = [int(number) for number in _FRAMES.value]
  except ValueError:
    numbers = []
  if len(numbers) < 2 or numbers != sorted(set(numbers), reverse=True) or numbers[0] != longest or numbers[-1] < 1:
    raise ConfigError(
      f"--frames={given}: give at least two falling numbers in 1..{longest}; the first is {longest}, all of a chunk"
    )
  return numbers


def main() -> None:
  if flags.FLAGS["short_frames"].present:
    raise ConfigError("--short_frames is what is compared: give the numbers as --frames")
  pipeline = search_flags.load_pipeline(common.find_folder(_CHECKPOINT.value))
  search = search_flags.search_config(pipeline.config)
  if search.num_candidates == 1:
    raise ConfigError("a search with a single candidate has nothing to choose; compare another")
  if pipeline.prompts_together > 1:
    raise ConfigError("prompts are compared one after the other: give a --mesh with data:1")
  frames = read_frames(pipeline.models.codec.num_frames(pipeline.config.chunk_frames, first=False))
  chunks = search_flags.video_chunks(pipeline, search, seconds=_SECONDS.value)
  captions = shapes.held_out_captions(_SPLIT.value, _NUM_PROMPTS.value, _SEED.value)
  pipeline.text.prepare(captions)
  decided = []
  for index, caption in enumerate(tqdm.tqdm(captions, desc="prompts", file=sys.stderr)):
    decided += decide(pipeline, search, frames, chunks, caption, _SEED.value + _SEED_STEP * index)
  report = comparison.agreement(decided, frames)
  print(comparison.agreement_table(report))
  rewards = search_flags.reward_settings(pipeline, "float32")
  del rewards["short_frames"]
  settings = {"split": _SPLIT.value, "prompts": len(captions), "frames": frames, **rewards}
  print(json.dumps({"settings": settings, "results": report}), flush=True)


if __name__ == "__main__":
  common.run(main)
