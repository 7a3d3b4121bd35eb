"""A checkpoint flavour that is added from outside the package (tests/extending/flavour.py), through its public API."""

import json

import jax
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.convert import plan
from streamt1_jax.pipeline import Pipeline
from tests.extending import flavour
from tests.published_files import write_safetensors, write_torch
from tests.published_model import (
  ALPHA,
  MODEL,
  adapted,
  adapter,
  assert_equal,
  everything,
  files,
  loaded,
  params,
  tensors,
  write,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  return write(tmp_path_factory.mktemp("published"))


def _renamed(weights):
  """What the training program calls Wan's tensors."""
  return {"net." + name.replace("blocks.", "layers."): tensor for name, tensor in weights.items()}


def _sources(folder, published, **changes):
  given = {name: path for name, path in everything(published).items() if name != "tokenizer"}
  return plan.Sources(**{"backbone": folder / "student.pt", **given, **changes})


def test_a_checkpoint_that_loads(tmp_path, published):
  content = {"step": 9, "student": _renamed(tensors("backbone")), "optimizer": {"exp_avg": np.zeros(3, np.float32)}}
  write_torch(tmp_path / "student.pt", content)
  lacking = flavour.convert(MODEL, _sources(tmp_path, published), published / "spiece.model", tmp_path / "out")
  assert lacking == []
  source = json.loads((tmp_path / "out" / "backbone" / "source.json").read_text())
  assert (source["names"], source["entry"], source["skipped"]) == (
    "Student",
    "student",
    ["step", "optimizer (1 tensors)"],
  )
  pipeline = Pipeline.load(tmp_path / "out")
  assert_equal(jax.tree.map(np.asarray, pipeline.params["backbone"]), params("backbone"))


def test_an_adapter_in_its_names(tmp_path, published):
  write_torch(tmp_path / "student.pt", {"student": _renamed(tensors("backbone"))})
  lora = {name.removeprefix("base_model.model."): matrix for name, matrix in adapter().items()}
  write_safetensors(tmp_path / "lora.safetensors", _renamed(lora))
  sources = plan.Sources(tmp_path / "student.pt", lora=tmp_path / "lora.safetensors", lora_alpha=ALPHA)
  flavour.convert(MODEL, sources, None, tmp_path / "out")
  # float32 against float64: three products of numbers around one.
  expected = jax.tree.map(np.float32, flavour.student_flavour(MODEL).convert(_renamed(adapted())))
  assert_equal(loaded(tmp_path / "out", "backbone"), expected, atol=2e-6)


def test_the_flavours_of_the_package_stay(tmp_path, published):
  flavour.convert(MODEL, plan.Sources(published / "wan.safetensors"), None, tmp_path / "out")
  assert_equal(loaded(tmp_path / "out", "backbone"), params("backbone"))


def test_a_misspelt_tensor(tmp_path, published):
  weights = _renamed(tensors("backbone"))
  weights["net.layers.1.norm3.wieght"] = weights.pop("net.layers.1.norm3.weight")
  write_torch(tmp_path / "student.pt", {"student": weights})
  before = files(tmp_path)
  with pytest.raises(ConfigError, match=r"as Student backbone.*1 unknown, 1 missing"):
    flavour.convert(MODEL, _sources(tmp_path, published), None, tmp_path / "out")
  assert files(tmp_path) == before


def test_unknown_without_the_table(tmp_path, published):
  write_torch(tmp_path / "student.pt", {"model": _renamed(tensors("backbone"))})
  with pytest.raises(ConfigError, match=r"student\.pt is not a video backbone"):
    plan.make_plans(MODEL, plan.Sources(tmp_path / "student.pt"))
