"""Comments, docstrings and pages are plain English: these phrases make a reader turn the sentence round first."""

import ast
import io
import json
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = [
  path for folder in ("streamt1_jax", "experiments", "tests", "docs") for path in (ROOT / folder).rglob("*.py")
]
PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
  *(path for folder in ("checkpoints", "docs", "tests") for path in (ROOT / folder).rglob("*.md")),
]
NOTEBOOKS = list((ROOT / "docs").glob("*.ipynb"))
PHRASES = re.compile(
  r"\bof which\b|\bso many\b|\b(?:is|are) none\b|\b[Ww]hoever\b"
  r"|(?:^|[.:!?][\"`)]*\s+|[-*#]\s+)Of\s"
  r"|, for (?:it|they|there) (?:is|are|was|were|has|have|had)\b"
)


def _paragraphs_of_source(text):
  """Docstrings, and comments; lines of comments that follow each other are one comment."""
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
      yield from node.value.value.split("\n\n")
  comment, last = [], -1
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      if token.start[0] != last + 1:
        yield "\n".join(comment)
        comment = []
      comment.append(token.string.lstrip("# "))
      last = token.start[0]
  yield "\n".join(comment)


def _paragraphs_of_page(text):
  return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).split("\n\n")


def _paragraphs_of_notebook(text):
  for cell in json.loads(text)["cells"]:
    if cell["cell_type"] == "markdown":
      yield from _paragraphs_of_page("".join(cell["source"]))


def _found(paragraphs):
  return [match[0].strip() for each in paragraphs for match in PHRASES.finditer(re.sub(r"\s*\n\s*", " ", each.strip()))]


def _name(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
  ("paths", "paragraphs"),
  [(SOURCES, _paragraphs_of_source), (PAGES, _paragraphs_of_page), (NOTEBOOKS, _paragraphs_of_notebook)],
  ids=["sources", "pages", "notebooks"],
)
def test_no_phrase_that_must_be_read_twice(paths, paragraphs):
  assert paths
  found = {(_name(path), phrase) for path in paths for phrase in _found(paragraphs(path.read_text()))}
  assert not found


def test_what_is_found_and_what_is_not():
  source = '"""Of a chunk.\n\nThe first of\nwhich.\n"""\nx = "of which"  # If there is none.\n# One.\n# Of two, one.\n'
  assert _found(_paragraphs_of_source(source)) == ["Of", "of which", "is none", ". Of"]
  page = "Whoever asks, so many times.\n\n- Of one, for it is late.\n\n```\nof which\n```\nThis is None for now.\n"
  assert _found(_paragraphs_of_page(page)) == ["Whoever", "so many", "- Of", ", for it is"]
  assert not _found(["A search of one, for every beam. It is of no use."])
