"""Strict test settings: eight CPU devices, rank promotion raises, exact float32 matrix products, no network.

Most of a test's time is compilation. XLA therefore spends little time on each program (a chunk step takes 1.1 s instead
of 5), and all processes of a run share what they compiled in one folder that is removed at the end. To read a program
from there takes a quarter of the time that even the smallest one takes to compile, so all are written.
"""

import gc
import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older code generator for fused loops takes less than half of the newer one's time. Each flag is given once: a
# worker inherits the flags of the process that distributes the tests.
os.environ["XLA_FLAGS"] = " ".join(
  dict.fromkeys(
    [
      *os.environ.get("XLA_FLAGS", "").split(),
      "--xla_force_host_platform_device_count=8",
      "--xla_cpu_use_fusion_emitters=false",
      # By default XLA cuts a program into many parts for many threads, and the tests' processes have the cores already.
      "--xla_cpu_parallel_codegen_split_count=1",
      # Where other work has the cores, one of eight devices may be late for more than the 40 s that XLA waits for it.
      "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
  )
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

from tests import type_checks

_PACKAGE = pathlib.Path(__file__).parents[1] / "streamt1_jax"
# Before the package is imported: from now on every call to it checks the types and shapes that its signature gives. Not
# to `cli`: a module that defines flags is known to absl by the caller, which would be the check.
_ROOMS = [f"streamt1_jax.{room.stem}" for room in _PACKAGE.iterdir() if room.stem != "cli"]
install_import_hook(_ROOMS, f"{type_checks.__name__}.check")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


_CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config):
  if _CACHE not in os.environ:
    own = tempfile.TemporaryDirectory(prefix="streamt1_jax_tests_")
    config.add_cleanup(own.cleanup)
    os.environ[_CACHE] = own.name
  jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])


def pytest_addoption(parser):
  parser.addoption("--golden_dir", default=None, help="Folder of recorded search traces; tests/golden by default.")
  parser.addoption(
    "--golden_rewards_dir", default=None, help="Folder of recorded reward traces; tests/golden/rewards by default."
  )
  parser.addoption(
    "--golden_interactive_dir",
    default=None,
    help="Folder of recorded interactive streaming, beside the weights; tests/golden/interactive by default.",
  )
  parser.addoption(
    "--reward_sources",
    default=None,
    help="Folder with qwen.tiktoken, the hpsv3 wheel and VideoAlign's prompt_template.py; tests that need it are "
    "skipped without it.",
  )


def pytest_collection_finish():
  """What the imports made stays to the end, and tracing makes many objects that go by themselves: few searches will do.

  JAX frees its own caches with every search, too.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 10)


@pytest.fixture
def unchecked_types():
  """For tests that give a wrong type on purpose, to see what the package itself says of it."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


_MAPS, _MOST_MAPS = pathlib.Path("/proc/self/maps"), 7_000


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
  """Compiled programs hold several memory maps each, and on Linux a process may have 65,530.

  Below that they are kept: files that search alike share what the first of them traced.
  """
  yield
  if not _MAPS.exists() or _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
    jax.clear_caches()
