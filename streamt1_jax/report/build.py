"""Lays out a report: everything that a template needs to know of one result, so that it only has to draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from streamt1_jax.report import memory, pictures, story, summary, svg
from streamt1_jax.report.account import Account, newest
from streamt1_jax.report.memory import Remembered
from streamt1_jax.report.pictures import Strips
from streamt1_jax.report.story import SCORES, Candidate, Story
from streamt1_jax.report.svg import Columns, LineChart, Series

_MOST_FILM_FRAMES, _WIDEST_FILM_FRAME = 12, 96.0
_NARROWEST_LABEL, _MOST_RULER_NUMBERS = 32.0, 12
_SCORE_WIDTH, _SCORE_HEIGHT = 34.0, 34.0
_NARROW_LABEL = 20.0
_ROW_HEIGHTS = ((4, 40.0), (8, 30.0), (16, 22.0))
_NARROW_ROW = 15.0


@dataclasses.dataclass(frozen=True)
class Node:
  """A candidate in the tree: where it stands, and who it is."""

  x: float
  y: float
  candidate: Candidate


@dataclasses.dataclass(frozen=True)
class Link:
  """From a candidate to its parent; `shown` if both are in the video."""

  path: str
  shown: bool
  survives: bool


@dataclasses.dataclass(frozen=True)
class Tree:
  """All candidates of a search: columns are chunks, rows candidates. Where there is room, marks have their scores."""

  columns: Columns
  height: float
  row_height: float
  radius: float
  has_scores: bool
  rows: Sequence[tuple[float, str]]
  nodes: Sequence[Node]
  links: Sequence[Link]


@dataclasses.dataclass(frozen=True)
class Column:
  """A chunk on the common axis: its number, and where it begins in seconds, None if that is not known."""

  chunk: int
  x: float
  center: float
  start: float | None
  given: bool
  labelled: bool


@dataclasses.dataclass(frozen=True)
class Film:
  """Frames of the video above their chunks: left edge, chunk and picture of each, all of one size."""

  frames: Sequence[tuple[float, int, str]]
  width: float
  height: float


@dataclasses.dataclass(frozen=True)
class Report:
  """Everything of one result that a template draws.

  Attributes:
    key: begins every id of this result in the page.
    account: the result, of a long search the newest chunks.
    story: what happened.
    lead: sentences that sum it up.
    facts: label and text.
    segments: start in seconds (None if not known), chunk and prompt of each.
    columns: the common axis.
    axis: a column for each chunk.
    film: frames of the video above them.
    tree: all candidates.
    charts: scores over chunks.
    memory: what was remembered, or None if the trace does not say.
    strips: pictures of candidates, as URLs.
    seconds: where the time went; () if the result does not say.
    work: what the TFLOP were spent on; () if the result does not say.
    counts: name and number of what the search counted; () if the result does not say.
    tries: chunks, seed, score, judged frames and fate of what was tried from the host; () for most searches.
    settings: name and value of everything that decided the video.
    video: URL of the video, or None.
  """

  key: str
  account: Account
  story: Story
  lead: Sequence[str]
  facts: Sequence[tuple[str, str]]
  segments: Sequence[tuple[float | None, int, str]]
  columns: Columns
  axis: Sequence[Column]
  film: Film
  tree: Tree
  charts: Sequence[LineChart]
  memory: Remembered | None
  strips: Mapping[tuple[int, int], str]
  seconds: Sequence[summary.Share]
  work: Sequence[summary.Share]
  counts: Sequence[tuple[str, str]]
  tries: Sequence[Sequence[str]]
  settings: Sequence[tuple[str, str]]
  video: str | None

  @property
  def ruler_step(self) -> int:
    """Every how many chunks the ruler below the player has a number."""
    return _every(self.columns.count / _MOST_RULER_NUMBERS)

  @property
  def kinds(self) -> list[tuple[str, str]]:
    """Kinds of candidates that there are, with what a legend says of them."""
    shown = "led to the best beam" if self.story.failed else "in the video"
    words = {
      story.WINNER: shown,
      story.SURVIVOR: "survived for a while",
      story.LOSER: "dropped",
      story.REJECTED: "never finished",
      story.UNUSABLE: "NaN or Inf",
    }
    found = {candidate.kind for chunk in self.story.chunks for candidate in chunk.values()}
    return [(kind, meaning) for kind, meaning in words.items() if kind in found]


def _every(least: float) -> int:
  """The smallest round number that is not less."""
  return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step >= least)


def build(key: str, account: Account, video: str | None) -> Report:
  """The report of a result, whose video is at the URL `video`. Raises ConfigError if its pictures are damaged."""
  whole, account = account, newest(account)
  told = story.tell(account)
  columns = Columns.of(told.end, account.hidden)
  spans = chunk_spans(account, told.end)
  fps = account.section("length").get("fps")
  starts: list[float | None] = [None] * told.end
  if isinstance(fps, (int, float)) and fps > 0 and spans:
    starts = [begin / fps for begin, _ in spans]
  strips, of_video = _strips(account, told, spans)
  return Report(
    key=key,
    account=account,
    story=told,
    lead=summary.lead(account, told),
    facts=summary.facts(account, told),
    segments=[(starts[at] if at < len(starts) else None, at, prompt) for at, prompt in _segments(account)],
    columns=columns,
    axis=_axis(told, columns, starts),
    film=_film(told, columns, of_video),
    tree=_tree(told, columns),
    charts=_charts(told, columns) if told.judged else (),
    memory=memory.remember(whole, story.shown_line(whole), account.hidden) if told.chunks else None,
    strips={place: pictures.as_data(strip) for place, strip in strips.items()},
    seconds=summary.shares(account.section("wall_seconds"), "search", "s"),
    work=summary.work(account),
    counts=summary.counts(whole),
    tries=summary.tries(account),
    settings=[(name, summary.plain(value)) for name, value in account.settings.items()],
    video=video,
  )


def chunk_spans(account: Account, chunks: int) -> list[tuple[int, int]]:
  """First frame, and the one behind the last, of every chunk of the video; [] if the manifest does not say.

  The first latent frame is one frame, every later one as many as the codec makes of it.
  """
  length = account.section("length")
  frames, latent = length.get("frames"), length.get("latent_frames")
  if not (isinstance(frames, int) and isinstance(latent, int) and chunks and length.get("chunks") == chunks):
    return []
  if latent % chunks or latent < 2 or (frames - 1) % (latent - 1):
    return []
  per_latent, per_chunk = (frames - 1) // (latent - 1), latent // chunks
  begins = [0] + [1 + per_latent * (per_chunk * chunk - 1) for chunk in range(1, chunks)]
  return list(zip(begins, [*begins[1:], frames], strict=True))


def _segments(account: Account) -> list[tuple[int, str]]:
  return [(segment["chunk"], segment["prompt"]) for segment in account.trace["segments"]]


def _strips(account: Account, told: Story, spans: Sequence[tuple[int, int]]) -> tuple[Strips, Mapping[int, bytes]]:
  """Strips of candidates, and of chunks of the video. What was not kept of the video's own is read from the video."""
  strips = pictures.kept(account.folder, account.hidden)
  shown = {winner.chunk: (winner.chunk, winner.number) for winner in map(told.winner, range(len(told.chunks)))}
  of_video = {chunk: strips[place] for chunk, place in shown.items() if place in strips}
  seen = list(enumerate(spans))[account.hidden :]
  missing = {chunk: span for chunk, span in seen if chunk not in of_video}
  if missing and account.video is not None:
    of_video |= pictures.from_video(account.video, missing)
  strips |= {place: of_video[chunk] for chunk, place in shown.items() if chunk in of_video}
  known = {(each.chunk, each.number) for chunk in told.chunks for each in chunk.values()}
  return {place: strip for place, strip in strips.items() if place in known}, of_video


