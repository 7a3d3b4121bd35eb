"""Tests of a copy of the repository in which one file is another one."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from streamt1_jax.config import ConfigError
from streamt1_jax.measuring import forked_tests

_COPIED = ("streamt1_jax", "tests", "experiments", "checkpoints", "pyproject.toml")
_OPTIONS = ("-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=-q --strict-markers")


class TestRuns:
  """Runs tests in a copy of the repository: a context, whose end stops what runs."""

  __test__ = False

  def __init__(self, root: pathlib.Path, folder: pathlib.Path, seconds: float):
    """Makes the copy, or takes the one that is there.

    Args:
      root: the repository.
      folder: where the copy and the compiled programs of its tests are written.
      seconds: the longest time of a run.
    """
    self._root, self._copy, self._seconds = root, folder / "repository", seconds
    self._environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")} | os.environ
    self._copy.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
      source, target = root / name, self._copy / name
      if target.exists():
        continue
      if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
      elif source.exists():
        shutil.copyfile(source, target)

  def __enter__(self) -> TestRuns:
    self._server = subprocess.Popen(
      [sys.executable, forked_tests.__file__],
      cwd=self._copy,
      env=self._environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    return self

  def __exit__(self, *error: Any) -> None:
    # With what it forked.
    os.killpg(self._server.pid, signal.SIGKILL)
    self._server.wait()

  def require_good(self, tests: Sequence[str]) -> None:
    """Raises ConfigError if the tests fail without a fault. What they import is imported once from now on."""
    code = self._run(tests)["code"]
    if code != 0:
      raise ConfigError(f"{' '.join(tests)}: without a fault pytest ends with {code}, not 0: {self._last_line()}")

  def fails(self, path: str, source: str, tests: Sequence[str]) -> tuple[bool, float]:
    """Whether the tests fail, or take too long, with `source` in the file `path`; and the seconds until then."""
    target = self._copy / path
    # Python takes a compiled file for current if size and second are those of the source.
    for compiled in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
      compiled.unlink()
    try:
      target.write_text(source, encoding="utf-8")
      reply = self._run(tests)
    finally:
      shutil.copyfile(self._root / path, target)
      for compiled in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
        compiled.unlink()
    return reply["code"] != 0, reply["seconds"]

  def _run(self, tests: Sequence[str]) -> dict[str, Any]:
    assert self._server.stdin is not None
    assert self._server.stdout is not None
    request = {"arguments": [*_OPTIONS, *tests], "seconds": self._seconds}
    self._server.stdin.write(json.dumps(request) + "\n")
    self._server.stdin.flush()
    answer = self._server.stdout.readline()
    if not answer:
      raise ConfigError(f"the tests cannot be run: {self._last_line()}")
    return json.loads(answer)

  def _last_line(self) -> str:
    lines = (self._copy / "output.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "they said nothing"
