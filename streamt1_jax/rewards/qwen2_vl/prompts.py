"""A caption to the tokens a reward model reads: its instruction text, the chat around it, its reward tokens.

  template.format(caption) ── chat format ── tokens before │ media │ tokens after, cut after the last reward token

The instruction texts are part of the published models. They are read when weights are converted
(`convert.reward_prompts`), stored beside the weights in `prompt_template.json`, and known here by their checksum alone.
Source: docs/reference/rewards.md.
"""

import dataclasses
import hashlib
import json
import os
import re
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import config_json, paths
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.spec import PublishedText
from streamt1_jax.text.prompts import require_whole_characters

MAX_TOKENS = 4096
"""Longest text. VideoAlign was trained on 6144 tokens, which includes those of the pictures."""
TEMPLATE_FILE = "prompt_template.json"
TOKENIZER_FILE = "tokenizer.json"
PLACEHOLDER = "{text_prompt}"

_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_AFTER_MEDIA = "<|vision_end|>"
_SPECIAL_TOKEN = re.compile(r"<\|[^\s|<>]*\|>")


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
  """The text that follows the media.

  Attributes:
    model: whose text it is: the name of a published reward, or any other.
    text: the text, with `{text_prompt}` once where the caption goes. Trailing spaces count.
    reward_tokens: the tokens whose hidden states are read, in the order of the text.
  """

  model: str
  text: str
  reward_tokens: tuple[str, ...]

  def __post_init__(self):
    if self.text.count(PLACEHOLDER) != 1:
      raise ConfigError(f"the prompt template of {self.model} must hold {PLACEHOLDER} exactly once")
    places = [self.text.find(token) for token in self.reward_tokens]
    counts = [self.text.count(token) for token in self.reward_tokens]
    if not places or counts != [1] * len(counts) or places != sorted(places):
      raise ConfigError(f"the prompt template of {self.model} must hold {self.reward_tokens} once each, in this order")

  @property
  def sha256(self) -> str:
    return hashlib.sha256(self.text.encode()).hexdigest()


def require_fit(template: PromptTemplate, name: str, published: PublishedText) -> None:
  """Raises ConfigError unless a text can be that of the reward `name`.

  It must have as many reward tokens as the published text, and be the published one if it claims to be.
  """
  if template.model == name and template.sha256 != published.sha256:
    raise ConfigError(
      f"the prompt template of {name} is not the published one: sha256 {template.sha256}, expected {published.sha256}"
    )
  if len(template.reward_tokens) != len(published.reward_tokens):
    raise ConfigError(
      f"the prompt template of {template.model} has {len(template.reward_tokens)} reward tokens, "
      f"{name} reads {len(published.reward_tokens)}"
    )


@dataclasses.dataclass(frozen=True)
class _TemplateFile:
  model: str
  text: str
  reward_tokens: tuple[str, ...]
  sha256: str


def template_json(template: PromptTemplate) -> bytes:
  """Content of the `prompt_template.json` that `load_template` reads."""
  stored = _TemplateFile(template.model, template.text, template.reward_tokens, template.sha256)
  return (json.dumps(config_json.to_json_value(stored), indent=2, ensure_ascii=False) + "\n").encode()


def load_template(path: epath.PathLike) -> PromptTemplate:
  """Reads a `prompt_template.json`, or the one in a folder.

  Raises ConfigError if it is missing or damaged, or its text has not the checksum stored with it.
  """
  path = epath.Path(path)
  path = path / TEMPLATE_FILE if path.is_dir() else path
  where = str(path)
  stored = config_json.from_json_value(_TemplateFile, config_json.read_json(path, where), where)
  template = PromptTemplate(stored.model, stored.text, stored.reward_tokens)
  if template.sha256 != stored.sha256:
    raise ConfigError(f"{path}: the text has sha256 {template.sha256}, the file says {stored.sha256}")
  return template


