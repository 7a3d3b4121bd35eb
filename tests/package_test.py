"""The front door: what importing the package costs and offers."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "tensorflow", "tensorflow_datasets", "transformers", "diffusers", "peft")
PROGRAM = """
import json, sys
import streamt1_jax
print(json.dumps({
  "modules": sorted(sys.modules),
  "missing": [name for name in streamt1_jax.__all__ if not hasattr(streamt1_jax, name)],
  "names": streamt1_jax.__all__,
}))
"""


@pytest.fixture(scope="module")
def imported():
  """What a fresh interpreter has loaded after `import streamt1_jax`."""
  result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", HEAVY)
def test_import_stays_light(imported, module):
  loaded = [name for name in imported["modules"] if name == module or name.startswith(f"{module}.")]
  assert loaded == []


def test_front_door(imported):
  assert imported["missing"] == []
  assert {"Pipeline", "SearchConfig", "chunk_step", "stream", "rollout"} <= set(imported["names"])
  assert imported["names"] == sorted(imported["names"], key=lambda name: (name[0].islower(), name))
