"""Changed files of every kind, and the law itself: a few of each, and many in the slow test.

Ten thousand by hand, and what became of them: `python -m tests.fuzz --count=10000 --output=docs/evidence/fuzz.json`.
"""

import os
import pathlib
import socket
import time

import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from tests.fuzz import kinds, own_files, run_files, weights
from tests.fuzz.kinds import Kind, cases, try_file

MANY = 120
"""Files of a kind in the slow test."""

KINDS = {**weights.KINDS, **own_files.KINDS, **run_files.KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_load_or_end_in_one_line(tmp_path, kind):
  made = cases(np.random.default_rng(len(kind)), tmp_path, {kind: KINDS[kind]})
  outcomes = [try_file(KINDS[name], path).line for _, (name, path) in zip(range(12), made)]
  assert any(outcomes)  # The changes bite.


@pytest.mark.slow  # 40 s of one core; ten thousand files took 9 minutes beside other work.
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(tmp_path, kind):
  made = cases(np.random.default_rng(14), tmp_path, {kind: KINDS[kind]})
  for _, (_, path) in zip(range(MANY), made):
    try_file(KINDS[kind], path)


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_from_the_seed_alone(tmp_path, kind):
  def contents(folder):
    made = cases(np.random.default_rng(3), folder, {kind: KINDS[kind]})
    _, path = next(made)
    path = path if path.is_dir() else path.parent
    return {file.relative_to(folder): file.read_bytes() for file in path.rglob("*") if file.is_file()}

  assert contents(tmp_path / "a") == contents(tmp_path / "b")


def _raise(error: Exception):
  def read(path: pathlib.Path):
    raise error

  return read


@pytest.mark.parametrize(
  "read",
  [
    _raise(ValueError("no refusal")),
    _raise(ConfigError("")),
    lambda path: os.system("true"),
    lambda path: socket.create_server(("127.0.0.1", 0)).close(),
  ],
  ids=["another error", "says nothing", "a program", "a port"],
)
def test_the_law_bites(tmp_path, read):
  with pytest.raises((AssertionError, ValueError)):
    try_file(Kind(lambda rng, folder: folder, read), tmp_path)


def test_waiting_counts(tmp_path, monkeypatch):
  """Another process that has the cores does not break the law; a file that is waited for does."""
  monkeypatch.setattr(kinds, "SECONDS", 0.05)
  with pytest.raises(AssertionError, match="s for"):
    try_file(Kind(lambda rng, folder: folder, lambda path: time.sleep(0.1)), tmp_path)


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak cannot be counted anew")
def test_memory_is_counted_for_each_file(tmp_path):
  numbers = lambda count: float(np.ones(count, np.uint8).sum())
  numbers(200_000_000)
  outcome = try_file(Kind(lambda rng, folder: folder, lambda path: numbers(60_000_000)), tmp_path)
  assert 50e6 < outcome.grown < 150e6
