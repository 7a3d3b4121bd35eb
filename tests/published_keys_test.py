"""The complete lists of published tensors at full size, name by name and shape by shape, against the mapping tables.

tests/published_keys: diffusers' or Hugging Face's name, Wan's name, shape; read off the libraries' and Wan's modules.
"""

import json
import math
import pathlib

import numpy as np
import pytest

from streamt1_jax.config import ConfigError, preset
from streamt1_jax.convert import engine, flavours
from streamt1_jax.convert.formats.lazy import LazyTensor

MODEL = preset("wan_1_3b")
NAMES = [f"{part}-{make.__name__}" for part, makes in flavours.FLAVOURS.items() for make in makes]
FILES = {"backbone": "dit", "codec": "vae", "text": "umt5"}
SIZES = {"backbone": (825, 1_418_996_800), "codec": (194, 126_892_531), "text": (242, 5_680_910_336)}


def _published(part: str, names: str) -> dict[str, tuple[int, ...]]:
  path = pathlib.Path(__file__).parent / "published_keys" / f"{FILES[part]}.tsv"
  rows = [line.split("\t") for line in path.read_text().splitlines()]
  return {row[names == "Wan"]: tuple(json.loads(row[2])) for row in rows}


def _unread(shape) -> LazyTensor:
  def read(start, stop):
    raise AssertionError("names and shapes are enough")

  return LazyTensor(shape, np.dtype(np.float32), read)


@pytest.fixture(scope="module")
def known():
  """Made when a test needs them: every process that distributes or runs tests imports this file."""
  return flavours.of_model(MODEL)


@pytest.fixture(params=range(len(NAMES)), ids=NAMES)
def flavour(request, known):
  assert len(known) == len(NAMES)
  return known[request.param]


class TestFullSize:
  def test_names_and_shapes(self, flavour):
    published = _published(flavour.part, flavour.names)
    for alias, first in flavour.aliases.items():
      assert published.pop(alias) == published[first]
    assert {name: spec.shape for name, spec in flavour.specs.items()} == published
    assert (len(published), sum(math.prod(shape) for shape in published.values())) == SIZES[flavour.part]

  def test_recognised_and_accepted(self, known, flavour):
    tensors = {name: _unread(shape) for name, shape in _published(flavour.part, flavour.names).items()}
    assert flavours.detect(tensors, known, flavour.part, "file") is flavour
    engine.check(flavour.under_first_names(tensors), flavour.rules, flavour.abstract_params)

  def test_not_taken_for_another_part(self, known, flavour):
    names = _published(flavour.part, flavour.names)
    for part in set(SIZES) - {flavour.part}:
      with pytest.raises(ConfigError, match=f"file holds {flavours.PART_NAMES[flavour.part]}"):
        flavours.detect(names, known, part, "file")
