"""The pages agree with the repository: links, paths, commands, flags and figures. Sphinx itself runs in `.ci/run`."""

import ast
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from streamt1_jax.__main__ import COMMANDS
from streamt1_jax.convert.tables.published_files import PUBLISHED
from streamt1_jax.rewards.table import PUBLISHED_REWARDS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/tiny/README.md")),
  *sorted((ROOT / "docs").rglob("*.md")),
]
EVIDENCE = sorted((ROOT / "docs" / "evidence").glob("*.json"))
# A line may end with a backslash: the command goes on.
_COMMAND = re.compile(r"(?:python -m|\bstreamt1) (?:[^`\n\\]|\\\n)*")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def _name(path):
  return str(path.relative_to(ROOT))


def _commands(page):
  """Commands of a page, each in one line, without the old names of the changelog."""
  return [match.replace("\\\n", " ") for match in _COMMAND.findall(page.read_text())]


@pytest.mark.parametrize("checkout", [True, False])
def test_the_notebook_installs_a_checkout_or_asks_for_an_address(tmp_path, monkeypatch, checkout):
  """Where there is no checkout, as in Colab, the folder above is not what pip is given."""
  cells = json.loads((ROOT / "docs/first_steps.ipynb").read_text())["cells"]
  source = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
  program, installs = re.subn(r"%pip install --quiet \{(\w+)\}", r"given.append(\1)", source)
  assert installs == 1
  (tmp_path / "docs").mkdir()
  monkeypatch.chdir(tmp_path / "docs")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  given = []
  if checkout:
    (tmp_path / "pyproject.toml").touch()
    exec(program, {"given": given})
  else:
    with pytest.raises(ValueError, match="address that you clone the repository from"):
      exec(program, {"given": given})
  assert given == [".."] * checkout


def _slug(heading):
  """The anchor of a heading, as GitHub and MyST make it."""
  words = re.sub(r"[`*_\[\]]|\(.*?\)", "", heading).strip().lower()
  return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def test_readme_is_one_page():
  lines = (ROOT / "README.md").read_text().splitlines()
  assert len(lines) <= 150
  text = "\n".join(lines)
  assert (
    'pip install -e . && python -m experiments.generate --prompt="a red circle moves left over a dark blue background"'
    in text
  )
  assert "pip install -e '.[test]' && python -m pytest" in text


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
  text = _FENCE.sub("", page.read_text())
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"[a-z]+:", target):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"{_name(page)} links to {target}"
    if anchor:
      headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", file.read_text()), re.MULTILINE)
      assert anchor in map(_slug, headings), f"{_name(page)} links to {target}"


def test_pages_that_sources_cite_exist():
  cited = {}
  for folder in ("streamt1_jax", "experiments", "tests"):
    for source in sorted((ROOT / folder).rglob("*.py")):
      for path, anchor in re.findall(r"\bdocs/([\w/]+\.md)(?:#([\w-]+))?", source.read_text()):
        cited[path, anchor] = _name(source)
  for (path, anchor), source in cited.items():
    page = ROOT / "docs" / path
    assert page.exists(), f"{source} cites docs/{path}"
    if anchor:
      headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
      assert anchor in map(_slug, headings), f"{source} cites docs/{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_exist(page):
  for command in _commands(page):
    words = command.split()
    if words[0] == "streamt1":
      # In prose the name of the command stands alone.
      known = words[1:2] in ([name] for name in COMMANDS) or words[1] in ("COMMAND", "--help")
      assert known, f"{_name(page)}: {command}"
      continue
    module = re.match(r"[\w.]*", words[2])[0]
    if module in ("pytest", "venv", "streamt1_jax"):
      continue
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{_name(page)}: {command}"
    # A package is no program unless it says so.
    runs = spec.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__")
    assert runs, f"{_name(page)}: {command}"


def test_flags_exist():
  strings = set()
  for folder in ("streamt1_jax", "experiments", "tests"):
    for source in (ROOT / folder).rglob("*.py"):
      nodes = ast.walk(ast.parse(source.read_text()))
      strings |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
  # These are made from the names of the rewards.
  strings |= {f"{name}_prompt" for name in PUBLISHED_REWARDS}
  for page in PAGES:
    for command in _commands(page):
      if command.startswith("python -m pytest"):
        continue
      for flag in re.findall(r"(?<!\S)--(\w+)", command):
        assert flag in ("help", "flagfile") or flag in strings, f"{_name(page)}: --{flag} in {command}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "evidence"], ids=_name)
