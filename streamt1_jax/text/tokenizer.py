"""Prompts to token ids: Wan's cleaning rules, then a tokenizer of T5 (docs/reference/umt5.md)."""

import html
import os
import re
from typing import NamedTuple

import ftfy
import numpy as np
from etils import epath
from jaxtyping import Bool, Int32

from streamt1_jax.config import ConfigError
from streamt1_jax.io import paths
from streamt1_jax.text.readers import END_ID as END_ID
from streamt1_jax.text.readers import PAD_ID as PAD_ID
from streamt1_jax.text.readers import READERS, Reader, SentencePiece


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
  """A tokenizer that pads with 0 and ends with 1, as in T5."""

  def __init__(self, model: bytes | str | os.PathLike[str], max_len: int):
    """Reads a tokenizer.

    Args:
      model: the path of a file, whose name tells what reads it (`readers.READERS`); or a sentencepiece model's bytes.
      max_len: tokens per prompt, end token included; at least 1.

    Raises:
      ConfigError: the file cannot be read, or `max_len` is not positive.
    """
    if max_len < 1:
      raise ConfigError(f"max_len must be at least 1, got {max_len}")
    self.max_len = max_len
    self._reader = _load(model)

  @property
  def vocab_size(self) -> int:
    """Number of pieces. The text encoder needs at least as many embedding rows."""
    return self._reader.vocab_size

  def __call__(self, prompt: str) -> Tokens:
    """Cleans and tokenises one prompt, any text."""
    pieces = self._reader.ids(clean(prompt))
    kept = [*pieces[: self.max_len - 1], END_ID]
    ids = np.full(self.max_len, PAD_ID, np.int32)
    ids[: len(kept)] = kept
    mask = np.arange(self.max_len) < len(kept)
    return Tokens(ids=ids, mask=mask, length=len(kept), truncated=len(pieces) > self.max_len - 1)

  def pieces(self, prompt: str) -> list[str]:
    """The pieces of a cleaned prompt, before it is cut, for people to read."""
    return self._reader.pieces(clean(prompt))


def _load(model: bytes | str | os.PathLike[str]) -> Reader:
  if isinstance(model, bytes):
    return SentencePiece(model, "the given bytes")
  path = epath.Path(model)
  if not paths.is_regular_file(path):
    raise ConfigError(f"cannot read the tokenizer model {path}: there is no such file")
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ConfigError(f"cannot read the tokenizer model {path}: {error.strerror or error}") from error
  return READERS.get(path.suffix, SentencePiece)(content, os.fspath(path))
