"""A search that is added from outside the package (tests/extending/search.py), and the pages on searches."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.config import preset
from streamt1_jax.cost import Cost
from streamt1_jax.methods import METHODS
from streamt1_jax.state import Condition
from tests import toy_generator as toy
from tests import trace_schema
from tests.command_line import REPOSITORY
from tests.extending.search import SEARCHES

PAGES = REPOSITORY / "docs/methods"


def test_beams_live_apart_and_then_compete():
  search = SEARCHES["islands"].settings(preset("tiny"), top_k=3, numbers={"apart": 2})
  condition = Condition((), (), (), jnp.int32(5))
  traces = drivers.stream(toy.PARAMS, condition, toy.MODELS, search, num_chunks=5, seed=2)
  for index, trace in enumerate(map(jax.device_get, traces)):
    hybrid = trace.candidates.hybrid
    best_of_beam = np.arange(3) * 2 + hybrid.argmax(axis=1)
    best_of_all = np.argsort(-hybrid.ravel(), kind="stable")[:3]
    np.testing.assert_array_equal(trace.survivor, best_of_beam if index < 2 else best_of_all)


def test_the_example_is_short():
  lines = (REPOSITORY / "tests/extending/search.py").read_text().split("@dataclasses")[1].split("if __name__")[0]
  assert len([line for line in lines.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("name", METHODS)
def test_every_search_has_a_page(name):
  text = (PAGES / f"{name}.md").read_text()
  assert f"`--search={name}`" in text
  headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
  assert headings[:5] == ["What it does", "When to use it", "Cost", "Source", "Figures"]
  assert f"<!-- figures: {name} -->" in text


def test_pages_of_searches_are_what_the_package_and_the_evidence_say():
  spec = importlib.util.spec_from_file_location("make_methods", REPOSITORY / "docs/make_methods.py")
  program = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(program)
  assert program.main(["--check"]) == 0


def test_the_page_on_the_trace_names_every_field():
  text = (REPOSITORY / "docs/trace.md").read_text()
  schema = trace_schema
  kinds = (schema.VIDEO, schema.CHUNK, schema.CANDIDATE, schema.REJECTED, schema.EVENT, schema.FINAL)
  for name in {name for kind in kinds for name in kind} | {*schema.FATES, "rejected"}:
    assert f"`{name}`" in text, name


def test_the_page_on_cost_names_every_count():
  text = (PAGES / "index.md").read_text()
  for name in (*Cost._fields, "tflop", "plain_tflop", "times_plain", "uncounted_rewards"):
    assert f"`{name}`" in text, name
