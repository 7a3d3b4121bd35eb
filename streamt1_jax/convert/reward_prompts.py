"""Reads the instruction texts of the reward models from the places they are published in; nothing is executed.

HPSv3: the wheel of `hpsv3` 1.0.0, or the module in it. VideoAlign: `prompt_template.py` of its repository. Only string
literals are evaluated (`ast.literal_eval`), and only texts with the published checksum are accepted.
Source: rewards spec, section 5.
"""

import ast
import pathlib
import zipfile

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards import prompts
from streamt1_jax.rewards.prompts import REWARD_TOKENS, PromptTemplate

_HPSV3_MODULE = "hpsv3/dataset/data_collator_qwen.py"
_HPSV3_CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
_VIDEOALIGN_CONSTANTS = ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)


def read(model: str, path: pathlib.Path) -> PromptTemplate:
  """The text of "hpsv3" or "videoalign" from where it is published, or any text from a `prompt_template.json`.

  Raises ConfigError as the functions for either do.
  """
  if path.suffix == ".json":
    return prompts.load_template(path)
  return {"hpsv3": read_hpsv3, "videoalign": read_videoalign}[model](path)


def read_hpsv3(path: pathlib.Path) -> PromptTemplate:
  """HPSv3's text, from the wheel or from its `data_collator_qwen.py`.

  Raises ConfigError if the file is something else, or its text is not the published one.
  """
  source = _read_member(path, _HPSV3_MODULE) if zipfile.is_zipfile(path) else _read(path)
  return _template("hpsv3", source, _HPSV3_CONSTANTS, path)


def read_videoalign(path: pathlib.Path) -> PromptTemplate:
  """VideoAlign's text, from its `prompt_template.py`.

  Raises ConfigError if the file is something else, or its text is not the published one.
  """
  return _template("videoalign", _read(path), _VIDEOALIGN_CONSTANTS, path)


def _template(model: str, source: str, names: tuple[str, ...], path: pathlib.Path) -> PromptTemplate:
  constants = _string_constants(source, path)
  missing = [name for name in names if name not in constants]
  if missing:
    raise ConfigError(f"{path} does not define the text {missing[0]} of {model}")
  try:
    return PromptTemplate(model, "".join(constants[name] for name in names), REWARD_TOKENS[model])
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error


def _string_constants(source: str, path: pathlib.Path) -> dict[str, str]:
  """Strings assigned to plain names at the top of a module."""
  try:
    body = ast.parse(source).body
  except (SyntaxError, ValueError) as error:
    raise ConfigError(f"{path} is not Python source: {error}") from error
  constants = {}
  for node in body:
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
      try:
        value = ast.literal_eval(node.value)
      except (ValueError, TypeError):
        continue
      if isinstance(value, str):
        constants[node.targets[0].id] = value
  return constants


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} cannot be read: {error}") from error


def _read_member(path: pathlib.Path, member: str) -> str:
  try:
    with zipfile.ZipFile(path) as archive:
      return archive.read(member).decode("utf-8")
  except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} is not a wheel of hpsv3: {error}") from error
