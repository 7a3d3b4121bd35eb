"""Fills the table of searches in `docs/methods/index.md` and the figures on the page of each search.

  python docs/make_methods.py           rewrites them
  python docs/make_methods.py --check   exit code 1 if a page is not what the package and the evidence say

Everything between such a pair of lines is generated, and committed:

  <!-- methods -->
  <!-- end of methods -->

  <!-- figures: NAME -->
  <!-- end of figures -->

The table is that of the package. Figures are the rows of NAME, with any sizes and settings, in the comparisons of
`docs/evidence/search_*_methods.json`.
"""

import json
import pathlib
import re
import sys
from collections.abc import Iterator

from streamt1_jax.methods import METHODS, Method

PAGES = pathlib.Path(__file__).parent / "methods"
EVIDENCE = pathlib.Path(__file__).parent / "evidence"
COMPARISONS = "search_*_methods.json"
_TABLE = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)
_FIGURES = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_COLUMNS = ("all_at_once", "minus none", "forwards", "x none")
"""Columns of a comparison that the page of a search shows."""


def table() -> str:
  """A row for every search."""
  rows = ["| search | what it is | flags that it takes |", "|---|---|---|", *map(_row, METHODS.values())]
  return "\n".join([*rows, ""])


def _row(method: Method) -> str:
  numbers = [f"`--policy={name}:NUMBER`" for name in method.numbers]
  flags = [*(f"`--{name}`" for name in method.fields), *numbers]
  return f"| [`{method.name}`]({method.name}.md) | {method.about} | {', '.join(flags)} |"


def figures(name: str) -> str:
  """What comparisons say of a search."""
  rows = [row for path in sorted(EVIDENCE.glob(COMPARISONS)) for row in _compared(name, path)]
  if not rows:
    return "It is not among the [searches that were compared](../evidence/search.md).\n"
  lines = [
    "| videos | search | all at once | minus plain streaming | forwards | times the TFLOP of plain streaming |",
    "|---|---|---|---|---|---|",
    *(f"| {' | '.join(row)} |" for row in rows),
    "",
    "The small model; all at once is the share of videos in which everything is as the caption says. [Whose captions, "
    "how many, and what the intervals are](../evidence/search.md).",
    "",
  ]
  return "\n".join(lines)


def _compared(name: str, path: pathlib.Path) -> Iterator[list[str]]:
  evidence = json.loads(path.read_text(encoding="utf-8"))
  for row in evidence["rows"]:
    cells = dict(zip(evidence["columns"], row, strict=True))
    if cells["method"].partition(":")[0] == name:
      yield [evidence["title"].rpartition(":")[0], f"`{cells['method']}`", *(cells[column] for column in _COLUMNS)]


def fill(page: str) -> str:
  """The page as the package and the evidence say."""
  page = _TABLE.sub(lambda match: f"{match[1]}\n{table()}\n{match[2]}", page)
  return _FIGURES.sub(lambda match: f"{match[1]}\n{figures(match[2])}\n{match[3]}", page)


def main(argv: list[str]) -> int:
  texts = {page: page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))}
  changed = {page: fill(text) for page, text in texts.items() if fill(text) != text}
  for page, text in changed.items():
    if "--check" in argv:
      print(f"{page}: not what the package and the evidence say; run python docs/make_methods.py")
    else:
      page.write_text(text, encoding="utf-8")
  return 1 if changed and "--check" in argv else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
