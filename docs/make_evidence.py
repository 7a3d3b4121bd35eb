"""Fills the tables of the documentation from `docs/evidence/*.json`.

  python docs/make_evidence.py           rewrites the tables
  python docs/make_evidence.py --check   exit code 1 if a table is not what its file says

A page asks for a table by its file's name, and everything between the two lines is generated:

  <!-- evidence: small_videos -->
  <!-- end of evidence -->

Tables are committed, so that they can be read where no Sphinx runs. Needs nothing but Python.
"""

import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence"
NOT_YET = {
  "device_check": "No device has run this yet. A machine with an accelerator makes the table:\n\n```bash\n"
  "python -m experiments.measure.device_check --minutes=20 --output=docs/evidence/device_check.json\n"
  "python docs/make_evidence.py\n```"
}
"""Files that need not be there, and what their page says until they are."""
_BLOCK = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- end of evidence -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
  """One measurement: title, command, date, commit, columns, rows; machine and note if it has them."""
  return json.loads((EVIDENCE / f"{name}.json").read_text(encoding="utf-8"))


def render(evidence: dict[str, Any]) -> str:
  """The measurement in Markdown: a table, what it says beside it, and where it comes from."""
  lines = [f"**{evidence['title']}**", ""]
  columns, rows = evidence["columns"], evidence["rows"]
  lines += [_row(columns), "|" + "---|" * len(columns), *map(_row, rows), ""]
  if "note" in evidence:
    lines += [evidence["note"], ""]
  machine = f" {evidence['machine'][0].upper()}{evidence['machine'][1:]}." if "machine" in evidence else ""
  lines += [f"*Recorded on {evidence['date']} in commit `{evidence['commit']}`.{machine}*", ""]
  return "\n".join([*lines, "```bash", *evidence["command"], "```", ""])


def block(name: str) -> str:
  """What stands between the two lines of a page."""
  if name in NOT_YET and not (EVIDENCE / f"{name}.json").exists():
    return f"{NOT_YET[name]}\n"
  return render(read(name))


def fill(page: str) -> str:
  """The page with all of its tables as their files say."""
  return _BLOCK.sub(lambda match: f"{match[1]}\n{block(match[2])}\n{match[3]}", page)


def pages() -> list[pathlib.Path]:
  """All pages that may ask for tables."""
  return [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "checkpoints" / "tiny" / "README.md"]


def stale() -> dict[pathlib.Path, str]:
  """Pages whose tables are not what their files say, with what they should be."""
  texts = {page: page.read_text(encoding="utf-8") for page in pages()}
  return {page: fill(text) for page, text in texts.items() if fill(text) != text}


def _row(cells: list[str]) -> str:
  # An interval is not broken into lines.
  cells = [re.sub(r"\[(\S+), (\S+)\]", "[\\1,\u00a0\\2]", cell) for cell in cells]
  return "| " + " | ".join(cells) + " |"


def main(argv: list[str]) -> int:
  changed = stale()
  for page, text in changed.items():
    print(f"{page.relative_to(ROOT)}: the tables are not what docs/evidence says")
    if "--check" not in argv:
      page.write_text(text, encoding="utf-8")
  return int(bool(changed) and "--check" in argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
