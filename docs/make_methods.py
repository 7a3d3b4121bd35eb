"""Fills the table of searches in `docs/methods/index.md` from the table of the package.

  python docs/make_methods.py           rewrites it
  python docs/make_methods.py --check   exit code 1 if it is not what the package says

Everything between the two lines of the page is generated, and committed:

  <!-- methods -->
  <!-- end of methods -->
"""

import pathlib
import re
import sys

from streamt1_jax.methods import METHODS, Method

PAGE = pathlib.Path(__file__).parent / "methods" / "index.md"
_BLOCK = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)


def table() -> str:
  """A row for every search."""
  rows = ["| search | what it is | flags that it takes |", "|---|---|---|", *map(_row, METHODS.values())]
  return "\n".join([*rows, ""])


def _row(method: Method) -> str:
  numbers = [f"`--policy={name}:NUMBER`" for name in method.numbers]
  flags = [*(f"`--{name}`" for name in method.fields), *numbers]
  return f"| [`{method.name}`]({method.name}.md) | {method.about} | {', '.join(flags)} |"


def fill(page: str) -> str:
  """The page with the table as the package says."""
  return _BLOCK.sub(lambda match: f"{match[1]}\n{table()}\n{match[2]}", page)


def main(argv: list[str]) -> int:
  text = PAGE.read_text(encoding="utf-8")
  if fill(text) == text:
    return 0
  if "--check" in argv:
    print(f"{PAGE}: the table is not what the package says; run python docs/make_methods.py")
    return 1
  PAGE.write_text(fill(text), encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
