"""Geometry of charts in SVG user units, as plain numbers and path data. Templates draw it: `page/charts.html`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

Values = Sequence[float | None]
_LABEL_HEIGHT = 20.0
_ALONE = 4.0


def number(value: float) -> str:
  """A coordinate: as short as a tenth of a unit allows."""
  return f"{value:.1f}".removesuffix(".0")


@dataclasses.dataclass(frozen=True)
class Scale:
  """A linear map of values `low`..`high` to coordinates `start`..`end`."""

  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def padded_range(values: Values) -> tuple[float, float]:
  """A range around all values, never empty; (0, 1) without values."""
  known = [value for value in values if value is not None]
  if not known:
    return 0.0, 1.0
  low, high = min(known), max(known)
  margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
  return low - margin, high + margin


def ticks(low: float, high: float, most: int = 4) -> list[float]:
  """Round numbers within the range: at most `most` + 1 steps of 1, 2 or 5 times a power of ten."""
  rough = (high - low) / most
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
  return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_label(value: float, all_ticks: Sequence[float]) -> str:
  """A tick with as many decimals as the distance of ticks needs."""
  step = min((b - a for a, b in zip(all_ticks, all_ticks[1:])), default=abs(value) or 1.0)
  return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "\N{MINUS SIGN}")


def line_path(xs: Sequence[float], ys: Values) -> str:
  """Path through the points, with a gap where a value is None."""
  parts, pen_up = [], True
  for x, y in zip(xs, ys, strict=True):
    if y is not None:
      parts.append(f"{'M' if pen_up else 'L'}{number(x)} {number(y)}")
    pen_up = y is None
  return "".join(parts)


def band_path(xs: Sequence[float], lows: Values, highs: Values) -> str:
  """Closed path between two lines, with a gap where either is not known; a point alone is a narrow bar."""
  runs: list[list[tuple[float, float, float]]] = [[]]
  for x, low, high in zip(xs, lows, highs, strict=True):
    if low is None or high is None:
      runs.append([])
    else:
      runs[-1].append((x, low, high))
  return "".join(map(_closed, filter(None, runs)))


def _closed(points: Sequence[tuple[float, float, float]]) -> str:
  """Path around points (x, low, high)."""
  if len(points) == 1:
    x, low, high = points[0]
    points = [(x - _ALONE, low, high), (x + _ALONE, low, high)]
  there = [f"{number(x)} {number(high)}" for x, _, high in points]
  back = [f"{number(x)} {number(low)}" for x, low, _ in reversed(points)]
  return "M" + "L".join(there + back) + "Z"


def link_path(x0: float, y0: float, x1: float, y1: float) -> str:
  """A curve that leaves and arrives level."""
  bend = 0.5 * (x1 - x0)
  controls = f"{number(x0 + bend)} {number(y0)} {number(x1 - bend)} {number(y1)}"
  return f"M{number(x0)} {number(y0)}C{controls} {number(x1)} {number(y1)}"


@dataclasses.dataclass(frozen=True)
class Columns:
  """Equal columns, one for each chunk, right of a gutter for labels: all charts of a search share them.

  Attributes:
    count: columns, at least one.
    gutter: width of the labels on the left.
    width: of everything.
    first: the chunk of the first column.
  """

  count: int
  gutter: float = 92.0
  width: float = 860.0
  first: int = 0

  @classmethod
  def of(cls, end: int, first: int = 0, least: float = 17.0) -> Columns:
    """Those of chunks `first` to `end`, no narrower than `least`.

    Many make a chart wider than its place, which then scrolls.
    """
    count = max(end - first, 1)
    return cls(count, width=max(cls.width, cls.gutter + count * least), first=first)

  @property
  def step(self) -> float:
    return (self.width - self.gutter) / self.count

  def left(self, column: float) -> float:
    return self.gutter + (column - self.first) * self.step

  def center(self, column: int) -> float:
    return self.left(column + 0.5)


@dataclasses.dataclass(frozen=True)
class Series:
  """Values over the columns, one line.

  Attributes:
    label: its name.
    style: class of its line in the page's style sheet.
    values: a value a chunk, from the first of the video on.
    lows, highs: a band around it, or () for none.
    points: whether every value has a mark.
  """

  label: str
  style: str
  values: Values
  lows: Values = ()
  highs: Values = ()
  points: bool = False


@dataclasses.dataclass(frozen=True)
class Tick:
  """A line across a chart, and what stands beside it."""

  y: float
  label: str


@dataclasses.dataclass(frozen=True)
class DrawnSeries:
  """A series as a path, the path of its band, and its points (x, y, value, column)."""

  label: str
  style: str
  line: str
  band: str
  points: Sequence[tuple[float, float, float, int]]


@dataclasses.dataclass(frozen=True)
class LineChart:
  """Lines with bands over columns, laid out."""

  title: str
  columns: Columns
  height: float
  ticks: Sequence[Tick]
  series: Sequence[DrawnSeries]
  labels: Sequence[tuple[float, str]] = ()


def line_chart(
  title: str, columns: Columns, series: Sequence[Series], height: float = 132.0, labels: Sequence[str] = ()
) -> LineChart:
  """Lays out lines over the centers of columns; values are drawn on one common scale.

  Args:
    title: names the values.
    columns: where they stand.
    series: the lines. What stands before the first column is left out.
    height: of the chart, without its labels.
    labels: a text below each column; () for none.
  """
  seen = lambda values: values[columns.first :]
  everything = [value for each in series for part in (each.values, each.lows, each.highs) for value in seen(part)]
  low, high = padded_range(everything)
  scale = Scale(low, high, height - 8.0, 8.0)
  marks = ticks(low, high)
  place = lambda values: [None if value is None else scale(value) for value in seen(values)]
  drawn = []
  for each in series:
    chunks = range(columns.first, len(each.values))
    xs, ys = [columns.center(chunk) for chunk in chunks], place(each.values)
    points = [
      (x, scale(value), value, chunk) for x, chunk, value in zip(xs, chunks, seen(each.values)) if value is not None
    ]
    band = band_path(xs, place(each.lows), place(each.highs)) if each.lows else ""
    drawn.append(DrawnSeries(each.label, each.style, line_path(xs, ys), band, points if each.points else ()))
  below = [(columns.center(column), label) for column, label in enumerate(labels)]
  lines = [Tick(scale(mark), tick_label(mark, marks)) for mark in marks]
  return LineChart(title, columns, height + (_LABEL_HEIGHT if below else 0.0), lines, drawn, below)
