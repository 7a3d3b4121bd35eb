"""What the conversion of a reward model will do: its published files opened and compared with its sizes.

  weights ── open ── adapters merged as they are read ── compare ──┐
  instruction text (checksum) ── tokenizer (reward tokens added) ──┴─ RewardPlan, carried out like any part's

One tensor is in memory at a time: HPSv3's 16.6 GB need a fraction of that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from streamt1_jax.config import ConfigError, required
from streamt1_jax.convert import adapters, engine, peft_merge, reward_prompts
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.formats import weight_files
from streamt1_jax.convert.formats.lazy import LazyTensor
from streamt1_jax.convert.peft_merge import MergedWeight
from streamt1_jax.convert.plan import PartPlan
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io import config_json, limits
from streamt1_jax.messages import shortened
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate, RewardPrompt
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.table import REWARDS

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TORCH_FILE = "model.pth"


@dataclasses.dataclass(frozen=True)
class RewardSources:
  """The published files of one reward.

  Attributes:
    name: a reward of `CONVERSIONS`.
    weights: HPSv3.safetensors, VideoAlign's model.pth, or what transformers or peft saved; a file, index or folder.
    prompt: where the instruction text is published, or a `prompt_template.json`.
    tokenizer: `tokenizer.json` of Qwen2-VL, or the folder it is in.
    config: JSON file of other sizes than the published model's, as `config` in a reward.json.
  """

  name: str
  weights: pathlib.Path | None = None
  prompt: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None
  config: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class RewardPlan(PartPlan):
  """A reward whose sources fit each other.

  Attributes:
    reward: what is known about it.
    template: its instruction text.
    tokenizer: content of its `tokenizer.json`, reward tokens included.
    tokenizer_source: the file that it was made from.
  """

  reward: RewardSpec
  template: PromptTemplate
  tokenizer: bytes = dataclasses.field(repr=False)
  tokenizer_source: pathlib.Path

  def leaves(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what is stored; the head stays float32."""
    return engine.stored_leaves(self.reward.weight_shapes(self.config, dtype), None)

  def extra_files(self) -> dict[str, bytes]:
    return {
      reward_folder.REWARD_FILE: reward_folder.config_json_bytes(self.reward, self.config),
      prompts.TEMPLATE_FILE: prompts.template_json(self.template),
      prompts.TOKENIZER_FILE: self.tokenizer,
    }

  def further_sources(self) -> list[pathlib.Path]:
    return [self.tokenizer_source]

  def further_provenance(self) -> dict[str, Any]:
    return {
      "prompt_template": {"model": self.template.model, "sha256": self.template.sha256},
      "tokenizer": {"sha256": hashlib.sha256(self.tokenizer).hexdigest()},
    }

  def further_lines(self) -> Iterator[str]:
    yield f"instruction text of {self.template.model}, sha256 {self.template.sha256}"
    yield f"{prompts.TOKENIZER_FILE} with {', '.join(self.template.reward_tokens)}: {len(self.tokenizer):,} bytes"


