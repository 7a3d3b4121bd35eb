"""All metrics of one video as a JSON object, and of many as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.metrics import consistency, exposure, motion, period
from streamt1_jax.io import markdown

WINDOW_SECONDS = 5.0
_FEWEST_FRAMES = 3
COLUMNS = (
  "dynamic",
  "speed",
  "flicker",
  "warping_error",
  "interpolation_error",
  "consistency",
  "coherence_1s",
  "coherence_4s",
  "first_last",
  "drift_brightness",
  "drift_saturation",
)
"""Columns of the table. Motion comes first, since a frozen video has the best of all others."""


REPEATS = ("period_error", "phase_error")
"""Further columns, of worlds that repeat."""


def measure(
  frames: UInt8[np.ndarray, "T H W 3"], fps: float, *, torus: bool = False, repeats_after: int | None = None
) -> dict[str, Any]:
  """All metrics of a video.

  Args:
    frames: RGB, at least three of them, and three pixels on a side.
    fps: frames per second.
    torus: whether objects leave on one side and come in at the other.
    repeats_after: frames after which a perfect video of such a world is the same again; None for other worlds.

  Returns:
    JSON values: `dynamic` and `speed` of `motion.Pace`, and all other fields of `motion.Motion`; `consistency`,
    `coherence_LAGs` (seconds) and `first_last` by features; means of `exposure`; `drift_NAME`, the mean of the last
    15 % less that of the first; and `windows`, a list of means over five seconds each. For a world that repeats also
    `repeats`, a list of `period.Repeat` by number of periods, and `period_error` and `phase_error`, the first of them,
    None for a video that is too short.

  Raises ConfigError for a shorter or smaller video, or without the extra `eval`.
  """
  if len(frames) < _FEWEST_FRAMES or min(frames.shape[1:3]) < _FEWEST_FRAMES:
    raise ConfigError(f"a video needs {_FEWEST_FRAMES} frames and pixels on a side, got {list(frames.shape[:3])}")
  moved = motion.measure(frames, fps, torus=torus)
  found = consistency.features(frames)
  exposed = exposure.measure(frames)
  rest = moved._asdict()
  pace = rest.pop("pace")
  of_motion = {"dynamic": pace.dynamic, "speed": pace.speed} | rest
  curves = exposed | {"speed": pace.speeds, "first_frame_distance": 1 - (found * found[:1]).sum(axis=-1)}
  of_lags = {f"coherence_{lag:g}s": value for lag, value in consistency.coherence(found, fps).items()}
  result = of_motion | {"consistency": consistency.consistency(found)} | of_lags
  result |= {"first_last": consistency.first_last(found)} | {name: float(v.mean()) for name, v in exposed.items()}
  result |= {f"drift_{name}": consistency.drift(values) for name, values in curves.items()}
  seconds = len(frames) / fps
  windows = max(1, round(seconds / WINDOW_SECONDS))
  split = {name: np.array_split(values, min(windows, len(values))) for name, values in curves.items()}
  result["windows"] = [
    {name: float(parts[min(index, len(parts) - 1)].mean()) for name, parts in split.items()} for index in range(windows)
  ]
  if repeats_after is not None:
    repeats = [each._asdict() for each in period.measure(frames, repeats_after)]
    result |= {name: repeats[0][name] if repeats else None for name in REPEATS} | {"repeats": repeats}
  return {name: value if not isinstance(value, float) or np.isfinite(value) else None for name, value in result.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line a video and one of means, in Markdown. A row has `video` and, unless it has an `error`, `metrics`."""
  good = [row["metrics"] for row in rows if "metrics" in row]
  columns = (*COLUMNS, *(name for name in REPEATS if any(name in metrics for metrics in good)))
  body = [
    [row["video"], *(_cell(row["metrics"].get(name)) for name in columns)]
    if "metrics" in row
    else [row["video"], row["error"], *[""] * (len(columns) - 1)]
    for row in rows
  ]
  if len(good) > 1:
    body.append(["**mean**", *(_cell(_mean([metrics.get(name) for metrics in good])) for name in columns)])
  return markdown.table(["video", *columns], body)


def _mean(values: Sequence[float | None]) -> float | None:
  known = [float(value) for value in values if value is not None]
  return float(np.mean(known)) if known else None


def _cell(value: float | bool | None) -> str:
  return "" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:.4g}"
