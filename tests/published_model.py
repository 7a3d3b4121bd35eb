"""A small model, published in every flavour: its files, its parameters, and a conversion in this process."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.convert import engine, execute, flavours, plan
from streamt1_jax.io import checkpoint
from tests.command_line import REPOSITORY, small_model
from tests.published_files import write_safetensors, write_sharded, write_torch

MODEL = small_model()
TOKENIZER = REPOSITORY / "checkpoints/tiny/tokenizer.model"
FLAVOURS = {(flavour.part, flavour.names): flavour for flavour in flavours.of_model(MODEL)}
PARTS = ("backbone", "codec", "text")
RANK, ALPHA = 3, 4.5
ATTENTIONS = [f"{attention}.{layer}" for attention in ("self_attn", "cross_attn") for layer in "qkvo"]
LINEAR_LAYERS = (*ATTENTIONS, "ffn.0", "ffn.2")
"""The ten layers of a block that published adapters change."""


@functools.cache
def params(part: str):
  """Random parameters, float32, at a scale at which the model stays finite."""
  generator = np.random.default_rng(len(part))
  fill = lambda leaf: (0.2 * generator.standard_normal(leaf.shape)).astype(np.float32)
  return jax.tree.map(fill, FLAVOURS[part, "Wan"].abstract_params)


def tensors(part: str, names: str = "Wan") -> dict[str, np.ndarray]:
  """The same as they are published."""
  return FLAVOURS[part, names].invert(params(part))


@functools.cache
def adapter() -> dict[str, np.ndarray]:
  """A random peft adapter on all ten layers of every block."""
  generator, matrices = np.random.default_rng(9), {}
  for layer in range(MODEL.backbone.num_layers):
    for target in LINEAR_LAYERS:
      outputs, inputs = FLAVOURS["backbone", "Wan"].specs[f"blocks.{layer}.{target}.weight"].shape
      name = f"base_model.model.blocks.{layer}.{target}"
      matrices[f"{name}.lora_A.weight"] = generator.standard_normal((RANK, inputs)).astype(np.float32)
      matrices[f"{name}.lora_B.weight"] = generator.standard_normal((outputs, RANK)).astype(np.float32)
  return matrices


def adapted() -> dict[str, np.ndarray]:
  """The backbone's tensors with the adapter merged, in float64."""
  merged = tensors("backbone")
  for name, down in adapter().items():
    if name.endswith("lora_A.weight"):
      up = adapter()[name.replace("lora_A", "lora_B")].astype(np.float64)
      weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
      merged[weight] = merged[weight] + ALPHA / RANK * up @ down
  return merged


def write(folder: pathlib.Path) -> pathlib.Path:
  """The published files."""
  write_safetensors(folder / "wan.safetensors", tensors("backbone"))
  write_sharded(folder / "transformer", tensors("backbone", "diffusers"))
  write_torch(folder / "vae.pth", tensors("codec"))
  write_torch(folder / "t5.pth", tensors("text"))
  write_torch(folder / "lora.pt", {"generator_lora": adapter(), "critic_lora": adapter(), "step": 9})
  shutil.copy(TOKENIZER, folder / "spiece.model")
  (folder / "small.json").write_text(json.dumps(checkpoint.model_config_to_dict(MODEL)))
  return folder


def convert_here(folder: pathlib.Path, published: pathlib.Path, model=MODEL, **changes) -> list[str]:
  """Converts to `folder/out`; the backbone of `published` alone unless changed. Returns what is missing then.

  Paths in `changes` may be relative to `folder`; None leaves a source out.
  """
  given = {"backbone": published / "wan.safetensors", "output": "out", "dtype": "float32"} | changes
  path = lambda name: folder / given[name] if given.get(name) is not None else None
  entry, alpha = given.get("backbone_entry"), given.get("lora_alpha")
  sources = plan.Sources(path("backbone"), entry, path("lora"), alpha, path("vae"), path("text_encoder"))
  return execute.execute(model, plan.make_plans(model, sources), path("tokenizer"), path("output"), given["dtype"])


def everything(published: pathlib.Path) -> dict[str, pathlib.Path]:
  """The other parts, for `convert_here`."""
  return {
    "vae": published / "vae.pth",
    "text_encoder": published / "t5.pth",
    "tokenizer": published / "spiece.model",
  }


def refused_here(folder: pathlib.Path, published: pathlib.Path, **changes) -> str:
  """The one line of a conversion that must be refused, and that must leave everything as it was."""
  before = files(folder)
  with pytest.raises(ConfigError) as caught:
    convert_here(folder, published, **changes)
  assert files(folder) == before
  line = caught.value.line if isinstance(caught.value, engine.FitError) else str(caught.value)
  assert len(line.splitlines()) == 1
  return line


def files(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
  """All files below `folder` but the streams of a program run there."""
  streams = (folder / ".stdout", folder / ".stderr")
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path not in streams}


def loaded(folder: pathlib.Path, part: str):
  """A converted part, float32."""
  return checkpoint.load_params(folder / part, FLAVOURS[part, "Wan"].abstract_params)


def assert_equal(found, expected, atol: float = 0.0) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), found, expected)
