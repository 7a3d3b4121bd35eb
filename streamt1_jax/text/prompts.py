"""Reads prompts from text files, and refuses what cannot be a prompt."""

from __future__ import annotations

import os
import unicodedata

from etils import epath

from streamt1_jax.config import ConfigError

MAX_BYTES = 64 * 2**20


def load_prompts(path: str | os.PathLike[str]) -> list[str]:
  """Prompts of a UTF-8 text file: one a line, stripped. Blank lines are skipped.

  Args:
    path: of the file, on disk or in a cloud bucket that `etils.epath` can open.

  Returns:
    The prompts in the order of the file, repetitions included.

  Raises:
    ConfigError: the file is missing or unreadable, has no prompt, or has a line that is not UTF-8 or holds control
      characters, or is larger than 64 MiB. The message names the file and the line.
  """
  file = epath.Path(path)
  if not file.is_file():
    raise ConfigError(f"prompt file {path} does not exist or is not a file")
  try:
    # A device has no end; a pipe of the shell is welcome.
    with file.open("rb") as opened:
      content = opened.read(MAX_BYTES + 1)
  except OSError as error:
    raise ConfigError(f"prompt file {path} cannot be read: {error.strerror or error}") from error
  if len(content) > MAX_BYTES:
    raise ConfigError(f"prompt file {path} is too large: at most {MAX_BYTES} bytes are read")
  lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
  prompts = [_decode(line, path, number) for number, line in enumerate(lines, start=1)]
  prompts = [prompt for prompt in prompts if prompt]
  if not prompts:
    raise ConfigError(f"prompt file {path} has no prompt in its {len(lines)} lines")
  return prompts


def require_whole_characters(prompt: str, where: str) -> None:
  """Raises ConfigError, beginning with `where`, if `prompt` has half of a surrogate pair, which JSON can express."""
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(f"{where} holds half a character, {prompt[error.start]!r}") from error


def _decode(line: bytes, path: str | os.PathLike[str], number: int) -> str:
  try:
    prompt = line.decode().strip()
  except UnicodeDecodeError as error:
    raise ConfigError(f"{path}, line {number}: not UTF-8 text (byte {error.start + 1})") from error
  # A binary file given by mistake is often valid UTF-8 in its first lines.
  unprintable = next((each for each in prompt if unicodedata.category(each) == "Cc" and each != "\t"), None)
  if unprintable is not None:
    raise ConfigError(f"{path}, line {number}: control character {unprintable!r}")
  return prompt
