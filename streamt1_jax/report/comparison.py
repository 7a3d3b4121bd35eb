"""The page of a comparison of searches: its tables and its plots in one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from streamt1_jax.io import atomic
from streamt1_jax.report import write


def write_comparison(output: epath.Path, sections: Sequence[Any], plots: Mapping[str, epath.Path]) -> None:
  """Writes the page, which appears whole or not at all and needs no other file.

  Args:
    output: the HTML file.
    sections: parts with a title, sentences `before`, `head` and `rows` of a table and sentences `after`, all texts. The
      first is the page's own. What stands between backticks is code.
    plots: SVG files by their titles.
  """
  as_data = lambda svg: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
  drawn = [(title, as_data(path.read_bytes())) for title, path in plots.items()]
  page = write.render("comparison.html", sections=sections, plots=drawn)
  atomic.replace_bytes(output, page.encode())
