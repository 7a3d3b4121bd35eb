"""Makes tables of the documentation from the folder of a comparison.

  streamt1 compare --methods=none,stream_t1:2x2 --split=tune --output=runs/two_5s
  python docs/make_comparison.py --title="Two objects, 5 s" --name=search_two_5s --commit=0a90c71 \\
    --machine="two CPU cores" --output=docs/evidence \\
    runs/two_5s -- streamt1 compare --methods=none,stream_t1:2x2 --split=tune --output=runs/two_5s

writes NAME_methods.json, NAME_equal_cost.json and NAME_pool.json; the command behind -- is what the tables cite.
`docs/make_evidence.py` puts them on pages.
"""

import argparse
import json
import pathlib
import shlex
import sys
from typing import Any

from streamt1_jax.evaluation.compare import report
from streamt1_jax.evaluation.compare.report import Section
from streamt1_jax.io import manifest

_POOL_SIZES = (1, 2, 4, 8, 16)
"""Rows of the pool's table that a page shows."""
_TABLES = {"methods": "Methods", "equal_cost": "At equal cost", "pool": "Best of n from one pool"}
"""By the ending of the file, the section of the comparison."""


def tables(comparison: dict[str, Any]) -> dict[str, Section]:
  """The parts of a comparison that pages show, by the ending of their file; without those that have no table.

  What was compared stands above the first of them.
  """
  results = comparison["results"]
  results = results | {"pool": [row for row in results["pool"] if row["n"] in _POOL_SIZES]}
  parts = report.sections(comparison["plan"], results, comparison["notes"])
  found = {section.title: section for section in parts}
  found[_TABLES["methods"]] = found[_TABLES["methods"]]._replace(before=parts[0].before)
  return {ending: found[title] for ending, title in _TABLES.items() if found[title].rows}


def content(section: Section) -> dict[str, Any]:
  """What a file of the documentation holds of a part, see `docs/make_evidence.py`."""
  note = " ".join(" ".join([*section.before, *section.after]).split())
  return {"note": note, "columns": list(section.head), "rows": [list(row) for row in section.rows]}


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--title", required=True)
  parser.add_argument("--name", required=True)
  parser.add_argument("--commit", required=True, help="the code that made the videos")
  parser.add_argument("--machine", required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("command", nargs="+")
  given = parser.parse_args(argv)
  comparison = json.loads((given.folder / "comparison.json").read_text(encoding="utf-8"))
  for ending, section in tables(comparison).items():
    head = {
      "title": f"{given.title}: {section.title[0].lower()}{section.title[1:]}",
      "command": [shlex.join(given.command)],
      "date": comparison["plan"]["begun"][:10],
      "commit": given.commit,
      "machine": given.machine,
    }
    manifest.write_json(given.output / f"{given.name}_{ending}.json", head | content(section))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
