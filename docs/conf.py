"""Sphinx: `sphinx-build -W -b html docs build/docs`. Builds offline."""

import pathlib
import re
import sys

_DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(_DOCS), str(_DOCS.parent)]

import make_evidence  # noqa: E402

import streamt1_jax  # noqa: E402

project = "streamt1_jax"
author = "The streamt1_jax authors"
release = streamt1_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "*.ipynb"]
html_theme = "furo"
html_title = "streamt1_jax"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_theme_options = {
  "light_css_variables": {"font-stack": "system-ui, sans-serif"},
  "dark_css_variables": {"font-stack": "system-ui, sans-serif"},
}
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_heading_anchors = 3

default_role = "literal"  # docstrings put names between single backticks
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Raises|Yields|Note|Example|Examples):$")


def _keep_diagrams(app, what, name, obj, options, lines: list[str]) -> None:
  """Drawings and equations in docstrings are indented paragraphs: they are shown as they are typed."""
  if name == "streamt1_jax":
    lines.clear()  # the quickstart says it
  shown, in_section, block = [], False, False
  for line in lines:
    indented = line.startswith(" ")
    if not indented and line:
      in_section, block = bool(_SECTION.match(line)), False
    if indented and not in_section and not block and (not shown or not shown[-1]):
      shown += [".. code-block:: text", ""]
      block = True
    # A letter right after a name in backticks, as in a plural, has to be marked.
    shown.append(line if block else re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line))
  lines[:] = shown


def _skip_fields(app, what, name, obj, skip, options) -> bool | None:
  """Fields of named tuples are described in the class's own docstring."""
  return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app) -> None:
  if make_evidence.stale():
    raise SystemExit("docs: run python docs/make_evidence.py, some tables are not what docs/evidence says")
  app.connect("autodoc-process-docstring", _keep_diagrams, priority=400)  # before napoleon
  app.connect("autodoc-skip-member", _skip_fields)
