"""Runs tests again and again, each time in a process that is forked from one which has imported what they need.

A program of its own, run by its path in a copy of the repository: it must see the package of that copy, as it is at
each run. A line of stdin is a request, and a line of stdout answers it:

  {"arguments": ["-x", "tests/sampling_test.py"], "seconds": 60}
  {"code": 1, "seconds": 2.5, "imported": ["numpy", "jax"]}

`code` is pytest's exit code, None if the time was over. The process that runs nothing must start no thread, because a
fork copies none: it imports JAX, but computes nothing.
"""

import importlib
import json
import os
import signal
import sys
import time

_OWN = ("streamt1_jax", "tests", "experiments")
_IMPORTED = "imported.json"


def _run(arguments: list[str]) -> int:
  """The work of a fork: pytest's exit code; leaves the names of other projects' modules in a file."""
  import pytest

  sys.argv = ["pytest", *arguments]
  code = int(pytest.main(arguments))
  names = [name for name, module in list(sys.modules.items()) if getattr(module, "__spec__", None)]
  with open(_IMPORTED, "w") as file:
    json.dump([name for name in names if name.partition(".")[0] not in _OWN], file)
  return code


def _answer(arguments: list[str], seconds: float) -> dict:
  begin = time.monotonic()
  child = os.fork()
  if not child:
    code = 3
    try:
      code = _run(arguments)
    finally:
      sys.stdout.flush()
      os._exit(code)
  status = None
  while status is None and time.monotonic() < begin + seconds:
    done, raw = os.waitpid(child, os.WNOHANG)
    status = os.waitstatus_to_exitcode(raw) if done else None
    time.sleep(0.02)
  if status is None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
  return {"code": status, "seconds": round(time.monotonic() - begin, 1)}


def _warm() -> None:
  """Imports what the first run needed of other projects."""
  with open(_IMPORTED) as file:
    names = json.load(file)
  for name in names:
    # Some modules are there under a second name, which cannot be imported.
    try:
      importlib.import_module(name)
    except Exception:
      continue


def main() -> None:
  sys.path[0] = os.getcwd()
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
  os.dup2(1, 2)
  # Sets the environment before JAX is imported.
  importlib.import_module("tests.conftest")
  for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    os.ftruncate(1, 0)
    reply = _answer(request["arguments"], request["seconds"])
    if not number and os.path.exists(_IMPORTED):
      _warm()
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
  main()
