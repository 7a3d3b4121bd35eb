"""Turns published weights into a checkpoint folder that `streamt1 generate` takes. Needs no PyTorch.

  streamt1 convert --model=wan_1_3b --output=checkpoints/longlive \
    --backbone=longlive_base.pt --lora=lora.pt --lora_alpha=256 \
    --vae=Wan2.1_VAE.pth --text_encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl/tokenizer.json
  streamt1 generate --checkpoint=checkpoints/longlive --prompt="a panda reads a newspaper"

The reward models are optional parts, `rewards/hpsv3` and `rewards/videoalign`, and may be added at any time:

  streamt1 convert --model=wan_1_3b --output=checkpoints/longlive --reward_tokenizer=tokenizer.json \
    --hpsv3=HPSv3.safetensors --hpsv3_prompt=hpsv3-1.0.0-py3-none-any.whl \
    --videoalign=VideoReward --videoalign_prompt=prompt_template.py

`--from_hub` downloads the published files that no flag gives and no part was made from, and needs the extra `hub`:

  streamt1 convert --from_hub --output=checkpoints/longlive

Which flavour a file is (Wan, diffusers, Hugging Face, a training program's) is told from its content. Parts may come
in several runs; the folder becomes a checkpoint when the last one is there, and a part that is done is skipped.
`--dry_run` says what would be done and what is missing. Exit codes: 0; 2 for bad input, after which nothing
half-written is left; 130 when interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import os.path
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags

from streamt1_jax.cli import command, flag_types, hub_sources
from streamt1_jax.config import PRESETS, ConfigError, ModelConfig, preset
from streamt1_jax.convert import engine, execute, plan, reward_part
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io import checkpoint, config_json
from streamt1_jax.io.checkpoint import TOKENIZER_FILE

DTYPES = ("bfloat16", "float32", "float16")
_PUBLISHED = {
  "backbone": "diffusion_pytorch_model.safetensors, transformer/, longlive_base.pt or alike",
  "codec": "Wan2.1_VAE.pth or vae/",
  "text": "models_t5_umt5-xxl-enc-bf16.pth or text_encoder/",
  TOKENIZER_FILE: "spiece.model, or tokenizer.json as Wan reads it",
}


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  path = lambda name, meaning: flag_types.define_path(values, name, None, meaning, url=False)
  flag_types.define_string(
    values, "model", "wan_1_3b", f"Preset ({', '.join(sorted(PRESETS))}), or a JSON file like `model` in a config.json."
  )
  path("backbone", "Weights of the DiT: file, index of shards, or folder.")
  flag_types.define_string(values, "backbone_entry", None, "Entry of a .pt file: generator, generator_ema, model, ...")
  path("lora", "LoRA adapter that is merged into the backbone.")
  flag_types.define_float(values, "lora_alpha", None, "The adapter's alpha, where its files do not say it.")
  path("vae", "Weights of the video VAE.")
  path("text_encoder", "Weights of the UMT5 encoder.")
  path("tokenizer", "tokenizer.json, as Wan reads it, or the sentencepiece model spiece.model; or their folder.")
  for name, conversion in CONVERSIONS.items():
    path(name, f"Weights of this reward model: {conversion.file}, or its folder.")
    path(f"{name}_prompt", f"Its text: {conversion.text}.")
    path(f"{name}_config", "Other sizes: a JSON file like `config` in a reward.json.")
  path("reward_tokenizer", "tokenizer.json of Qwen2-VL or its folder.")
  hub_sources.define(values)
  path("output", "The checkpoint folder.")
  flag_types.define_choice(values, "dtype", "bfloat16", DTYPES, "Dtype of the stored weights.")
  flag_types.define_switch(values, "dry_run", False, "Only say what would be done, and what is missing.")


def _path(path: str | None) -> pathlib.Path | None:
  return None if path is None else pathlib.Path(path)


def read_model(name: str) -> ModelConfig:
  """The model that --model means."""
  if not name.endswith(".json"):
    try:
      return preset(name)
    except ConfigError as error:
      raise ConfigError(f"--model: {error}; or the path of a .json file") from error
  path = pathlib.Path(os.path.expanduser(name))
  if not path.is_file():
    raise ConfigError(f"--model {name} does not exist")
  return checkpoint.model_config_from_dict(config_json.read_json(path, f"--model {name}"), name)


def reward_sources(values: flags.FlagValues) -> list[reward_part.RewardSources]:
  """The reward models of the flags."""
  given = []
  for name in CONVERSIONS:
    weights, prompt, config = (values[f"{name}{end}"].value for end in ("", "_prompt", "_config"))
    if weights is None:
      stray = [flag for flag, value in ((f"{name}_prompt", prompt), (f"{name}_config", config)) if value is not None]
      if stray:
        raise ConfigError(f"--{stray[0]} needs --{name}, the weights it belongs to")
      continue
    paths = map(_path, (weights, prompt, values.reward_tokenizer, config))
    given.append(reward_part.RewardSources(name, *paths))
  if not given and values.reward_tokenizer is not None:
    raise ConfigError(f"--reward_tokenizer needs --{' or --'.join(CONVERSIONS)}, the weights it belongs to")
  return given


def dry_run(values: flags.FlagValues, model: ModelConfig, plans: list[plan.PartPlan]) -> None:
  """Prints what a conversion would do, and what it would leave missing."""
  tokenizer = _path(values.tokenizer)
  for part in plans:
    print("\n".join(plan.describe(part, values.dtype)))
  if tokenizer is not None:
    given = execute.read_tokenizer(tokenizer, model)
    print(f"{given.name}: {len(given.content):,} bytes")
  print(f"in all {sum(part.stored_bytes(values.dtype) for part in plans):,} bytes to write")
  print_missing(execute.lacking(_path(values.output), model, [part.part for part in plans], tokenizer is not None))


def print_missing(lacking: list[str]) -> None:
  for name in lacking:
    flag = plan.FLAGS.get(name, "--tokenizer")
    print(f"missing: {name}, from {flag} ({_PUBLISHED[name]})")


def run(values: flags.FlagValues) -> None:
  """Converts what the flags name."""
  model = read_model(values.model)
  hub_sources.fetch_missing(values, model)
  sources = plan.Sources(
    _path(values.backbone),
    values.backbone_entry,
    _path(values.lora),
    values.lora_alpha,
    _path(values.vae),
    _path(values.text_encoder),
  )
  rewards = reward_sources(values)
  parts = (sources.backbone, sources.vae, sources.text_encoder, values.tokenizer, sources.lora, *rewards)
  if not any((*parts, values.dry_run)):
    names = ", --".join(("backbone", "vae", "text_encoder", "tokenizer", *CONVERSIONS))
    raise ConfigError(f"nothing to convert; give one of --{names}")
  output = _path(values.output)
  if output is None and not values.dry_run:
    raise ConfigError("--output is missing; give the folder of the checkpoint, or --dry_run")
  try:
    plans = [*plan.make_plans(model, sources), *map(reward_part.make_plan, rewards)]
  except engine.FitError as error:
    if values.dry_run:
      print(error)
    raise ConfigError(error.line) from error
  if output is None or values.dry_run:
    dry_run(values, model, plans)
    return
  start = time.perf_counter()
  lacking = execute.execute(model, plans, _path(values.tokenizer), output, values.dtype, print)
  print_missing(lacking)
  state = "is not complete yet" if lacking else "is a checkpoint"
  print(f"{values.output} {state} ({time.perf_counter() - start:.0f} s)")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
