"""Prompts to token ids: Wan's cleaning rules, then a sentencepiece model (docs/reference/umt5.md)."""

import html
import os
import re
from typing import NamedTuple

import ftfy
import numpy as np
import sentencepiece
from etils import epath
from jaxtyping import Bool, Int32

from streamt1_jax.config import ConfigError

PAD_ID = 0
END_ID = 1


class Tokens(NamedTuple):
  """One tokenised prompt of at most `max_len` tokens, X = max_len."""

  ids: Int32[np.ndarray, " X"]  # the pieces, the end token, then padding
  mask: Bool[np.ndarray, " X"]  # True for the pieces and the end token
  length: int  # number of True in `mask`, at least 1
  truncated: bool  # whether pieces were dropped to make room for the end token


def clean(prompt: str) -> str:
  """Wan's cleaning: it repairs mojibake and full-width forms, unescapes HTML twice, and leaves single spaces."""
  # Scraped captions hold entities of entities ("&amp;lt;").
  text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
  return re.sub(r"\s+", " ", text.strip()).strip()


class Tokenizer:
  """A sentencepiece model that pads with 0 and ends with 1, as in T5."""

  def __init__(self, model: bytes | str | os.PathLike[str], max_len: int):
    """Reads a sentencepiece model.

    Args:
      model: a serialised model, or the path of its file.
      max_len: tokens per prompt, end token included; at least 1.

    Raises:
      ConfigError: the model cannot be read, or `max_len` is not positive.
    """
    if max_len < 1:
      raise ConfigError(f"max_len must be at least 1, got {max_len}")
    self.max_len = max_len
    self._processor = _load(model)

  @property
  def vocab_size(self) -> int:
    """Number of pieces. The text encoder needs at least as many embedding rows."""
    return self._processor.get_piece_size()

  def __call__(self, prompt: str) -> Tokens:
    """Cleans and tokenises one prompt, any text. Characters that the model does not know become the unknown token."""
    pieces = self._processor.encode(clean(prompt))
    kept = [*pieces[: self.max_len - 1], END_ID]
    ids = np.full(self.max_len, PAD_ID, np.int32)
    ids[: len(kept)] = kept
    mask = np.arange(self.max_len) < len(kept)
    return Tokens(ids=ids, mask=mask, length=len(kept), truncated=len(pieces) > self.max_len - 1)

  def pieces(self, prompt: str) -> list[str]:
    """The pieces of a cleaned prompt, before it is cut, for people to read."""
    return self._processor.encode(clean(prompt), out_type=str)


def _load(model: bytes | str | os.PathLike[str]) -> sentencepiece.SentencePieceProcessor:
  if isinstance(model, bytes):
    name, content = "the given bytes", model
  else:
    name = os.fspath(model)
    try:
      content = epath.Path(name).read_bytes()
    except OSError as error:
      raise ConfigError(f"cannot read the tokenizer model {name}: {error.strerror or error}") from error
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(content)
  except RuntimeError as error:
    raise ConfigError(f"{name} is not a sentencepiece model ({len(content)} bytes)") from error
  special = (processor.pad_id(), processor.eos_id())
  if special != (PAD_ID, END_ID):
    raise ConfigError(f"{name} must have pad id {PAD_ID} and end id {END_ID}, found {special}")
  return processor
