"""`streamt1 convert --from_hub`: the published files that are still missing come from the hub."""

from __future__ import annotations

import itertools
import pathlib

from absl import flags

from streamt1_jax.cli import flag_types
from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.convert import execute, plan
from streamt1_jax.convert.tables import published_files
from streamt1_jax.convert.tables.published_files import PUBLISHED, PublishedFile
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io import hub
from streamt1_jax.rewards.folder import REWARDS_FOLDER


def define(values: flags.FlagValues) -> None:
  """Defines the flag."""
  flag_types.define_switch(
    values,
    "from_hub",
    False,
    "Download the published files of what --output still lacks, where no flag gives them. Files of a reward model need "
    "the flag of its text.",
  )


def fetch_missing(values: flags.FlagValues, model: ModelConfig) -> None:
  """Sets the flags of files that are missing to where they were downloaded; --dry_run only says what would be.

  Raises ConfigError as `hub.fetch` does, and for a model whose files are not published.
  """
  if not values.from_hub:
    return
  if model.name != published_files.MODEL:
    raise ConfigError(f"--from_hub fetches files of {published_files.MODEL}; --model is {model.name}")
  if values.output is None and not values.dry_run:
    raise ConfigError("--output is missing; give the folder of the checkpoint, or --dry_run")
  files = wanted(values, model)
  if values.dry_run:
    for file in files:
      size = "" if file.size is None else f", {file.size:,} bytes"
      print(f"would download {file.name}: {hub.PREFIX}{file.repo}/{file.path}{size}")
    return
  by_repo = [(repo, tuple(group)) for repo, group in itertools.groupby(files, lambda file: file.repo)]
  folders = hub.fetch([hub.Wanted(repo, None, tuple(file.path for file in group)) for repo, group in by_repo])
  for (_, group), folder in zip(by_repo, folders, strict=True):
    for file in group:
      values[file.flag].value = str(folder / file.path)
  if any(file.flag == "lora" for file in files) and values.lora_alpha is None:
    values["lora_alpha"].value = published_files.LORA_ALPHA


def wanted(values: flags.FlagValues, model: ModelConfig) -> list[PublishedFile]:
  """The files of what is missing and not given by a flag, those of one repository beside each other."""
  output = None if values.output is None else pathlib.Path(values.output)
  names = [plan.FLAGS.get(part, "--tokenizer").removeprefix("--") for part in execute.lacking(output, model)]
  # An adapter belongs to the base that it was published with.
  names += ["lora"] if "backbone" in names and values.backbone is None else []
  rewards = [name for name in CONVERSIONS if values[f"{name}_prompt"].value is not None]
  names += [name for name in rewards if output is None or not (output / REWARDS_FOLDER / name).exists()]
  names += ["reward_tokenizer"] if rewards else []
  first = {file.flag: file for file in reversed(PUBLISHED)}
  found = [first[name] for name in names if values[name].value is None]
  return sorted(found, key=lambda file: file.repo)
