"""Reads the instruction texts of the reward models from the places they are published in; nothing is executed.

A text is the string literals of a Python module, which may lie in a wheel (`RewardConversion` says where). Only
literals are evaluated (`ast.literal_eval`), and only texts with the published checksum are accepted.
Source: docs/reference/rewards.md.
"""

import ast
import pathlib
import struct
import zipfile
import zlib

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io import paths
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate
from streamt1_jax.rewards.table import REWARDS

_MAX_SOURCE = 2**20
"""Bytes; the published modules have 0.01 MB."""


def read(name: str, path: pathlib.Path) -> PromptTemplate:
  """The text of a reward from where it is published, or any text from a `prompt_template.json`.

  Raises ConfigError if the file is something else, or its text is not the published one, or claims to be and is not.
  """
  published = REWARDS[name].required_text
  if not paths.is_regular_file(path):
    raise ConfigError(f"{path} cannot be read: it does not exist or is not a file")
  if path.suffix == ".json":
    template = prompts.load_template(path)
    prompts.require_fit(template, name, published)
    return template
  conversion = CONVERSIONS[name]
  in_wheel = conversion.text_member and zipfile.is_zipfile(path)
  constants = _string_constants(_read_member(path, name, conversion.text_member) if in_wheel else _read(path), path)
  missing = [constant for constant in conversion.text_constants if constant not in constants]
  if missing:
    raise ConfigError(f"{path} does not define the text {missing[0]} of {name}")
  text = "".join(constants[constant] for constant in conversion.text_constants)
  try:
    template = PromptTemplate(name, text, published.reward_tokens)
    prompts.require_fit(template, name, published)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  return template


def _string_constants(source: str, path: pathlib.Path) -> dict[str, str]:
  """Strings assigned to plain names at the top of a module."""
  try:
    body = ast.parse(source).body
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise ConfigError(f"{path} is not Python source: {str(error) or type(error).__name__}") from error
  constants = {}
  for node in body:
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
      try:
        value = ast.literal_eval(node.value)
      except (ValueError, TypeError, RecursionError, MemoryError):
        continue
      if isinstance(value, str):
        constants[node.targets[0].id] = value
  return constants


def _read(path: pathlib.Path) -> str:
  try:
    with path.open("rb") as file:
      return _text(file.read(_MAX_SOURCE + 1))
  except (OSError, ValueError) as error:
    raise ConfigError(f"{path} cannot be read: {error}") from error


def _read_member(path: pathlib.Path, name: str, member: str) -> str:
  try:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
      return _text(file.read(_MAX_SOURCE + 1))
  # `zipfile` and its decompressors raise many types for a damaged file.
  except (OSError, KeyError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
    raise ConfigError(f"{path} is not a wheel of {name}: {error}") from error


def _text(content: bytes) -> str:
  """Raises ValueError if `content` is longer than any text of a reward, or not UTF-8."""
  if len(content) > _MAX_SOURCE:
    raise ValueError(f"it is too large: at most {_MAX_SOURCE} bytes are read")
  return content.decode("utf-8")