def _axis(told: Story, columns: Columns, starts: Sequence[float | None]) -> list[Column]:
  every = _every(_NARROWEST_LABEL / columns.step)
  return [
    Column(
      chunk=chunk,
      x=columns.left(chunk),
      center=columns.center(chunk),
      start=starts[chunk],
      given=chunk < told.given,
      labelled=chunk % every == 0,
    )
    for chunk in range(columns.first, told.end)
  ]


def _film(told: Story, columns: Columns, of_video: Mapping[int, bytes]) -> Film:
  every = max(1, -(-(told.end - columns.first) // _MOST_FILM_FRAMES))
  shown = [chunk for chunk in range(columns.first, told.end, every) if chunk in of_video]
  if not shown:
    return Film((), 0.0, 0.0)
  rows, row_width = pictures.size_of(of_video[shown[0]])
  width = min(columns.step * every - 5.0, _WIDEST_FILM_FRAME)
  left = lambda chunk: columns.left(chunk) + 0.5 * (columns.step * every - width)
  frames = [(left(chunk), chunk, pictures.as_data(pictures.middle_of(of_video[chunk]))) for chunk in shown]
  return Film(frames, width, width * rows / row_width)


def _tree(told: Story, columns: Columns) -> Tree:
  names = {candidate.number: candidate.name for chunk in told.chunks for candidate in chunk.values()}
  rows = 1 + max(names, default=0)
  row_height = next((height for most, height in _ROW_HEIGHTS if rows <= most), _NARROW_ROW)
  has_scores = columns.step >= _SCORE_WIDTH and row_height >= _SCORE_HEIGHT
  # A mark is lower where its score stands above it.
  place = lambda number: (number + (0.62 if has_scores else 0.5)) * row_height + 4.0
  at = lambda candidate: (columns.center(candidate.chunk), place(candidate.number))
  nodes, links = [], []
  for index, chunk in enumerate(told.chunks):
    for candidate in chunk.values():
      x, y = at(candidate)
      nodes.append(Node(x, y, candidate))
      if candidate.parent is not None:
        parent = told.chunks[index - 1][candidate.parent]
        shown = candidate.kind == story.WINNER
        survives = candidate.kind in (story.WINNER, story.SURVIVOR)
        links.append(Link(svg.link_path(*at(parent), x, y), shown, survives))
  links.sort(key=lambda link: (link.shown, link.survives))
  radius = min(9.0, 0.3 * columns.step, 0.36 * row_height)
  labels = [(place(row), name) for row, name in sorted(names.items()) if row_height >= _NARROW_LABEL or row % 2 == 0]
  return Tree(columns, rows * row_height + 10.0, row_height, radius, has_scores, labels, nodes, links)


def _charts(told: Story, columns: Columns) -> list[LineChart]:
  """A chart for each kind of score: the shown candidates as a line, the range of all candidates as a band."""
  empty = [None] * told.given
  charts = []
  for name, title in reversed(SCORES):
    values = [[candidate.scores[name] for candidate in chunk.values()] for chunk in told.chunks]
    known = [[value for value in chunk if value is not None] for chunk in values]
    shown = [told.winner(index).scores[name] for index in range(len(told.chunks))]
    several = any(len(chunk) > 1 for chunk in known)
    lows = [*empty, *(min(chunk, default=None) for chunk in known)] if several else ()
    highs = [*empty, *(max(chunk, default=None) for chunk in known)] if several else ()
    line = Series("in the video", "shown", [*empty, *shown], lows, highs, points=True)
    charts.append(svg.line_chart(f"{title} score", columns, [line], 150.0 if name == "hybrid" else 96.0))
  return charts
