"""Reward models with random weights in the files that real ones are published in, at any size.

The instruction texts and the vocabulary are stand-ins: a line of text and the tokens of the chat format.
"""

from __future__ import annotations

import json
import pathlib

import tokenizers

from streamt1_jax.config import ModelConfig
from streamt1_jax.convert import engine
from streamt1_jax.convert.tables import hpsv3, qwen2_vl, videoalign
from streamt1_jax.io import config_json
from streamt1_jax.measuring import random_weights
from streamt1_jax.measuring.random_weights import Tensor
from streamt1_jax.rewards import folder, prompts
from streamt1_jax.rewards.folder import RewardConfig
from streamt1_jax.rewards.hpsv3 import HPSv3Config
from streamt1_jax.rewards.prompts import REWARD_TOKENS, PromptTemplate
from streamt1_jax.rewards.qwen2_vl.config import qwen2_vl_preset
from streamt1_jax.rewards.videoalign import VideoAlignConfig

WEIGHTS = {"hpsv3": "HPSv3.safetensors", "videoalign": "model.pth"}
CONFIG_FILE = "config.json"
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<unk>")


def reward_config(name: str, model: ModelConfig) -> RewardConfig:
  """Published sizes, or tiny ones for the tiny model."""
  if model.name != "tiny":
    return folder.REWARD_CONFIGS[name]()
  backbone = qwen2_vl_preset("qwen2_vl_tiny")
  return HPSv3Config(backbone, head_dims=(16, 8)) if name == "hpsv3" else VideoAlignConfig(backbone)


def reward_tensors(name: str, config: RewardConfig) -> dict[str, Tensor]:
  """Every tensor of the published file: HPSv3's head in float32; VideoAlign's adapters as peft left them."""
  table = hpsv3 if name == "hpsv3" else videoalign
  shapes = {
    n: spec.shape for n, spec in engine.source_specs(table.rules(config), folder.abstract_params(config)).items()
  }
  decoder = config.backbone.decoder
  shapes |= dict.fromkeys(qwen2_vl.UNUSED, (decoder.vocab_size, decoder.dim))
  if name == "videoalign":
    shapes = _with_adapters(shapes)
  dtype = lambda tensor: "float32" if name == "hpsv3" and tensor.startswith("rm_head.") else "bfloat16"
  return {n: Tensor(tuple(shape), dtype(n), seed) for seed, (n, shape) in enumerate(shapes.items())}


def _with_adapters(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  wrapped = {}
  for name, shape in shapes.items():
    module, _, kind = name.rpartition(".")
    adapted = name.startswith("model.layers.") and module.endswith("_proj")
    wrapped[f"base_model.model.{module}{'.base_layer' if adapted else ''}.{kind}"] = shape
    if adapted and kind == "weight":
      wrapped[f"base_model.model.{module}.lora_A.default.weight"] = (videoalign.LORA_RANK, shape[1])
      wrapped[f"base_model.model.{module}.lora_B.default.weight"] = (shape[0], videoalign.LORA_RANK)
  return wrapped


def write(path: pathlib.Path, name: str, model: ModelConfig) -> None:
  """A folder of all that `convert_arguments` names."""
  path.mkdir()
  config = reward_config(name, model)
  write_weights = random_weights.write_safetensors if name == "hpsv3" else random_weights.write_torch
  write_weights(path / WEIGHTS[name], reward_tensors(name, config))
  template = PromptTemplate("stand-in", f"{prompts.PLACEHOLDER} {' '.join(REWARD_TOKENS[name])}", REWARD_TOKENS[name])
  (path / prompts.TEMPLATE_FILE).write_bytes(prompts.template_json(template))
  words = {word: index for index, word in enumerate(_CHAT)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  tokenizer.add_special_tokens(list(_CHAT))
  tokenizer.save(str(path / prompts.TOKENIZER_FILE))
  (path / CONFIG_FILE).write_text(json.dumps(config_json.to_json_value(config)))


def convert_arguments(name: str) -> tuple[str, ...]:
  """Of `experiments.convert`; `{path}` stands for the folder."""
  return (
    f"--{name}={{path}}/{WEIGHTS[name]}",
    f"--{name}_prompt={{path}}/{prompts.TEMPLATE_FILE}",
    f"--{name}_config={{path}}/{CONFIG_FILE}",
    "--reward_tokenizer={path}",
  )
