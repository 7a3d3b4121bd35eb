"""Writes pages: one self-contained HTML file for one result or several."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any
from urllib import parse

import jinja2
import markupsafe
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, result_files
from streamt1_jax.report import account, build, pictures, summary, svg
from streamt1_jax.report.account import Account
from streamt1_jax.report.build import Report
from streamt1_jax.report.story import SCORES
from streamt1_jax.report.svg import Columns, LineChart, Series

MOST_VIDEO_BYTES = 20 << 20
"""The most bytes of all videos together that a page holds itself."""
PAGE = pathlib.Path(__file__).with_name("page")
"""Templates, style and script."""
_CODE = re.compile("`([^`]+)`")


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Several searches of one prompt.

  Attributes:
    prompt: the prompt.
    reports: of the searches.
    rows: label, and a value for each search; those that differ come first.
    charts: their winners' scores in one chart each.
  """

  prompt: str
  reports: Sequence[Report]
  rows: Sequence[tuple[str, Sequence[str]]]
  charts: Sequence[LineChart]

  @property
  def head(self) -> list[str]:
    """What stands above the columns of its table."""
    return ["", *(f"Search {index}" for index in range(1, len(self.reports) + 1))]

  @property
  def table(self) -> list[list[str]]:
    """Its rows, the label first."""
    return [[name, *values] for name, values in self.rows]


@functools.cache
def environment() -> jinja2.Environment:
  """Templates of this room. What they are given is escaped; other pages extend `base.html` and import `charts.html`."""
  loader = jinja2.FileSystemLoader(PAGE)
  made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                            lstrip_blocks=True)  # fmt: skip
  made.filters |= {"coordinate": svg.number, "score": summary.score, "code": code}
  return made


def code(sentence: str) -> markupsafe.Markup:
  """A sentence whose words between backticks are code. Everything in it is escaped."""
  return markupsafe.Markup(_CODE.sub(r"<code>\1</code>", str(markupsafe.escape(sentence))))


def render(template: str, **context: Any) -> str:
  """A page of its own: style and script of the room are in it, and it may load nothing else.

  Args:
    template: a file in page/ that extends `base.html`.
    context: what the template needs.
  """
  style, script = ((PAGE / name).read_text() for name in ("report.css", "report.js"))
  # The browser runs this script and no other: whatever a prompt says.
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  return environment().get_template(template).render(style=style, script=script, script_digest=digest, **context)


def write_report(
  folders: Sequence[epath.PathLike], output: epath.PathLike, assets: epath.PathLike | None = None
) -> None:
  """Writes the report of some results to one file, which appears whole or not at all.

  Args:
    folders: of results, at least one.
    output: the HTML file; its parent folders are made.
    assets: where videos are copied to; None to put them into the page.

  Raises:
    ConfigError: a folder holds no trace, or one of a form that is not known; the videos are too large for a page.
    OSError: the file system refuses; an earlier file stays.
  """
  accounts = [account.read(folder) for folder in folders]
  sources = _embedded(accounts) if assets is None else _copied(accounts, epath.Path(assets), epath.Path(output))
  _write(accounts, sources, epath.Path(output))


def write_beside(folder: epath.Path) -> None:
  """Writes the report of a result into its folder. A video too large for a page is shown from beside it.

  Raises ConfigError and OSError as `write_report`.
  """
  made = account.read(folder)
  if made.video is None or made.video.stat().length <= MOST_VIDEO_BYTES:
    sources = _embedded([made])
  else:
    sources = [result_files.VIDEO]
  _write([made], sources, folder / result_files.REPORT)


def _write(accounts: Sequence[Account], sources: Sequence[str | None], output: epath.Path) -> None:
  reports = [
    build.build(f"r{index}-", made, source) for index, (made, source) in enumerate(zip(accounts, sources, strict=True))
  ]
  own_files = all(source is None or source.startswith("data:") for source in sources)
  html = render("report.html", reports=reports, comparisons=compare(reports), own_files=own_files)
  # JSON may hold halves of pairs, which are no text.
  atomic.replace_bytes(output, html.encode(errors="replace"))


def _embedded(accounts: Sequence[Account]) -> list[str | None]:
  videos = [made.video for made in accounts]
  size = sum(path.stat().length for path in videos if path is not None)
  if size > MOST_VIDEO_BYTES:
    raise ConfigError(
      f"the videos have {size / 2**20:.1f} MB, and a page holds at most {MOST_VIDEO_BYTES >> 20}: give --assets=DIR"
    )
  return [None if path is None else pictures.as_data(path.read_bytes(), "video/mp4") for path in videos]


def _copied(accounts: Sequence[Account], assets: epath.Path, output: epath.Path) -> list[str | None]:
  """Copies the videos into `assets`. Returns their URLs as seen from `output`."""
  assets.mkdir(parents=True, exist_ok=True)
  sources: list[str | None] = []
  for index, made in enumerate(accounts):
    if made.video is None:
      sources.append(None)
      continue
    target = assets / f"{index}-{made.folder.resolve().name}.mp4"
    partial = assets / f".{target.name}.partial"
    try:
      with made.video.open("rb") as source, partial.open("wb") as copy:
        shutil.copyfileobj(source, copy)
      partial.replace(target)
    finally:
      partial.unlink(missing_ok=True)
    sources.append(parse.quote(os.path.relpath(target.resolve(), output.resolve().parent)))
  return sources


def compare(reports: Sequence[Report]) -> list[Comparison]:
  """A comparison for every prompt, or timeline, that several results have in common."""
  key = lambda report: [(at, prompt) for _, at, prompt in report.segments]
  groups = itertools.groupby(sorted(reports, key=key), key=key)
  found = [list(group) for _, group in groups]
  return [_comparison(group) for group in found if len(group) > 1]


def _comparison(reports: Sequence[Report]) -> Comparison:
  rows = _rows([dict(report.facts) for report in reports])
  rows += _rows([dict(report.counts) for report in reports])
  settings = _rows([dict(report.settings) for report in reports])
  rows += [row for row in settings if len(set(row[1])) > 1]
  end = max(report.story.end for report in reports)
  columns = Columns.of(end, max(0, end - account.MOST_CHUNKS))
  charts = []
  if all(report.story.judged for report in reports):
    for field, title in reversed(SCORES):
      series = [Series(str(index + 1), f"search-{index % 4}", _shown(report, field), points=True)
                for index, report in enumerate(reports)]  # fmt: skip
      charts.append(svg.line_chart(f"{title} score", columns, series))
  return Comparison(reports[0].account.prompt, reports, rows, charts)


def _rows(owners: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
  names = dict.fromkeys(name for owner in owners for name in owner)
  rows = [(name, [owner.get(name, "\N{EN DASH}") for owner in owners]) for name in names]
  return sorted(rows, key=lambda row: len(set(row[1])) == 1)


def _shown(report: Report, field: str) -> list[float | None]:
  told = report.story
  return [None] * told.given + [told.winner(index).scores[field] for index in range(len(told.chunks))]
