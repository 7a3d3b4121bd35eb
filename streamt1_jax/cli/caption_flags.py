"""The flags of programs that make a video of each of many captions of the shapes world."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import command, files, flag_types
from streamt1_jax.config import ConfigError, ModelConfig, require_video_model
from streamt1_jax.data import shapes, world
from streamt1_jax.evaluation.compare.scenes import SEED_STEP
from streamt1_jax.io import rows
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.io.rows import Row


def define(values: flags.FlagValues, count: str, default: int, lower: int = 1) -> None:
  """Defines them; `count` names the flag of how many captions there are, `default` of them and at least `lower`."""
  flag_types.define_checkpoint(values)
  flag_types.define_choice(values, "split", "tune", shapes.SPLITS, "Whose captions.")
  flag_types.define_integer(values, count, default, "Captions, each with a video of its own.", lower, 10_000)
  flag_types.define_integer(values, "objects", 1, "Objects of every caption.", 1, world.MOST_OBJECTS)
  flag_types.define_float(values, "seconds", 5.0, "Length of each video, rounded to whole chunks.")
  flag_types.define_integer(values, "seed", 0, "Choice of captions, and seed of the first video.", 0, 10**9)


def require_shapes_world(values: flags.FlagValues) -> tuple[epath.Path, ModelConfig]:
  """The checkpoint and its model. Raises ConfigError unless its videos have the size of the shapes world's."""
  checkpoint = files.find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, f"--checkpoint={checkpoint}")
  size = tuple(model.required_codec.spatial_stride * cells for cells in (model.latent_height, model.latent_width))
  if size != (shapes.FRAME_SIZE, shapes.FRAME_SIZE):
    raise ConfigError(f"--checkpoint={checkpoint}: its frames are {size[0]}x{size[1]}, the shapes world's are 64x64")
  return checkpoint, model


def captions_and_seeds(values: flags.FlagValues, count: int) -> tuple[list[str], list[int]]:
  """`count` held-out captions, and the seed of each one's video."""
  captions = world.held_out_captions(values.split, count, values.seed, values.objects)
  return captions, [values.seed + SEED_STEP * index for index in range(count)]


def rows_of(
  values: flags.FlagValues,
  settings: Mapping[str, Any],
  count: int,
  begin: Callable[[int], Callable[[int], Row]],
  *,
  is_row: Callable[[Row], bool] = lambda row: True,
) -> list[Row]:
  """`count` rows, each a line of --output as soon as it is made; a run that was interrupted goes on behind the last.

  Args:
    values: flags, with --output.
    settings: what decides the rows, as JSON values.
    count: how many rows.
    begin: loads what makes rows, once it is known how many there are already; gives what makes the row of an index.
    is_row: whether a JSON object is such a row.

  Raises:
    ConfigError: the file holds rows of other settings, or something else.
  """
  output = epath.Path(values.output)
  made = rows.read(output, settings, name=f"--output={output}", is_row=is_row)
  make, writer = begin(len(made)), rows.Writer(output, settings, made)
  for index in tqdm.tqdm(range(len(made), count), initial=len(made), total=count, desc="prompts", file=sys.stderr):
    command.raise_if_interrupted()
    made.append(make(index))
    writer.append(made[-1])
  return made[:count]
