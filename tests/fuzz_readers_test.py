"""A few changed files of every kind, and the law itself. Thousands: `python -m tests.fuzz`."""

import os
import pathlib
import socket

import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from tests.fuzz import own_files, weights
from tests.fuzz.kinds import Kind, cases, try_file

KINDS = {**weights.KINDS, **own_files.KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_load_or_end_in_one_line(tmp_path, kind):
  made = cases(np.random.default_rng(len(kind)), tmp_path, {kind: KINDS[kind]})
  outcomes = [try_file(KINDS[name], path) for _, (name, path) in zip(range(12), made)]
  assert any(outcomes)  # The changes bite.


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
