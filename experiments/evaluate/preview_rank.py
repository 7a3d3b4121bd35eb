"""Whether a look at unfinished candidates finds the good ones: by denoising step and by how much is looked at.

  python -m experiments.evaluate.preview_rank --split=tune --num_captions=12 --candidates=8

One beam with `--candidates` independent candidates per chunk; the best one goes on. Prints a Markdown table and,
in the last line, JSON: `spread`, the standard deviation of the candidates' scores where everything is drawn anew, where
they share the noise they start from, and where they share the noise between the steps; and for every preview and step,
Spearman's correlation with the final hybrid score, how often the best candidate is not among the half or the quarter
that the preview puts first, and how much of the best candidate's lead these keep.
"""

import json
import sys
from collections.abc import Sequence

import tqdm
from absl import flags

from streamt1_jax.cli import caption_flags, command, flag_types
from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation import previews
from streamt1_jax.io import markdown
from streamt1_jax.pipeline import Pipeline


def define_flags(values: flags.FlagValues) -> None:
  """The captions, and how many candidates every chunk has."""
  caption_flags.define(values, "num_captions", 12)
  flag_types.define_integer(values, "candidates", 8, "Candidates per chunk, a multiple of 4.", 4, 100)


def run(values: flags.FlagValues) -> None:
  """Looks at every chunk of every caption, then prints what the looks say."""
  if values.candidates % 4:
    raise ConfigError(f"--candidates must be a multiple of 4, got {values.candidates}")
  if values.seed % 100:
    raise ConfigError(f"--seed must be a multiple of 100, got {values.seed}")
  checkpoint, model = caption_flags.require_shapes_world(values)
  captions, seeds = caption_flags.captions_and_seeds(values, values.num_captions)
  pipeline = Pipeline.load(checkpoint)
  pipeline.text.prepare(captions)
  chunks = pipeline.num_chunks(seconds=values.seconds)
  looks = []
  for caption, seed in zip(tqdm.tqdm(captions, desc="captions", file=sys.stderr), seeds, strict=True):
    command.raise_if_interrupted()
    given = pipeline.params, pipeline.condition(caption, chunks), pipeline.models
    looks += previews.look(*given, candidates=values.candidates, chunks=chunks, seed=seed)
  found = [
    {"preview": preview, "step": step, "final": final} | previews.agreement(looks, preview, step, final)
    for final in ("hybrid", "short", "long")
    for preview in (previews.LIGHT, previews.LARGE, previews.FULL)
    for step in range(len(model.schedule.denoising_steps))
  ]
  found = [
    {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()} for row in found
  ]
  columns = list(found[0])
  cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in found]
  print(markdown.table(columns, cells))
  spread = {which: previews.spread(looks, which) for which in ("final", "same_start", "same_between")}
  settings = {"split": values.split, "captions": len(captions), "chunks": len(looks), "candidates": values.candidates}
  print(json.dumps({"settings": settings, "spread": spread, "agreement": found}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
