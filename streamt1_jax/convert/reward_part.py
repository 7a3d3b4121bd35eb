"""A reward model from its published files to a folder that `rewards.folder.load_reward` reads.

  weights ── open ── adapters merged as they are read ── compare ── tensor by tensor ──┐
  instruction text (checksum) ── tokenizer (reward tokens added) ──────────────────────┴─ folder, whole or not at all

One tensor is in memory at a time: HPSv3's 16.6 GB need a fraction of that.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from streamt1_jax.config import ConfigError
from streamt1_jax.convert import engine, hpsv3, peft_merge, qwen2_vl, videoalign, weight_files
from streamt1_jax.convert.lazy import LazyTensor
from streamt1_jax.io import part_writer
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards import prompts
from streamt1_jax.rewards.folder import RewardConfig
from streamt1_jax.rewards.hpsv3 import HPSv3Config
from streamt1_jax.rewards.prompts import PromptTemplate, RewardPrompt


def write(
  output: pathlib.Path,
  weights: pathlib.Path,
  template: PromptTemplate,
  tokenizer: pathlib.Path,
  config: RewardConfig,
  dtype: Any = jnp.bfloat16,
  *,
  lora_rank: int = videoalign.LORA_RANK,
  lora_alpha: float = videoalign.LORA_ALPHA,
) -> None:
  """Converts one reward model.

  Args:
    output: the folder; it must not exist.
    weights: HPSv3.safetensors, VideoAlign's model.pth, or what transformers or peft saved; a file, index or folder.
    template: the instruction text, from `reward_prompts`.
    tokenizer: `tokenizer.json` of the base model or of the reward model.
    config: sizes; an `HPSv3Config` or a `VideoAlignConfig`.
    dtype: dtype of the stored backbone; the head is stored in float32.
    lora_rank: rank of the adapters, if the weights have any.
    lora_alpha: numerator of their scale.

  Raises:
    ConfigError: a file is missing, damaged or another model's; the message names it. Nothing is left behind.
  """
  special = prompts.with_reward_tokens(prompts.read_tokenizer(tokenizer), template)
  RewardPrompt(special, template, config.backbone.decoder.vocab_size)
  tensors = _plain_tensors(weight_files.load(weights), weights)
  if peft_merge.is_peft(tensors):
    tensors = peft_merge.merged(tensors, lora_rank, lora_alpha)
  tensors = {name: tensor for name, tensor in tensors.items() if name not in qwen2_vl.UNUSED}
  table = hpsv3 if isinstance(config, HPSv3Config) else videoalign
  rules = table.rules(config, qwen2_vl.has_new_names(tensors))
  params = reward_folder.abstract_params(config, dtype)
  try:
    pieces = engine.stream(tensors, rules, params)
  except engine.FitError as error:
    raise error.prefixed(str(weights)) from error
  files = {
    reward_folder.REWARD_FILE: reward_folder.config_json_bytes(config),
    prompts.TEMPLATE_FILE: prompts.template_json(template),
    prompts.TOKENIZER_FILE: special.to_str().encode(),
  }
  part_writer.write_part(output, engine.stored_leaves(params, None), pieces, files)


def _plain_tensors(file: weight_files.WeightFile, path: pathlib.Path) -> Mapping[str, LazyTensor]:
  for name, value in file.content.items():
    if not isinstance(name, str) or not isinstance(value, LazyTensor):
      raise ConfigError(f"{path}: {name!r:.80} is a {type(value).__name__}; a reward model's file holds tensors only")
  return file.content
