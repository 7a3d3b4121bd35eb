"""Rows of scores: kept as they are made, so that an interrupted run goes on; at the end a CSV and a JSON file."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, manifest, part_files, rows
from streamt1_jax.messages import one_line

_NAME_WIDTH = 48
_REMEDY = "use --overwrite or another --output"


@dataclasses.dataclass(frozen=True)
class Row:
  """One video, scored or not.

  Attributes:
    video: its path as text.
    prompt: what it should show, if anything says it.
    bytes: size of the file; with `modified` it tells whether this is still the file that was scored.
    modified: when the file was last written, in seconds since 1970.
    num_frames: how many it has; as the following None if it cannot be read.
    fps: frames per second.
    height: rows of a frame.
    width: columns of a frame.
    scores: a score, or one per frame, by column; those of a reward that failed are missing.
    error: what went wrong, or None.
  """

  video: str
  prompt: str | None
  bytes: int
  modified: int
  num_frames: int | None = None
  fps: float | None = None
  height: int | None = None
  width: int | None = None
  scores: Mapping[str, float | list[float]] = dataclasses.field(default_factory=dict)
  error: str | None = None

  @property
  def source(self) -> tuple:
    """What it was made from; equal where nothing has changed."""
    return self.video, self.prompt, self.bytes, self.modified


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))


@dataclasses.dataclass(frozen=True)
class Output:
  """The files of one run.

  Attributes:
    path: what the user asked for, ending in .csv or .json; both are written.
  """

  path: epath.Path

  def __post_init__(self):
    if self.path.suffix not in (".csv", ".json"):
      raise ConfigError(f"--output={self.path} must end in .csv or .json; both files are written")

  @property
  def csv(self) -> epath.Path:
    return self.path.with_suffix(".csv")

  @property
  def json(self) -> epath.Path:
    return self.path.with_suffix(".json")

  @property
  def partial(self) -> epath.Path:
    return self.path.parent / f".{self.path.stem}.partial.jsonl"

  def earlier_rows(self, settings: Mapping[str, Any]) -> dict[str, Row]:
    """By video, the rows of an interrupted or a finished run with the same settings; none if there was no run.

    Raises ConfigError if the files are of other settings, or are not scores.
    """
    if self.partial.exists():
      return _by_video(rows.read(self.partial, settings, remedy=_REMEDY), self.partial)
    if self.json.exists():
      document = part_files.read_json_object(self.json.parent, self.json.name, "scores")
      rows.require_same(str(self.json), document.get("settings"), settings, _REMEDY)
      return _by_video(document.get("rows"), self.json)
    if self.csv.exists():
      raise ConfigError(f"{self.csv} exists and {self.json} does not; {_REMEDY}")
    return {}

  def start(self, settings: Mapping[str, Any], kept: Sequence[Row]) -> RowFile:
    """A file that holds the rows `kept` and takes more, each of them safe once it is written."""
    with _writing(self.partial):
      return RowFile(self.partial, rows.Writer(self.partial, settings, map(_to_json, kept)))

  def write(self, document: Mapping[str, Any], finished: Sequence[Row], columns: Sequence[str]) -> None:
    """Writes both files, whole or not at all, and forgets the partial one.

    Args:
      document: what the JSON file says besides the rows.
      finished: the rows in order.
      columns: names of all scores.
    """
    with _writing(self.json):
      manifest.write_json(self.json, {**document, "rows": list(map(_to_json, finished))})
    with _writing(self.csv):
      atomic.replace_bytes(self.csv, to_csv(finished, columns).encode())
    self.partial.unlink(missing_ok=True)


class RowFile:
  """Takes rows."""

  def __init__(self, path: epath.Path, writer: rows.Writer):
    self._path, self._writer = path, writer

  def append(self, row: Row) -> None:
    """Raises ConfigError if the file system refuses; the rows before it are safe."""
    with _writing(self._path):
      self._writer.append(_to_json(row))


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def _to_json(row: Row) -> dict[str, Any]:
  return {name: getattr(row, name) for name in _FIELDS}


def _by_video(values: Any, path: epath.Path) -> dict[str, Row]:
  """Rows as a file holds them. Raises ConfigError if they are no rows of scores."""
  if not isinstance(values, list) or not all(map(_is_row, values)):
    raise ConfigError(f"{path} is not a file of scores; {_REMEDY}")
  return {value["video"]: Row(**value) for value in values}


def _is_row(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and set(value) == set(_FIELDS)
    and isinstance(value["video"], str)
    and all(value[name] is None or isinstance(value[name], str) for name in ("prompt", "error"))
    and all(map(_is_number, (value["bytes"], value["modified"])))
    and all(value[name] is None or _is_number(value[name]) for name in ("num_frames", "fps", "height", "width"))
    and isinstance(value["scores"], dict)
    and all(all(map(_is_number, score if isinstance(score, list) else [score])) for score in value["scores"].values())
  )


def _is_number(value: Any) -> bool:
  # JSON knows integers of any size, and Python compares them exactly.
  return type(value) in (int, float) and abs(value) <= sys.float_info.max


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
  """A line per row: video, prompt, num_frames, fps, height, width, scores, error; scores of frames in one cell."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  plain = ("video", "prompt", "num_frames", "fps", "height", "width")
  writer.writerow([*plain, *columns, "error"])
  for row in rows:
    writer.writerow(
      [
        *(getattr(row, name) for name in plain),
        *(_cell(row.scores.get(column)) for column in columns),
        row.error,
      ]
    )
  return text.getvalue()


def _cell(score: float | list[float] | None) -> str:
  """Digits enough to give a float32 back."""
  values = [] if score is None else score if isinstance(score, list) else [score]
  return " ".join(f"{value:.9g}" for value in values)


def to_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
  """What a person reads: three decimals, no scores of single frames, and the means where there are several rows."""
  shown = [column for column in columns if not any(isinstance(row.scores.get(column), list) for row in rows)]
  header = ["video", "frames", "fps", *shown]
  body = [
    [
      _shorten(row.video),
      "" if row.num_frames is None else str(row.num_frames),
      "" if row.fps is None else f"{row.fps:.5g}",
      *(_decimal([row.scores[column]] if column in row.scores else []) for column in shown),
    ]
    for row in rows
  ]
  if len(rows) > 1:
    known = [[row.scores[column] for row in rows if column in row.scores] for column in shown]
    body.append(["mean", "", "", *map(_decimal, known)])
  widths = [max(map(len, cells)) for cells in zip(header, *body, strict=True)]
  lines = [
    "  ".join([cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))])
    for cells in (header, *body)
  ]
  errors = ["", *(one_line(row.error or "") for row in rows), ""]
  return "\n".join(f"{line}  {error}".rstrip() for line, error in zip(lines, errors))


def _shorten(name: str) -> str:
  name = one_line(name)
  return name if len(name) <= _NAME_WIDTH else f"...{name[3 - _NAME_WIDTH :]}"


def _decimal(scores: Sequence[Any]) -> str:
  """The mean."""
  return f"{sum(scores) / len(scores):.3f}" if scores else ""
