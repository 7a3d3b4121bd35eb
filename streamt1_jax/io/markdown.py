"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def head(columns: Sequence[str]) -> str:
  """The two lines above the rows."""
  return f"{row(columns)}\n|{'---|' * len(columns)}"


def row(cells: Iterable[str]) -> str:
  """One line of a table."""
  return f"| {' | '.join(cells)} |"


def table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
  """A whole table."""
  return "\n".join([head(columns), *map(row, rows)])
