"""Reward folders of tiny random models, as a checkpoint has them, and a tokenizer that knows a few words."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import tokenizers

from streamt1_jax.convert import engine, peft_merge
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io.part_files import PART_FILE
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.hpsv3 import HPSv3Config
from streamt1_jax.rewards.qwen2_vl import loading, prompts
from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, Qwen2VLConfig, VisionConfig
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.rewards.videoalign import VideoAlignConfig

BACKBONE = Qwen2VLConfig(
  VisionConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, patch_size=4),
  DecoderConfig(dim=16, ffn_dim=24, num_heads=2, num_kv_heads=1, num_layers=2, vocab_size=40),
)
_PIXELS = {"min_pixels": 16 * 24, "max_pixels": 16 * 24}
CONFIGS = {
  "hpsv3": HPSv3Config(BACKBONE, head_dims=(12, 6), **_PIXELS),
  "videoalign": VideoAlignConfig(BACKBONE, **_PIXELS),
}
_TEXTS = {
  "hpsv3": "\nRate: {text_prompt} <|Reward|>\n",
  "videoalign": "\nRate: <|VQ_reward|> <|MQ_reward|>\n{text_prompt} <|TA_reward|>\n",
}
_WORDS = ("<unk>", "rate", "a", "red", "blue", "circle", "square", "moves", "left", "right")
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def _tokenizer() -> tokenizers.Tokenizer:
  words = {word: index for index, word in enumerate((*_WORDS, *_SPECIAL))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(list(_SPECIAL))
  return tokenizer


def spec_of(config) -> RewardSpec:
  """The reward that `config` belongs to."""
  return next(spec for spec in REWARDS.values() if spec.config_type is type(config))


def abstract_params(config, dtype=np.float32):
  """Shapes of the parameters of the reward that `config` belongs to."""
  return spec_of(config).abstract_params(config, dtype)


def convert(tensors: Mapping[str, np.ndarray], config, dtype=np.float32, lora: tuple[int, int] | None = None):
  """Parameters in memory from the tensors of a published checkpoint; `lora` is another rank and alpha."""
  conversion = CONVERSIONS[spec_of(config).name]
  if peft_merge.is_peft(tensors):
    tensors = peft_merge.merged(tensors, *(lora or conversion.lora))
  rules = conversion.rules(config, qwen2_vl.has_new_names(tensors))
  return engine.convert(tensors, rules, abstract_params(config, dtype), ignore=qwen2_vl.UNUSED)


def random_params(config):
  """Every parameter filled; scales differ from 1 and biases from 0."""
  generator = np.random.default_rng(0)
  scale = lambda leaf: leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.5
  fill = lambda leaf: (generator.normal(size=leaf.shape) * scale(leaf) + 0.1).astype(np.float32)
  return jax.tree.map(fill, abstract_params(config))


def save_reward(path: pathlib.Path, model: str) -> pathlib.Path:
  """A folder that `load_reward` reads; `model` is "hpsv3" or "videoalign"."""
  spec, config = REWARDS[model], CONFIGS[model]
  template = PromptTemplate("toy", _TEXTS[model], spec.text.reward_tokens)
  tokenizer = prompts.with_reward_tokens(_tokenizer(), template)
  files = loading.files(spec, config, template, tokenizer)
  folder.save_reward(path, spec, config, random_params(config), files)
  return path


def resize(path: pathlib.Path, section: str, field: str, size: int) -> None:
  """Writes another size into the config of the reward in `path`, which is then recorded as if it had been saved so."""
  config, part = path / "reward.json", path / PART_FILE
  document = json.loads(config.read_text())
  document["config"]["backbone"][section][field] = size
  config.write_text(json.dumps(document))
  recorded, data = json.loads(part.read_text()), config.read_bytes()
  recorded["files"][config.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
  part.write_text(json.dumps(recorded))
