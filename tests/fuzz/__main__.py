"""Tries many changed files by hand: `python -m tests.fuzz --count=2000 --seed=0`. A table of outcomes ends it."""

import argparse
import collections
import pathlib
import sys
import tempfile
import time
import traceback

import numpy as np

from tests.fuzz import own_files, run_files, weights
from tests.fuzz.kinds import cases, try_file

KINDS = {**weights.KINDS, **own_files.KINDS, **run_files.KINDS}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kinds", default=",".join(KINDS))
  parser.add_argument("--keep", help="folder for the files that break the law")
  given = parser.parse_args()
  kinds = {name: KINDS[name] for name in given.kinds.split(",")}
  counts, slowest, failed = collections.Counter(), collections.Counter(), 0
  with tempfile.TemporaryDirectory() as folder:
    made = cases(np.random.default_rng(given.seed), pathlib.Path(folder), kinds)
    for index, (name, path) in zip(range(given.count), made):
      start = time.perf_counter()
      try:
        counts[name, "refused" if try_file(kinds[name], path) else "loaded"] += 1
      except BaseException as error:
        failed += 1
        print(f"{index}: {name}: {type(error).__name__}: {str(error)[:300]}")
        traceback.print_exc(limit=-4)
        if given.keep:
          path.rename(pathlib.Path(given.keep) / f"{given.seed}-{index}-{name}{path.suffix}")
        if isinstance(error, KeyboardInterrupt):
          return 130
      slowest[name] = max(slowest[name], time.perf_counter() - start)
  for name in kinds:
    print(
      f"{name:12} {counts[name, 'loaded']:5} loaded {counts[name, 'refused']:5} refused {slowest[name]:6.2f} s at most"
    )
  print(f"{failed} of {given.count} broke the law")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
