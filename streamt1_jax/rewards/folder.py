"""A reward model on disk, and what it is once loaded.

<folder>/
  part.json and parameters     as of every part of a checkpoint
  reward.json                  which reward it is, its sizes and constants
  prompt_template.json         its instruction text
  tokenizer.json               its tokenizer, reward tokens included
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from etils import epath
from jax.sharding import Mesh

from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint, config_json, part_files
from streamt1_jax.parallel.sharding import placed
from streamt1_jax.rewards import hpsv3, prompts, videoalign
from streamt1_jax.rewards.base import LoadedReward
from streamt1_jax.rewards.hpsv3 import HPSv3, HPSv3Config
from streamt1_jax.rewards.prompts import PromptTemplate, RewardPrompt
from streamt1_jax.rewards.qwen2_vl.model import PromptEmbedding
from streamt1_jax.rewards.videoalign import VideoAlign, VideoAlignConfig
from streamt1_jax.typing import Params

REWARD_FILE = "reward.json"
REWARDS_FOLDER = "rewards"
"""Folder of a checkpoint that holds its reward models, each in a folder named after it."""
RewardConfig = HPSv3Config | VideoAlignConfig
REWARD_CONFIGS = {"hpsv3": HPSv3Config, "videoalign": VideoAlignConfig}


def reward_name(config: RewardConfig) -> str:
  """Which reward it is a configuration of."""
  return next(name for name, config_type in REWARD_CONFIGS.items() if isinstance(config, config_type))


def config_json_bytes(config: RewardConfig) -> bytes:
  """Content of `reward.json`."""
  content = {
    "format_version": part_files.FORMAT_VERSION,
    "reward": reward_name(config),
    "config": config_json.to_json_value(config),
  }
  return (json.dumps(content, indent=2) + "\n").encode()


def load_config(folder: epath.PathLike) -> RewardConfig:
  """Sizes and constants of the reward in `folder`. Raises ConfigError if it is no reward or the file is damaged."""
  path = epath.Path(folder) / REWARD_FILE
  content = part_files.read_json_object(epath.Path(folder), REWARD_FILE, "a reward model")
  part_files.require_version(content, path)
  if content.get("reward") not in REWARD_CONFIGS:
    raise ConfigError(f"{path}: reward must be one of {', '.join(REWARD_CONFIGS)}, got {content.get('reward')!r:.60}")
  return config_json.from_json_value(REWARD_CONFIGS[content["reward"]], content.get("config"), f"{path}: config")


def require_template(config: RewardConfig, template: PromptTemplate) -> None:
  """Raises ConfigError unless the text has as many reward tokens as the reward reads."""
  expected = len(prompts.REWARD_TOKENS[reward_name(config)])
  if len(template.reward_tokens) != expected:
    raise ConfigError(
      f"the prompt template of {template.model} has {len(template.reward_tokens)} reward tokens, "
      f"{reward_name(config)} reads {expected}"
    )


def abstract_params(config: RewardConfig, dtype: Any = jnp.float32) -> Params:
  """Shapes of the parameters; the backbone in `dtype`, the head in float32."""
  module = hpsv3 if isinstance(config, HPSv3Config) else videoalign
  return module.abstract_params(config, dtype)


def save_reward(
  folder: epath.PathLike,
  config: RewardConfig,
  params: Params,
  template: PromptTemplate,
  tokenizer: tokenizers.Tokenizer,
  dtype: Any = jnp.float16,
) -> None:
  """Writes a reward model trained here; converted ones are written by `convert.reward_part`.

  Args:
    folder: what `load_reward` will read; an earlier reward there is replaced when the new one is whole.
    config: sizes and constants.
    params: weights, as of `abstract_params`.
    template: the instruction text.
    tokenizer: its tokenizer, reward tokens included.
    dtype: dtype of the stored backbone; the head is stored in float32.

  Raises:
    ConfigError: a weight is not finite or too large for `dtype`, tokenizer and sizes do not fit, the folder holds
      something else, or the file system refuses.
  """
  target = epath.Path(folder)
  RewardPrompt(tokenizer, template, config.backbone.decoder.vocab_size)
  stored = params | {"backbone": jax.tree.map(lambda leaf: leaf.astype(dtype), params["backbone"])}
  files = {
    REWARD_FILE: config_json_bytes(config),
    prompts.TEMPLATE_FILE: prompts.template_json(template),
    prompts.TOKENIZER_FILE: tokenizer.to_str().encode(),
  }
  checkpoint.save_params(target, stored, files=files)


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
  """Turns a caption into embeddings on the host, so that the table, 1.1 GB of HPSv3 in bfloat16, is on no device.

  Attributes:
    prompt: turns it into tokens.
    table: [vocab_size, dim], a row for each token.
  """

  prompt: RewardPrompt
  table: np.ndarray

  def __call__(self, caption: str) -> PromptEmbedding:
    """Raises ConfigError as `RewardPrompt`."""
    tokens = self.prompt(caption)
    return PromptEmbedding(self.table[tokens.before], self.table[tokens.after], tokens.reward_index)


def with_table(params: Params, table: Any) -> Params:
  """Parameters of a reward with another table of token embeddings."""
  backbone = params["backbone"]
  return params | {"backbone": backbone | {"decoder": backbone["decoder"] | {"token_embedding": table}}}


def without_table(params: Params) -> Params:
  """Shapes of the parameters of a reward whose prompts are embedded on the host: its table has no rows."""
  table = params["backbone"]["decoder"]["token_embedding"]
  return with_table(params, jax.ShapeDtypeStruct((0, *table.shape[1:]), table.dtype, sharding=table.sharding))


def load_prompt(folder: epath.PathLike) -> RewardPrompt:
  """What turns captions into the tokens of the reward in `folder`. No weight is read.

  Raises ConfigError if a file is missing, damaged or does not fit the others.
  """
  folder = epath.Path(folder)
  config, template = load_config(folder), prompts.load_template(folder)
  require_template(config, template)
  return RewardPrompt(folder / prompts.TOKENIZER_FILE, template, config.backbone.decoder.vocab_size)


def load_reward(
  folder: epath.PathLike,
  *,
  fps: float,
  dtype: Any = jnp.bfloat16,
  mesh: Mesh | None = None,
  embed_on_host: bool = False,
) -> LoadedReward:
  """Reads a reward model.

  Args:
    folder: what `experiments.convert` or a training wrote.
    fps: frames per second of the videos to be judged; used by VideoAlign.
    dtype: dtype of the backbone; int8 quantises its kernels while they are read, see `qwen2_vl.abstract_params`.
    mesh: devices that share the weights; None for one.
    embed_on_host: whether prompts are embedded on the host; the device then needs no table of embeddings.

  Raises:
    ConfigError: a file is missing, damaged or does not fit the others.
  """
  folder = epath.Path(folder)
  config = load_config(folder)
  prompt = load_prompt(folder)
  abstract = placed(mesh, "reward", abstract_params(config, dtype))
  if embed_on_host:
    params = checkpoint.load_params(folder, abstract, on_host=["backbone/decoder/token_embedding"])
    prompt = EmbeddedPrompt(prompt, params["backbone"]["decoder"]["token_embedding"])
    # Of no size, but the model has a place for it.
    params = with_table(params, _zeros(without_table(abstract)["backbone"]["decoder"]["token_embedding"]))
  else:
    params = checkpoint.load_params(folder, abstract)
  reward = HPSv3(config) if isinstance(config, HPSv3Config) else VideoAlign(fps, config)
  return LoadedReward(reward, params, prompt)


def _zeros(wanted: jax.ShapeDtypeStruct) -> jax.Array:
  zeros = np.zeros(wanted.shape, wanted.dtype)
  if wanted.sharding is None:
    return jax.device_put(zeros)
  return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: zeros[index])
