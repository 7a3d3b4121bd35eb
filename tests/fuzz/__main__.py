"""Tries many changed files by hand: `python -m tests.fuzz --count=2000 --seed=0`. A table of outcomes ends it.

With `--output=docs/evidence/fuzz.json` the table is written as evidence, too.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np

from tests.fuzz import own_files, run_files, weights
from tests.fuzz.kinds import Outcome, cases, try_file

KINDS = {**weights.KINDS, **own_files.KINDS, **run_files.KINDS}
COLUMNS = ["kind of file", "files", "loaded", "ended in one line", "slowest", "largest growth of memory"]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kinds", default=",".join(KINDS))
  parser.add_argument("--keep", help="folder for the files that break the law")
  parser.add_argument("--output", type=pathlib.Path, help="where the table is written as JSON")
  given = parser.parse_args()
  kinds = {name: KINDS[name] for name in given.kinds.split(",")}
  start, failed = time.perf_counter(), 0
  outcomes: dict[str, list[Outcome]] = {name: [] for name in kinds}
  with tempfile.TemporaryDirectory() as folder:
    made = cases(np.random.default_rng(given.seed), pathlib.Path(folder), kinds)
    for index, (name, path) in zip(range(given.count), made):
      try:
        outcomes[name].append(try_file(kinds[name], path))
      except BaseException as error:
        failed += 1
        print(f"{index}: {name}: {type(error).__name__}: {str(error)[:300]}")
        traceback.print_exc(limit=-4)
        if given.keep:
          path.rename(pathlib.Path(given.keep) / f"{given.seed}-{index}-{name}{path.suffix}")
        if isinstance(error, KeyboardInterrupt):
          return 130
  table = [_row(name, found) for name, found in outcomes.items() if found]
  print("\n".join("  ".join(f"{cell:>24}" for cell in row) for row in [COLUMNS, *table]))
  print(f"{failed} of {given.count} broke the law")
  if given.output:
    minutes = (time.perf_counter() - start) / 60
    note = f"{failed} of {given.count} broke the law. They took {minutes:.0f} minutes."
    command = f"python -m tests.fuzz --count={given.count} --seed={given.seed}"
    given.output.write_text(json.dumps(_evidence(command, table, note), indent=2) + "\n")
  return 1 if failed else 0


def _row(name: str, outcomes: list[Outcome]) -> list[str]:
  refused = sum(bool(outcome.line) for outcome in outcomes)
  slowest, grown = (max(getattr(outcome, field) for outcome in outcomes) for field in ("seconds", "grown"))
  counts = [len(outcomes), len(outcomes) - refused, refused]
  return [f"`{name}`", *map(str, counts), f"{slowest:.2f} s", f"{grown / 1e6:.0f} MB"]


def _evidence(command: str, table: list[list[str]], note: str) -> dict:
  git = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True)
  return {
    "title": "What became of changed files",
    "command": [command],
    "date": datetime.date.today().isoformat(),
    "commit": git.stdout.strip(),
    "machine": "two CPU cores, beside other work",
    "note": note,
    "columns": COLUMNS,
    "rows": table,
  }


if __name__ == "__main__":
  sys.exit(main())
