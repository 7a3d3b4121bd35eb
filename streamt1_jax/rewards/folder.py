"""A reward with weights on disk, and what it is once loaded.

<folder>/
  part.json and parameters     as in every part of a checkpoint
  reward.json                  which reward it is, its sizes and constants
  further files                what its prompt reader needs, such as prompt_template.json and tokenizer.json
"""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from streamt1_jax.config import ConfigError, required
from streamt1_jax.io import checkpoint, config_json, part_files
from streamt1_jax.messages import shortened
from streamt1_jax.parallel.sharding import placed
from streamt1_jax.rewards.base import LoadedReward, PromptReader, read_nothing
from streamt1_jax.rewards.spec import RewardSpec, RewardTable
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.typing import Params

REWARD_FILE = "reward.json"
REWARDS_FOLDER = "rewards"
"""Folder of a checkpoint that holds its rewards, each in a folder named after it."""


def config_json_bytes(spec: RewardSpec, config: Any) -> bytes:
  """Content of `reward.json`."""
  content = {
    "format_version": part_files.FORMAT_VERSION,
    "reward": spec.name,
    "config": config_json.to_json_value(config),
  }
  return (json.dumps(content, indent=2) + "\n").encode()


def load_config(folder: epath.PathLike, table: RewardTable = REWARDS) -> tuple[RewardSpec, Any]:
  """Which reward is in `folder`, and its sizes and constants.

  Raises ConfigError if it is no reward of the table, or the file is damaged.
  """
  path = epath.Path(folder) / REWARD_FILE
  content = part_files.read_json_object(epath.Path(folder), REWARD_FILE, "a reward model")
  part_files.require_version(content, path)
  stored = {name: spec for name, spec in table.items() if spec.is_stored}
  found = content.get("reward")
  if not isinstance(found, str) or found not in stored:
    raise ConfigError(f"{path}: reward must be one of {', '.join(stored)}, got {shortened(found)}")
  spec = stored[found]
  config_type = required(spec.config_type, f"the configuration of {spec.name}")
  return spec, config_json.from_json_value(config_type, content.get("config"), f"{path}: config")


def save_reward(
  folder: epath.PathLike,
  spec: RewardSpec,
  config: Any,
  params: Params,
  files: Mapping[str, bytes] | None = None,
) -> None:
  """Writes a reward with weights; published ones are converted by `convert.reward_part`.

  Args:
    folder: what `load_reward` will read, `rewards/<name>` of a checkpoint. An earlier reward there is replaced when the
      new one is whole.
    spec: the reward.
    config: its sizes and constants, of type `spec.config_type`.
    params: its weights, with the shapes of `spec.abstract_params`; stored in their own dtypes.
    files: further files, name to content, for `spec.read_prompt`.

  Raises:
    ConfigError: a weight is not finite, the folder holds something else, or the file system refuses.
  """
  checkpoint.save_params(folder, params, files={REWARD_FILE: config_json_bytes(spec, config), **(files or {})})


def load_reward(
  folder: epath.PathLike,
  *,
  fps: float,
  dtype: Any = jnp.bfloat16,
  mesh: Mesh | None = None,
  embed_on_host: bool = False,
  table: RewardTable = REWARDS,
) -> LoadedReward:
  """Reads a reward with weights.

  Args:
    folder: what `save_reward` or a conversion wrote.
    fps: frames per second of the videos to be judged.
    dtype: dtype of the weights, as `spec.abstract_params` takes it. For the published models it is that of the
      backbone; int8 quantises its kernels while they are read, see `qwen2_vl.model.backbone_in`.
    mesh: devices that share the weights; None for one.
    embed_on_host: whether weights that only prompts need may stay on the host.
    table: the rewards there are.

  Raises:
    ConfigError: a file is missing, damaged or does not fit the others.
  """
  folder = epath.Path(folder)
  spec, config = load_config(folder, table)
  abstract = placed(mesh, spec.layout, spec.weight_shapes(config, dtype))
  params, prompt = (spec.load or load_weights)(spec, folder, config, abstract, embed_on_host)
  return LoadedReward(spec.make(config, fps), params, prompt)


def load_prompt(folder: epath.PathLike, table: RewardTable = REWARDS) -> PromptReader:
  """What reads captions for the reward in `folder`. No weight is read.

  Raises ConfigError if a file is missing, damaged or does not fit the others.
  """
  spec, config = load_config(folder, table)
  return _prompt_reader(spec, epath.Path(folder), config)


def load_weights(
  spec: RewardSpec, folder: epath.Path, config: Any, abstract: Params, embed_on_host: bool
) -> tuple[Params, PromptReader]:
  """Weights and prompt reader of a reward in `folder`; all weights go to the device.

  Args:
    spec: the reward.
    folder: its folder.
    config: its sizes and constants.
    abstract: shapes, dtypes and shardings of the weights.
    embed_on_host: not used here.
  """
  prompt = _prompt_reader(spec, folder, config)
  return checkpoint.load_params(folder, abstract), prompt


def without_weights(spec: RewardSpec, folder: epath.PathLike, *, fps: float) -> LoadedReward:
  """A reward that has no weights, ready to judge.

  Args:
    spec: the reward.
    folder: where a checkpoint would have files for its prompt reader. It need not exist.
    fps: frames per second of the videos to be judged.
  """
  return LoadedReward(spec.make(None, fps), {}, _prompt_reader(spec, epath.Path(folder), None))


def _prompt_reader(spec: RewardSpec, folder: epath.Path, config: Any) -> PromptReader:
  return read_nothing if spec.read_prompt is None else spec.read_prompt(folder, config)
