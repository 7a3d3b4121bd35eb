"""The front door: what importing the package costs and offers, and what travels with it."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.command_line import REPOSITORY

HEAVY = (
  "torch",
  "tensorflow",
  "tensorflow_datasets",
  "array_record",
  "matplotlib",
  "transformers",
  "diffusers",
  "peft",
  "huggingface_hub",
)
NOT_COPIED = (".git", "tests", "docs", "outputs", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
PROGRAM = """
import json, sys
import jax.numpy as jnp
import streamt1_jax, streamt1_jax.data.shapes, streamt1_jax.data.verify
from streamt1_jax import reward_pruning
from streamt1_jax.cli import convert, generate, score
# One axis too many: the types that it has in the tests would refuse it.
_, best = reward_pruning.prune(jnp.zeros((2, 2)), jnp.ones((2, 2), bool), 2)
print(json.dumps({
  "axes": best.ndim,
  "modules": sorted(sys.modules),
  "missing": [name for name in streamt1_jax.__all__ if not hasattr(streamt1_jax, name)],
  "names": streamt1_jax.__all__,
}))
"""


@pytest.fixture(scope="module")
def imported():
  """What a fresh interpreter has loaded after importing the package, its commands and the world of shapes."""
  result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", HEAVY)
def test_import_stays_light(imported, module):
  loaded = [name for name in imported["modules"] if name == module or name.startswith(f"{module}.")]
  assert loaded == []


def test_outside_the_tests_no_types_are_checked(imported):
  """The call runs that `typing_test` sees refused, and beartype is not loaded."""
  assert imported["axes"] > 1
  assert "beartype" not in imported["modules"]


def test_front_door(imported):
  assert imported["missing"] == []
  assert {"Pipeline", "SearchConfig", "chunk_step", "stream", "rollout"} <= set(imported["names"])
  assert imported["names"] == sorted(imported["names"], key=lambda name: (name[0].islower(), name))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
  """Names of the files that setuptools copies into the wheel."""
  folder = tmp_path_factory.mktemp("build")
  copy = shutil.copytree(REPOSITORY, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
  code = "from setuptools import setup; setup()"
  command = [sys.executable, "-c", code, "-q", "build_py", f"--build-lib={folder / 'built'}"]
  subprocess.run(command, cwd=copy, check=True, capture_output=True)
  built = folder / "built"
  assert [path for path in built.rglob("*") if path.is_symlink()] == []
  return {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}


class TestWheel:
  def test_holds_the_small_model_and_the_flagfiles(self, names):
    for folder in ("checkpoints", "experiments/flagfiles"):
      files = [path for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
      assert files
      inside = {str(path.relative_to((REPOSITORY / folder).parent)) for path in files}
      assert {f"streamt1_jax/{name}" for name in inside} <= names

  def test_holds_the_package_alone(self, names):
    assert "streamt1_jax/py.typed" in names
    modules = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "streamt1_jax").rglob("*.py")]
    assert {str(path) for path in modules} <= names
    pages = {room: list((REPOSITORY / f"streamt1_jax/{room}/page").iterdir()) for room in ("report", "serve")}
    assert {room: len(files) for room, files in pages.items()} == {"report": 6, "serve": 3}
    assert {str(path.relative_to(REPOSITORY)) for path in itertools.chain(*pages.values())} <= names
    assert {name.split("/")[0] for name in names} == {"streamt1_jax"}

  def test_requires_no_package_that_only_trainings_need(self):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = {re.match(r"[\w-]+", line).group().replace("_", "-") for line in project["dependencies"]}
    assert required.isdisjoint({"tensorflow-datasets", "array-record", "matplotlib", "tensorboardx", "gcsfs", "torch"})
    assert {"jax", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "absl-py"} <= required
    assert {"train", "test", "docs", "tpu", "cuda12", "cuda13", "gcs", "hub", "tensorboard", "oracle"} <= set(
      project["optional-dependencies"]
    )


class TestConstraints:
  """The versions that everything was tested with."""

  TEXT = (REPOSITORY / "constraints.txt").read_text()
  PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

  def versions(self):
    lines = [line for line in self.TEXT.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)

  def test_name_every_requirement_in_a_version_that_it_allows(self):
    versions, extras = self.versions(), self.PROJECT["optional-dependencies"]
    tested = [lines for name, lines in extras.items() if not name.startswith(("cuda", "gcs"))]
    for line in [*self.PROJECT["dependencies"], *(line for lines in tested for line in lines)]:
      requirement = Requirement(line)
      name = re.sub(r"[-_.]+", "-", requirement.name).lower()
      if name != "streamt1-jax":
        assert requirement.specifier.contains(versions[name]), line

  def test_name_no_place_to_get_them_from(self):
    assert not re.search(r"://|--|\.(org|com|io)\b", self.TEXT.split("\n", 2)[2])

  def test_are_what_everything_that_must_pass_installs(self):
    installs = re.findall(r"^.*\bpip\"? install .*$", (REPOSITORY / ".ci/run").read_text(), re.MULTILINE)
    assert len(installs) >= 5
    assert all("-c constraints.txt" in line for line in installs)
