"""Turns published weights into a checkpoint folder that `experiments.generate` takes. Needs no PyTorch.

  python -m experiments.convert --model=wan_1_3b --output=checkpoints/longlive \
    --backbone=longlive_base.pt --lora=lora.pt --lora_alpha=256 \
    --vae=Wan2.1_VAE.pth --text_encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl/spiece.model
  python -m experiments.generate --checkpoint=checkpoints/longlive --prompt="a panda reads a newspaper"

The reward models are optional parts, `rewards/hpsv3` and `rewards/videoalign`, and may be added at any time:

  python -m experiments.convert --model=wan_1_3b --output=checkpoints/longlive --reward_tokenizer=tokenizer.json \
    --hpsv3=HPSv3.safetensors --hpsv3_prompt=hpsv3-1.0.0-py3-none-any.whl \
    --videoalign=VideoReward --videoalign_prompt=prompt_template.py

Which flavour a file is (Wan, diffusers, Hugging Face, a training program's) is told from its content. Parts may come
in several runs; the folder becomes a checkpoint when the last one is there, and a part that is done is skipped.
`--dry_run` says what would be done and what is missing. Exit codes: 0; 2 for bad input, after which nothing
half-written is left; 130 when interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import pathlib
import time

from absl import flags

from streamt1_jax.cli import common
from streamt1_jax.config import PRESETS, ConfigError, ModelConfig, preset
from streamt1_jax.convert import engine, execute, plan, reward_part
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io import checkpoint, config_json
from streamt1_jax.pipeline import TOKENIZER_FILE

DTYPES = ("bfloat16", "float32", "float16")
_PUBLISHED = {
  "backbone": "diffusion_pytorch_model.safetensors, transformer/, longlive_base.pt or alike",
  "codec": "Wan2.1_VAE.pth or vae/",
  "text": "models_t5_umt5-xxl-enc-bf16.pth or text_encoder/",
  TOKENIZER_FILE: "spiece.model",
}

_MODEL = flags.DEFINE_string(
  "model", "wan_1_3b", f"Preset ({', '.join(sorted(PRESETS))}), or a JSON file like `model` in a config.json."
)
_BACKBONE = common.define_path("backbone", None, "Weights of the DiT: file, index of shards, or folder.", url=False)
_ENTRY = flags.DEFINE_string("backbone_entry", None, "Entry of a .pt file: generator, generator_ema, model, ...")
_LORA = common.define_path("lora", None, "LoRA adapter that is merged into the backbone.", url=False)
_LORA_ALPHA = common.define_float("lora_alpha", None, "The adapter's alpha, where its files do not say it.")
_VAE = common.define_path("vae", None, "Weights of the video VAE.", url=False)
_TEXT_ENCODER = common.define_path("text_encoder", None, "Weights of the UMT5 encoder.", url=False)
_TOKENIZER = common.define_path("tokenizer", None, "Sentencepiece model, or the folder of spiece.model.", url=False)
_REWARDS = {
  name: (
    common.define_path(name, None, f"Weights of this reward model: {conversion.weights}.", url=False),
    common.define_path(f"{name}_prompt", None, f"Its text: {conversion.text}.", url=False),
    common.define_path(f"{name}_config", None, "Other sizes: a JSON file like `config` in a reward.json.", url=False),
  )
  for name, conversion in CONVERSIONS.items()
}
_REWARD_TOKENIZER = common.define_path("reward_tokenizer", None, "tokenizer.json of Qwen2-VL or its folder.", url=False)
_OUTPUT = common.define_path("output", None, "The checkpoint folder.", url=False)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Dtype of the stored weights.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what would be done, and what is missing.")


def _path(flag: flags.FlagHolder) -> pathlib.Path | None:
  return None if flag.value is None else pathlib.Path(flag.value).expanduser()


def read_model() -> ModelConfig:
  """The model of the flags."""
  if not _MODEL.value.endswith(".json"):
    try:
      return preset(_MODEL.value)
    except ConfigError as error:
      raise ConfigError(f"--model: {error}; or the path of a .json file") from error
  path = pathlib.Path(_MODEL.value)
  if not path.is_file():
    raise ConfigError(f"--model {path} does not exist")
  return checkpoint.model_config_from_dict(config_json.parse_strict_json(path.read_text(), str(path)), str(path))


def reward_sources() -> list[reward_part.RewardSources]:
  """The reward models of the flags."""
  given = []
  for name, (weights, prompt, config) in _REWARDS.items():
    if weights.value is None:
      stray = [flag.name for flag in (prompt, config) if flag.value is not None]
      if stray:
        raise ConfigError(f"--{stray[0]} needs --{name}, the weights it belongs to")
      continue
    paths = (_path(flag) for flag in (weights, prompt, _REWARD_TOKENIZER, config))
    given.append(reward_part.RewardSources(name, *paths))
  if not given and _REWARD_TOKENIZER.value is not None:
    raise ConfigError(f"--reward_tokenizer needs --{' or --'.join(_REWARDS)}, the weights it belongs to")
  return given


def dry_run(model: ModelConfig, plans: list[plan.PartPlan], output: pathlib.Path | None) -> None:
  """Prints what a conversion would do, and what it would leave missing."""
  for part in plans:
    print("\n".join(plan.describe(part, _DTYPE.value)))
  if _TOKENIZER.value is not None:
    print(f"{TOKENIZER_FILE}: {len(execute.read_tokenizer(_path(_TOKENIZER), model)):,} bytes")
  print(f"in all {sum(part.stored_bytes(_DTYPE.value) for part in plans):,} bytes to write")
  print_missing(execute.lacking(output, model, [part.part for part in plans], _TOKENIZER.value is not None))


def print_missing(lacking: list[str]) -> None:
  for name in lacking:
    flag = plan.FLAGS.get(name, "--tokenizer")
    print(f"missing: {name}, from {flag} ({_PUBLISHED[name]})")


def main() -> None:
  model = read_model()
  sources = plan.Sources(
    _path(_BACKBONE), _ENTRY.value, _path(_LORA), _LORA_ALPHA.value, _path(_VAE), _path(_TEXT_ENCODER)
  )
  rewards = reward_sources()
  parts = (sources.backbone, sources.vae, sources.text_encoder, _TOKENIZER.value, sources.lora, *rewards)
  if not any((*parts, _DRY_RUN.value)):
    names = ", --".join(("backbone", "vae", "text_encoder", "tokenizer", *_REWARDS))
    raise ConfigError(f"nothing to convert; give one of --{names}")
  if _OUTPUT.value is None and not _DRY_RUN.value:
    raise ConfigError("--output is missing; give the folder of the checkpoint, or --dry_run")
  try:
    plans = [*plan.make_plans(model, sources), *map(reward_part.make_plan, rewards)]
  except engine.FitError as error:
    if _DRY_RUN.value:
      print(error)
    raise ConfigError(error.line) from error
  if _DRY_RUN.value:
    dry_run(model, plans, _path(_OUTPUT))
    return
  start = time.perf_counter()
  lacking = execute.execute(model, plans, _path(_TOKENIZER), _path(_OUTPUT), _DTYPE.value)
  print_missing(lacking)
  state = "is not complete yet" if lacking else "is a checkpoint"
  print(f"{_OUTPUT.value} {state} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
  common.run(main)
