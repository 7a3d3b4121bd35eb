"""What `--reward_decode` changes: how often rewards decide otherwise when each candidate is decoded from scratch.

  python -m experiments.evaluate.compare_reward_decode --split=test --num_prompts=64 --seconds=10 --output=ways.jsonl

Every chunk of a search is decided twice from the same beams and noises: by what the released program shows the rewards
(`scratch`: chunk and window decoded anew, each as a video of its own) and by the video itself (`streamed`). The search
goes on with the winners of `scratch`. The program prints a Markdown table and, in the last line, JSON, as
`streamt1_jax.evaluation.reward_decodes.summary` describes them.

Every prompt is one line of `--output`. A run that was interrupted, or is asked for more prompts, goes on behind the
last one.
"""

import json
import sys
from collections.abc import Callable, Sequence

from absl import flags

from streamt1_jax.cli import caption_flags, command, files, flag_types, search_flags
from streamt1_jax.config import ConfigError, require_video_model
from streamt1_jax.evaluation import reward_decodes
from streamt1_jax.io import config_json
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.io.rows import Row


def define_flags(values: flags.FlagValues) -> None:
  """The captions, the file, and the flags of a search."""
  caption_flags.define(values, "num_prompts", 64)
  flag_types.define_path(values, "output", None, "JSON lines: settings, then a line per prompt.", required=True)
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Decides every chunk of every caption both ways, then prints the shares."""
  if values["reward_decode"].present:
    raise ConfigError("--reward_decode is what is compared: do not give it")
  files.require_writable("output", values.output)
  checkpoint = files.find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, f"--checkpoint={checkpoint}")
  search = search_flags.search_config(values, model)
  if search.num_candidates == 1:
    raise ConfigError("a search with a single candidate has nothing to choose; compare another")
  chunks = search_flags.video_chunks(model, seconds=values.seconds)
  choice = search_flags.reward_choice(values, checkpoint, model)
  settings = {
    "split": values.split,
    "chunks": chunks,
    "seed": values.seed,
    "checkpoint_sha256": files.checkpoint_sha256(checkpoint, choice.stored),
    **search_flags.reward_settings(choice, values.reward_dtype or "float32"),
    **config_json.to_json_value(search),
  }
  del settings["reward_decode"]
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_prompts)

  def begin(made: int) -> Callable[[int], Row]:
    pipeline = search_flags.load_pipeline(values, checkpoint)
    if pipeline.prompts_together > 1:
      raise ConfigError("prompts are compared one after the other: give a --mesh with data:1")
    pipeline.text.prepare(captions[made:])
    return lambda index: reward_decodes.compare(pipeline, search, chunks, captions[index], seeds[index])

  report = reward_decodes.summary(caption_flags.rows_of(values, settings, values.num_prompts, begin), search)
  print(reward_decodes.table(report))
  settings = {"prompts": values.num_prompts, **settings}
  print(json.dumps({"settings": settings, "results": report}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
