"""Files of tokenizers, and what reads them: one line of `READERS` each.

  tokenizer.json   the tokenizers library, as Wan and transformers read it
  *.model          sentencepiece

Both split the prompts of Stream-T1 alike. They differ where a character is not in the vocabulary (sentencepiece takes
byte pieces if the model has them, the library one <unk>) and where a text holds a special token such as </s> (to
sentencepiece it is text, to the library the token). See docs/reference/umt5.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import sentencepiece
import tokenizers

from streamt1_jax.config import ConfigError

PAD_ID = 0
END_ID = 1
_PAD, _END = "<pad>", "</s>"
_WORD_MARK = "▁"


@runtime_checkable
class Reader(Protocol):
  """Splits text into pieces."""

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    ...

  def ids(self, text: str) -> list[int]:
    """Ids of the pieces, without an end token."""
    ...

  def pieces(self, text: str) -> list[str]:
    """The pieces, for people to read."""
    ...


class SentencePiece:
  """A serialised sentencepiece model."""

  def __init__(self, content: bytes, name: str):
    """Reads a model.

    Args:
      content: of the file.
      name: of the file, for messages.

    Raises:
      ConfigError: it is no model, has other special ids than T5, or does not begin a text with the word mark.
    """
    processor = self._processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
      raise ConfigError(f"{name} is not a sentencepiece model ({len(content)} bytes)") from error
    _require_special_ids(name, processor.pad_id(), processor.eos_id())
    first = processor.encode("a", out_type=str)[0]
    if not first.startswith(_WORD_MARK):
      raise ConfigError(
        f"{name} does not begin a text with the word mark {_WORD_MARK} (add_dummy_prefix is off), so prompts would get "
        "other ids than in Wan: give the tokenizer.json that is published beside it"
      )

  @property
  def vocab_size(self) -> int:
    return self._processor.get_piece_size()

  def ids(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def pieces(self, text: str) -> list[str]:
    return self._processor.encode(text, out_type=str)


class TokenizerJson:
  """A file of the tokenizers library."""

  def __init__(self, content: bytes, name: str):
    """Reads a tokenizer.json; arguments and errors as of `SentencePiece`."""
    try:
      tokenizer = self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # The library raises nothing narrower.
      raise ConfigError(f"{name} is not a tokenizer.json of the tokenizers library ({len(content)} bytes)") from error
    _require_special_ids(name, tokenizer.token_to_id(_PAD), tokenizer.token_to_id(_END))
    # The length is the caller's business.
    tokenizer.no_truncation()
    tokenizer.no_padding()

  @property
  def vocab_size(self) -> int:
    return 1 + max(self._tokenizer.get_vocab().values())

  def ids(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def pieces(self, text: str) -> list[str]:
    return self._tokenizer.encode(text, add_special_tokens=False).tokens


def _require_special_ids(name: str, *found: int | None) -> None:
  if found != (PAD_ID, END_ID):
    raise ConfigError(f"{name} must have pad id {PAD_ID} and end id {END_ID}, found {found}")


READERS: Mapping[str, type[SentencePiece] | type[TokenizerJson]] = {".json": TokenizerJson, ".model": SentencePiece}
"""By the end of a file's name; a file of another name is taken for a sentencepiece model."""
