"""Restoring a part takes host memory for one weight, not for the model. A process of its own measures its peak.

On the CPU the arrays themselves lie in host memory, so what counts is the peak over what was there before, less the
size of the arrays returned; on an accelerator that difference is all of the host's share.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.io import checkpoint, part_writer

LAYERS, ROWS, COLUMNS = 24, 1024, 2048  # 96 MiB in bfloat16
SHAPES = {"first": (LAYERS, ROWS, COLUMNS), "large": (LAYERS, ROWS, COLUMNS), "small": (COLUMNS,)}
# Quantising reads one layer at a time in float32. Reading all at once, with the quotients, would take 4.
LIMITS = {"whole": 1.2, "sharded": 1.2, "int8": 2.0}

PROGRAM = """
import json, os, sys
import jax, jax.numpy as jnp
from streamt1_jax.nn import quantised
from streamt1_jax.io import checkpoint

def resident(field):
  with open("/proc/self/status") as status:
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

folder, warm_up, how, shapes = *sys.argv[1:4], json.loads(sys.argv[4])
sharding = jax.NamedSharding(jax.make_mesh((8,), ("model",)), jax.P(None, None, "model")) if how == "sharded" else None
abstract = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding if len(shape) == 3 else None)
tree = {name: abstract(tuple(shape)) for name, shape in shapes.items()}
if how == "int8":
  tree = {name: quantised.abstract_kernel(leaf) if len(leaf.shape) == 3 else leaf for name, leaf in tree.items()}
# What is compiled and imported on first use does not count.
checkpoint.load_params(warm_up, {"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16)})
with open("/proc/self/clear_refs", "w") as file:
  file.write("5")
before = resident("VmRSS")
params = checkpoint.load_params(folder, tree)
sizes = {name: sum(x.nbytes for x in jax.tree.leaves(leaf)) for name, leaf in params.items()}
print(json.dumps({"extra": resident("VmHWM") - before - sum(sizes.values()), "largest": max(sizes.values())}))
"""


def _weights(name: str) -> np.ndarray:
  return np.resize(np.random.default_rng(len(name)).standard_normal(1 << 20, np.float32), SHAPES[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """Both layouts: what a training saves, in float32, and what a conversion writes, in bfloat16."""
  folder = tmp_path_factory.mktemp("parts")
  checkpoint.save_params(folder / "saved", {name: _weights(name) for name in SHAPES})
  leaves = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
  part_writer.write_part(folder / "converted", leaves, (part_writer.Piece(name, _weights(name)) for name in SHAPES))
  checkpoint.save_params(folder / "warm_up", {"w": jnp.ones(4)})
  return folder


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is measured through Linux's /proc")
@pytest.mark.parametrize(("part", "how"), [("saved", "whole"), ("converted", "sharded"), ("converted", "int8")])
def test_peak_stays_within_one_weight(folder, part, how):
  arguments = [str(folder / part), str(folder / "warm_up"), how, json.dumps(SHAPES)]
  # Freed memory goes back to the system at once. Otherwise what the allocator keeps for later would count.
  variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
  done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=variables, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  measured = json.loads(done.stdout)
  stored = 2 * LAYERS * ROWS * COLUMNS
  assert measured["largest"] == (LAYERS * COLUMNS * (ROWS + 4) if how == "int8" else stored)
  print(f"{part}, {how}: {measured['extra'] / stored:.2f} of the largest weight")
  assert measured["extra"] <= LIMITS[how] * stored
