"""Reward models with random weights in the files that real ones are published in, at any size.

The instruction texts and the vocabulary are stand-ins: a line of text and the tokens of the chat format.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import tokenizers

from streamt1_jax.config import ModelConfig
from streamt1_jax.convert import engine
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io import config_json
from streamt1_jax.measuring import random_weights
from streamt1_jax.measuring.random_weights import Tensor
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.qwen2_vl.config import qwen2_vl_preset
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate
from streamt1_jax.rewards.table import REWARDS

CONFIG_FILE = "config.json"
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<unk>")


def reward_config(name: str, model: ModelConfig) -> Any:
  """Published sizes; with a tiny backbone for the tiny model."""
  spec = REWARDS[name]
  return spec.make_config(qwen2_vl_preset("qwen2_vl_tiny")) if model.name == "tiny" else spec.make_config()


def reward_tensors(name: str, config: Any) -> dict[str, Tensor]:
  """Every tensor of the published file. HPSv3's head is float32; a file with adapters has them as peft left them."""
  conversion = CONVERSIONS[name]
  specs = engine.source_specs(conversion.rules(config, False), REWARDS[name].weight_shapes(config, jnp.float32))
  shapes = {tensor: spec.shape for tensor, spec in specs.items()}
  decoder = config.backbone.decoder
  shapes |= dict.fromkeys(qwen2_vl.UNUSED, (decoder.vocab_size, decoder.dim))
  if conversion.lora is not None:
    shapes = _with_adapters(shapes, conversion.lora[0])
  # With adapters every name has peft's prefix, and the head is bfloat16 like all else.
  dtype = lambda tensor: "float32" if tensor.startswith("rm_head.") else "bfloat16"
  return {n: Tensor(tuple(shape), dtype(n), seed) for seed, (n, shape) in enumerate(shapes.items())}


def _with_adapters(shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
  wrapped = {}
  for name, shape in shapes.items():
    module, _, kind = name.rpartition(".")
    adapted = name.startswith("model.layers.") and module.endswith("_proj")
    wrapped[f"base_model.model.{module}{'.base_layer' if adapted else ''}.{kind}"] = shape
    if adapted and kind == "weight":
      wrapped[f"base_model.model.{module}.lora_A.default.weight"] = (rank, shape[1])
      wrapped[f"base_model.model.{module}.lora_B.default.weight"] = (shape[0], rank)
  return wrapped


def write(path: pathlib.Path, name: str, model: ModelConfig) -> None:
  """Writes a folder of all that `convert_arguments` names."""
  path.mkdir()
  config, file = reward_config(name, model), CONVERSIONS[name].file
  write_weights = random_weights.write_torch if file.endswith(".pth") else random_weights.write_safetensors
  write_weights(path / file, reward_tensors(name, config))
  tokens = REWARDS[name].required_text.reward_tokens
  template = PromptTemplate("stand-in", f"{prompts.PLACEHOLDER} {' '.join(tokens)}", tokens)
  (path / prompts.TEMPLATE_FILE).write_bytes(prompts.template_json(template))
  words = {word: index for index, word in enumerate(_CHAT)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  tokenizer.add_special_tokens(list(_CHAT))
  tokenizer.save(str(path / prompts.TOKENIZER_FILE))
  (path / CONFIG_FILE).write_text(json.dumps(config_json.to_json_value(config)))


def convert_arguments(name: str) -> tuple[str, ...]:
  """Arguments of `experiments.convert`; `{path}` stands for the folder."""
  return (
    f"--{name}={{path}}/{CONVERSIONS[name].file}",
    f"--{name}_prompt={{path}}/{prompts.TEMPLATE_FILE}",
    f"--{name}_config={{path}}/{CONFIG_FILE}",
    "--reward_tokenizer={path}",
  )