def test_flagfiles_exist(page):
  """Pages of evidence say which files were read when it was recorded."""
  for path in re.findall(r"--flagfile=([\w$./-]+\.flags)", page.read_text()):
    # A folder in capitals stands for one of the reader's own.
    name = re.sub(r"^\$FLAGFILES/", "experiments/flagfiles/", path)
    if re.match(r"[A-Z]+/", name):
      continue
    folder = ROOT if "/" in name else ROOT / "experiments" / "flagfiles"
    assert (folder / name).is_file(), f"{_name(page)}: --flagfile={path}"


def test_a_tpu_is_installed_by_hand_as_by_the_scripts():
  """The same Python and the same extras."""
  found = []
  for file in ("docs/install.md", "experiments/launch/install.sh"):
    lines = [line for line in (ROOT / file).read_text().splitlines() if "-m uv " in line]
    text = " ".join(lines)
    found.append((re.findall(r"--python (3\.\d+)", text), re.findall(r"streamt1_jax\[([\w,]+)\]", text)))
  assert found[0] == found[1]
  assert [len(each) for each in found[0]] == [1, 1]


def _words(file):
  return " ".join((ROOT / file).read_text().split())


def test_what_must_be_known_of_the_weights():
  """Licences, what differs from the released program, what nobody has tried, and every file by its name."""
  page = _words("docs/weights.md")
  for fact in ("Equal seeds give other noise", "CC-BY-NC-SA", "CC-BY-NC-4.0", "Apache-2.0", "Never tried"):
    assert fact.lower() in page.lower()
  never = page.lower().split("never tried", 1)[1]
  for file in PUBLISHED:
    assert file.path.rpartition("/")[2].lower() in never, file.path


def test_what_no_compilation_has():
  """As long as none has it, pages that say what fits say so."""
  assert "scratch" not in (ROOT / "docs/evidence/compiled_slices.json").read_text()
  for file, section in (("docs/pods.md", "## Does it fit?"), ("docs/weights.md", "## Memory and disk")):
    said = _words(file).split(section, 1)[1].split(" ## ", 1)[0]
    assert "No recorded compilation has `--reward_decode=scratch`" in said


@pytest.mark.parametrize(
  ("file", "facts"),
  [
    ("docs/rewards.md", ["git checkout 219ab9d"]),
    ("docs/install.md", ["venv newer", "pip freeze"]),
    ("streamt1_jax/flagfiles/paper_30s.flags", ["Inferred", "120"]),
  ],
)
def test_advice_that_must_not_get_lost(file, facts):
  for fact in facts:
    assert fact in _words(file)


@pytest.mark.parametrize("file", EVIDENCE, ids=_name)
def test_evidence_says_where_it_comes_from(file):
  evidence = json.loads(file.read_text())
  assert evidence["command"]
  assert all(isinstance(command, str) for command in evidence["command"])
  assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", evidence["date"])
  assert re.fullmatch(r"[0-9a-f]{7,40}", evidence["commit"])
  assert all(len(row) == len(evidence["columns"]) for row in evidence["rows"])


def test_tables_are_what_evidence_says():
  program = ROOT / "docs" / "make_evidence.py"
  found = subprocess.run([sys.executable, program, "--check"], capture_output=True, text=True)
  assert found.returncode == 0, found.stdout + found.stderr


def test_every_evidence_is_shown():
  pages = "".join(page.read_text() for page in PAGES)
  for file in EVIDENCE:
    assert f"<!-- evidence: {file.stem} -->" in pages, f"{_name(file)} is on no page"


def test_figures_of_the_readme_are_evidence():
  results = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
  # Names of models and sizes, which are no results.
  results = re.sub(r"1\.3B|832x480|v6e|\[.*?\]\(.*?\)", "", results)
  evidence = " ".join(file.read_text() for file in EVIDENCE)
  for figure in re.findall(r"\d[\d.]*(?:e-\d+)?", results):
    figure = figure.rstrip(".")
    assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", evidence), f"{figure} is in no file of docs/evidence"


def test_drawings_are_what_the_program_draws():
  spec = importlib.util.spec_from_file_location("make_figures", ROOT / "docs" / "figures" / "make_figures.py")
  figures = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(figures)
  for name, draw in (("one_chunk", figures.one_chunk), ("memory", figures.memory)):
    assert (ROOT / "docs" / "figures" / f"{name}.svg").read_text() == draw()
