"""What VBench's result files say: the scores of its 16 dimensions, and the three sums of its leaderboard.

A result file is `{dimension: [score, [{"video_path": ..., "video_results": ...}, ...]]}`. Every dimension is stretched
from its own range to 0..1; Quality is a weighted mean of seven, Semantic the mean of nine, and
Total = (4 Quality + Semantic) / 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.compare import statistics
from streamt1_jax.io import config_json, markdown


class Dimension(NamedTuple):
  """Range of the scores of a dimension, which part of the total it belongs to, and its weight there."""

  low: float
  high: float
  part: str
  weight: float = 1.0


DIMENSIONS: Mapping[str, Dimension] = {
  "subject_consistency": Dimension(0.1462, 1.0, "quality"),
  "background_consistency": Dimension(0.2615, 1.0, "quality"),
  "temporal_flickering": Dimension(0.6293, 1.0, "quality"),
  "motion_smoothness": Dimension(0.706, 0.9975, "quality"),
  "dynamic_degree": Dimension(0.0, 1.0, "quality", 0.5),
  "aesthetic_quality": Dimension(0.0, 1.0, "quality"),
  "imaging_quality": Dimension(0.0, 1.0, "quality"),
  "object_class": Dimension(0.0, 1.0, "semantic"),
  "multiple_objects": Dimension(0.0, 1.0, "semantic"),
  "human_action": Dimension(0.0, 1.0, "semantic"),
  "color": Dimension(0.0, 1.0, "semantic"),
  "spatial_relationship": Dimension(0.0, 1.0, "semantic"),
  "scene": Dimension(0.0, 0.8222, "semantic"),
  "appearance_style": Dimension(0.0009, 0.2855, "semantic"),
  "temporal_style": Dimension(0.0, 0.364, "semantic"),
  "overall_consistency": Dimension(0.0, 0.364, "semantic"),
}
"""Constants of VBench's `scripts/constant.py`."""
_PART_WEIGHTS = {"quality": 4, "semantic": 1}
_SUMS = (*_PART_WEIGHTS, "total")
_NUMBERED = re.compile(r"(?P<name>.*)-(?P<sample>[0-9]+)", re.DOTALL)


class Row(NamedTuple):
  """What a dimension says of one video; `name` is the prompt, or its line in the layout "custom"."""

  dimension: str
  name: str
  sample: int
  value: float


class Results(NamedTuple):
  """Scores as the tool gives them, by dimension, and the rows behind them."""

  scores: Mapping[str, float]
  rows: Sequence[Row]


def totals(scores: Mapping[str, float]) -> dict[str, float]:
  """Quality, semantic and total score, in 0..1; those that lack a dimension are left out, where VBench counts 0.

  Args:
    scores: raw scores by dimension, in 0..1.
  """
  found = {}
  for part in _PART_WEIGHTS:
    of_part = {name: dimension for name, dimension in DIMENSIONS.items() if dimension.part == part}
    if of_part.keys() <= scores.keys():
      stretched = [(scores[name] - d.low) / (d.high - d.low) * d.weight for name, d in of_part.items()]
      found[part] = sum(stretched) / sum(d.weight for d in of_part.values())
  if found.keys() == _PART_WEIGHTS.keys():
    found["total"] = sum(weight * found[part] for part, weight in _PART_WEIGHTS.items()) / sum(_PART_WEIGHTS.values())
  return found


def read(paths: Sequence[epath.Path]) -> Results:
  """The dimensions of several result files together; VBench writes one file a call.

  Raises ConfigError if a file is no result file of VBench, or two files have the same dimension.
  """
  scores: dict[str, float] = {}
  rows: list[Row] = []
  for path in paths:
    document = config_json.read_json(path, str(path))
    if not isinstance(document, dict) or not document:
      raise ConfigError(f"{path} must hold an object of dimensions, as *_eval_results.json of VBench does")
    for name, entry in document.items():
      where = f"{path}: {name:.60}"
      if name not in DIMENSIONS:
        raise ConfigError(f"{where} is no dimension of VBench; there are: {', '.join(DIMENSIONS)}")
      if name in scores:
        raise ConfigError(f"{where} stands in another of the files as well")
      if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list) and _is_number(entry[0])):
        raise ConfigError(f"{where} must be a list of a number and a list of videos")
      scores[name] = float(entry[0])
      rows += [_row(name, video, f"{where}, video {index}") for index, video in enumerate(entry[1])]
  return Results(scores, rows)


def _row(dimension: str, video: Any, where: str) -> Row:
  path, value = (video.get("video_path"), video.get("video_results")) if isinstance(video, dict) else (None, None)
  if not isinstance(path, str) or not _is_number(value):
    raise ConfigError(f"{where} needs video_path, a text, and video_results, a number or a truth value")
  matched = _NUMBERED.fullmatch(epath.Path(path).stem)
  if matched is None:
    raise ConfigError(f"{where}: {path!r:.80} does not end in '-' and the number of a sample")
  return Row(dimension, matched["name"], int(matched["sample"]), float(value))


def _is_number(value: Any) -> TypeGuard[float]:
  return isinstance(value, (bool, int, float)) and math.isfinite(value)


def table(results: Results) -> str:
  """Score, mean over videos with its interval, and number of prompts and videos of every dimension; then the sums.

  The tool's own score is not always the mean over videos: imaging quality, say, is a hundredth of it.
  """
  body = []
  for name, score in results.scores.items():
    rows = [row for row in results.rows if row.dimension == name]
    cells = [name, f"{score:.4f}", *_mean_cells(rows, [row.value for row in rows])]
    body.append(cells)
  sums = totals(results.scores)
  body += [[f"**{name}**", f"{sums[name]:.4f}" if name in sums else "incomplete", "", ""] for name in _SUMS]
  return markdown.table(["dimension", "score", "mean of videos", "prompts x videos"], body)


def paired(first: Results, second: Results) -> str:
  """Differences, first minus second, of the videos that both have, by dimension; the interval draws prompts."""
  body = []
  for name in first.scores:
    ours = {(row.name, row.sample): row for row in first.rows if row.dimension == name}
    theirs = {(row.name, row.sample): row for row in second.rows if row.dimension == name}
    rows = [row for key, row in ours.items() if key in theirs]
    differences = [row.value - theirs[row.name, row.sample].value for row in rows]
    wins = sum(difference > 0 for difference in differences)
    losses = sum(difference < 0 for difference in differences)
    score = f"{wins}/{len(rows) - wins - losses}/{losses}"
    body.append([name, *_mean_cells(rows, differences), score])
  return markdown.table(["dimension", "difference", "prompts x videos", "wins/ties/losses"], body)


def _mean_cells(rows: Sequence[Row], values: Sequence[float]) -> tuple[str, str]:
  if not rows:
    return "", "none"
  names = [row.name for row in rows]
  found = statistics.interval(np.asarray(values), names)
  return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]", f"{len(set(names))} x {len(rows)}"