def make_plan(sources: RewardSources) -> RewardPlan:
  """The plan of one reward whose weights are given.

  Raises:
    ConfigError: a file is not given, missing, damaged or another model's; the message names flag and file. It is an
      `engine.FitError`, which lists every tensor, where names or shapes differ.
  """
  flag, reward, conversion = f"--{sources.name}", REWARDS[sources.name], CONVERSIONS[sources.name]
  if sources.prompt is None:
    raise ConfigError(f"{flag} needs {flag}_prompt, its instruction text: {conversion.text}")
  if sources.tokenizer is None:
    raise ConfigError(f"{flag} needs --reward_tokenizer, the {prompts.TOKENIZER_FILE} of Qwen2-VL")
  config = _read_config(sources)
  with _prefixed(f"{flag}_prompt"):
    template = reward_prompts.read(sources.name, sources.prompt)
  tokenizer_source = sources.tokenizer / prompts.TOKENIZER_FILE if sources.tokenizer.is_dir() else sources.tokenizer
  tokenizer = _read_tokenizer(tokenizer_source, template, config)
  path = _find_weights(required(sources.weights, f"the file of {flag}"))
  where = f"{flag} {path}"
  file = weight_files.load(path)
  tensors, skipped = _plain_tensors(file.content, where)
  adapter = None
  if peft_merge.is_peft(tensors):
    if conversion.lora is None:
      raise ConfigError(f"{where} as {sources.name}: it holds adapters of peft, and the published file holds none")
    with _prefixed(where):
      tensors = peft_merge.merged(tensors, *conversion.lora)
    adapter = _adapter(tensors, *conversion.lora)
  new_names = qwen2_vl.has_new_names(tensors)
  names = "transformers 4.52" if new_names else "transformers 4.45"
  rules = tuple(conversion.rules(config, new_names))
  flavour = Flavour(f"{REWARDS_FOLDER}/{sources.name}", names, rules, reward.weight_shapes(config, jnp.float32))
  try:
    engine.check(tensors, flavour.rules, flavour.abstract_params)
  except engine.FitError as error:
    raise error.prefixed(f"{where}{weight_files.shard_advice(path)} as {sources.name}") from error
  return RewardPlan(
    flavour.part,
    flavour,
    config,
    tensors,
    file.files,
    None,
    adapter,
    skipped,
    reward,
    template,
    tokenizer,
    tokenizer_source,
  )


@contextlib.contextmanager
def _prefixed(where: str) -> Iterator[None]:
  """A ConfigError of the body begins with `where`."""
  try:
    yield
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from error


def _read_config(sources: RewardSources) -> Any:
  spec = REWARDS[sources.name]
  if sources.config is None:
    return spec.make_config()
  where = f"--{sources.name}_config {sources.config}"
  config_type = required(spec.config_type, f"the configuration of {spec.name}")
  return config_json.from_json_value(config_type, config_json.read_json(sources.config, where), where)


def _read_tokenizer(path: pathlib.Path, template: PromptTemplate, config: Any) -> bytes:
  with _prefixed("--reward_tokenizer"):
    tokenizer = prompts.with_reward_tokens(prompts.read_tokenizer(path), template)
    RewardPrompt(tokenizer, template, config.backbone.decoder.vocab_size)
  return tokenizer.to_str().encode()


def _find_weights(path: pathlib.Path) -> pathlib.Path:
  """Where the released loader looks in a folder: `model.pth` of the last checkpoint. Other paths are left alone."""
  if not path.is_dir():
    return path
  steps = [int(match[1]) for entry in path.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))]
  folder = path / f"checkpoint-{max(steps)}" if steps else path
  return folder / _TORCH_FILE if (folder / _TORCH_FILE).is_file() else folder


def _plain_tensors(content: Mapping[str, Any], where: str) -> tuple[dict[str, LazyTensor], list[str]]:
  """The tensors that the reward reads, and the names of the others."""
  for name, value in content.items():
    if not isinstance(name, str) or not isinstance(value, LazyTensor):
      raise ConfigError(
        f"{where}: {shortened(name)} is a {type(value).__name__}; a reward model's file holds tensors only"
      )
    limits.require_name(name, where)
  is_unused = lambda name: name.removeprefix(peft_merge.PREFIX) in qwen2_vl.UNUSED
  return (
    {name: tensor for name, tensor in content.items() if not is_unused(name)},
    [f"{name} (no reward reads it)" for name in content if is_unused(name)],
  )


def _adapter(tensors: Mapping[str, LazyTensor | MergedWeight], rank: int, alpha: int) -> adapters.Adapter:
  layers = {name: (x.down, x.up) for name, x in tensors.items() if isinstance(x, MergedWeight)}
  return adapters.Adapter(layers, rank, float(alpha), alpha / rank, [], [])