def read_folder(name: str, published: PublishedText, folder: epath.Path, config: Any) -> "RewardPrompt":
  """What reads captions for the reward `name` in `folder`, of sizes `config`.

  Raises ConfigError if text or tokenizer is missing, damaged, of another reward, or does not fit the sizes.
  """
  template = load_template(folder)
  require_fit(template, name, published)
  return RewardPrompt(folder / TOKENIZER_FILE, template, config.backbone.decoder.vocab_size)


class RewardPrompt:
  """Turns captions into the `PromptTokens` of one reward model."""

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer | str | os.PathLike[str],
    template: PromptTemplate,
    vocab_size: int,
    pad_to: int = 64,
  ):
    """Reads a tokenizer.

    Args:
      tokenizer: a tokenizer, or the path of its `tokenizer.json`.
      template: the model's text.
      vocab_size: rows of the model's token embedding.
      pad_to: lengths are rounded up to a multiple of this, so that captions of similar length share one compilation.

    Raises:
      ConfigError: the file cannot be read, or the tokenizer lacks a token of the chat format or a reward token, or has
        more tokens than the model embeds.
    """
    self._tokenizer = tokenizer if isinstance(tokenizer, tokenizers.Tokenizer) else read_tokenizer(tokenizer)
    self.template = template
    self.pad_to = pad_to
    self._reward_ids = [self._id(token) for token in template.reward_tokens]
    self._pad_id = self._id("<|endoftext|>")
    for token in (*_SPECIAL_TOKEN.findall(_BEFORE), _AFTER_MEDIA):
      self._id(token)
    tokens = self._tokenizer.get_vocab_size(with_added_tokens=True)
    if tokens > vocab_size:
      raise ConfigError(f"the reward tokenizer has {tokens} tokens, {template.model} embeds only {vocab_size}")

  def __call__(self, caption: str) -> PromptTokens:
    """Tokens of one caption, numpy int32; taken verbatim, braces included.

    Raises ConfigError for a caption that has too many tokens, half a character, or a special token, which would be read
    as one.
    """
    require_whole_characters(caption, "the prompt")
    strange = _SPECIAL_TOKEN.search(caption)
    if strange:
      raise ConfigError(f"the prompt holds the special token {strange.group()}, which the reward model would obey")
    before = self._encode(_BEFORE)
    after = self._encode(_AFTER_MEDIA + self.template.text.replace(PLACEHOLDER, caption))
    reward_index = np.asarray([np.flatnonzero(after == token)[0] for token in self._reward_ids], np.int32)
    used = int(reward_index[-1]) + 1
    if used > MAX_TOKENS:
      raise ConfigError(f"the prompt and its instruction text have {used} tokens, a reward model reads {MAX_TOKENS}")
    padded = np.full(-(-used // self.pad_to) * self.pad_to, self._pad_id, np.int32)
    padded[:used] = after[:used]
    return PromptTokens(before, padded, reward_index)

  def _encode(self, text: str) -> np.ndarray:
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def _id(self, token: str) -> int:
    found = self._tokenizer.token_to_id(token)
    if found is None:
      raise ConfigError(f"the reward tokenizer has no token {token}")
    return found


def read_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """The tokenizer of a `tokenizer.json`. Raises ConfigError if it cannot be read."""
  if not paths.is_regular_file(path):
    raise ConfigError(f"{os.fspath(path)} is not a readable tokenizer.json: there is no such file")
  try:
    return tokenizers.Tokenizer.from_buffer(epath.Path(path).read_bytes())
  except Exception as error:  # the library raises plain Exception, whatever is wrong
    raise ConfigError(f"{os.fspath(path)} is not a readable tokenizer.json: {error}") from error


def with_reward_tokens(tokenizer: tokenizers.Tokenizer, template: PromptTemplate) -> tokenizers.Tokenizer:
  """`tokenizer` with the reward tokens of `template` added where it lacks them; their ids follow the others."""
  special = [tokenizers.AddedToken(token, special=True, normalized=False) for token in template.reward_tokens]
  tokenizer.add_special_tokens(special)
  return tokenizer
