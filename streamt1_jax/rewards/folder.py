"""A reward model on disk, and what it is once loaded.

<folder>/
  part.json and parameters     as of every part of a checkpoint
  reward.json                  which reward it is, its sizes and constants
  prompt_template.json         its instruction text
  tokenizer.json               its tokenizer, reward tokens included
"""

import json
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint, config_json, part_files
from streamt1_jax.rewards import hpsv3, prompts, videoalign
from streamt1_jax.rewards.hpsv3 import HPSv3, HPSv3Config
from streamt1_jax.rewards.prompts import RewardPrompt
from streamt1_jax.rewards.videoalign import VideoAlign, VideoAlignConfig
from streamt1_jax.typing import Params

REWARD_FILE = "reward.json"
RewardConfig = HPSv3Config | VideoAlignConfig
_CONFIGS = {"hpsv3": HPSv3Config, "videoalign": VideoAlignConfig}


class LoadedReward(NamedTuple):
  """A reward ready to judge.

  Attributes:
    reward: an `ImageReward` (HPSv3) or a `VideoReward` (VideoAlign).
    params: its weights.
    prompt: turns a caption into the `prompt_features` of `reward.init`.
  """

  reward: HPSv3 | VideoAlign
  params: Params
  prompt: RewardPrompt


def config_json_bytes(config: RewardConfig) -> bytes:
  """Content of `reward.json`."""
  name = next(name for name, config_type in _CONFIGS.items() if isinstance(config, config_type))
  content = {
    "format_version": part_files.FORMAT_VERSION,
    "reward": name,
    "config": config_json.to_json_value(config),
  }
  return (json.dumps(content, indent=2) + "\n").encode()


def load_config(folder: epath.PathLike) -> RewardConfig:
  """Sizes and constants of the reward in `folder`. Raises ConfigError if it is no reward or the file is damaged."""
  path = epath.Path(folder) / REWARD_FILE
  content = part_files.read_json_object(epath.Path(folder), REWARD_FILE, "a reward model")
  part_files.require_version(content, path)
  if content.get("reward") not in _CONFIGS:
    raise ConfigError(f"{path}: reward must be one of {', '.join(_CONFIGS)}, got {content.get('reward')!r:.60}")
  return config_json.from_json_value(_CONFIGS[content["reward"]], content.get("config"), f"{path}: config")


def abstract_params(config: RewardConfig, dtype: Any = jnp.float32) -> Params:
  """Shapes of the parameters; the backbone in `dtype`, the head in float32."""
  module = hpsv3 if isinstance(config, HPSv3Config) else videoalign
  return module.abstract_params(config, dtype)


def load_reward(folder: epath.PathLike, *, fps: float, dtype: Any = jnp.bfloat16) -> LoadedReward:
  """Reads a reward model.

  Args:
    folder: what `convert.reward_part.write` wrote.
    fps: frames per second of the videos to be judged; used by VideoAlign.
    dtype: dtype of the backbone.

  Raises:
    ConfigError: a file is missing, damaged or does not fit the others.
  """
  folder = epath.Path(folder)
  config = load_config(folder)
  prompt = RewardPrompt(
    folder / prompts.TOKENIZER_FILE, prompts.load_template(folder), config.backbone.decoder.vocab_size
  )
  params = checkpoint.load_params(folder, abstract_params(config, dtype))
  reward = HPSv3(config) if isinstance(config, HPSv3Config) else VideoAlign(fps, config)
  return LoadedReward(reward, params, prompt)
