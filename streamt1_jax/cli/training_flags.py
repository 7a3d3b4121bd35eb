"""The flags that all trainings share."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags
from etils import epath

from streamt1_jax.cli import command, files, flag_types
from streamt1_jax.config import ConfigError, ModelConfig, preset
from streamt1_jax.training.loop import Run

# They decide nothing of the result, so a run may go on with others.
_MAY_CHANGE = ("run_dir", "checkpoint_every", "log_every")


def define(values: flags.FlagValues) -> None:
  """Defines them."""
  where = "Where everything is written; an interrupted run resumes from it."
  flag_types.define_path(values, "run_dir", None, where, required=True)
  flag_types.define_string(values, "preset", "tiny", "Model preset.")
  flag_types.define_integer(values, "checkpoint_every", 200, "Steps between checkpoints.", 1)
  flag_types.define_integer(values, "log_every", 20, "Steps between rows of the loss curve.", 1)
  flag_types.define_integer(values, "seed", 0, "Seed of initialisation and data.")


def trainable_preset(name: str) -> ModelConfig:
  """The named preset. Raises ConfigError if it is unknown or has no codec and text encoder of its own."""
  model = preset(name)
  if model.codec is None or model.text is None:
    raise ConfigError(f"--preset={name} is a backbone alone; codec and text encoder are needed, as in: tiny")
  return model


def fields_of(values: flags.FlagValues, config_type: type) -> dict[str, Any]:
  """The values of the flags that are named like the fields of a dataclass."""
  return {field.name: values[field.name].value for field in dataclasses.fields(config_type)}


def require_folder(flag: str, path: epath.PathLike) -> None:
  """Raises ConfigError unless `path` is a folder: better known before the run's folder is made."""
  if not epath.Path(path).is_dir():
    raise ConfigError(f"--{flag}={path} is not a folder")


def start_run(values: flags.FlagValues) -> Run:
  """Makes the run's folder. Raises ConfigError, naming the flag, if it cannot, or if another run is in it."""
  settings = {name: value for name, value in command.flag_settings(values).items() if name not in _MAY_CHANGE}
  files.make_folder("run_dir", values.run_dir)
  run = Run(epath.Path(values.run_dir), settings, values.checkpoint_every, values.log_every)
  # From now on the folder belongs to these flags, whatever is put into it before the first step.
  run.curve_writer(run.curve())
  return run
