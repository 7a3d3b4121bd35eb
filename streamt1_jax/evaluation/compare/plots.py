"""The plots of a comparison, as SVG: by matplotlib, which comes with the extra train."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from streamt1_jax.io import atomic

PARTS = ("generator", "codec", "image_reward", "video_reward")


def available() -> bool:
  """Whether matplotlib is installed."""
  return importlib.util.find_spec("matplotlib") is not None


def write(folder: epath.Path, summary: Mapping[str, Any]) -> dict[str, epath.Path]:
  """Draws all plots that the numbers allow; returns their files by title."""
  drawn = {}
  for name, plot in _PLOTS.items():
    figure = _figure(plot.draw, summary)
    if figure is not None:
      drawn[plot.title] = folder / f"{name}.svg"
      atomic.replace_bytes(drawn[plot.title], figure)
  return drawn


def _figure(draw: Callable[[Any, Mapping[str, Any]], bool], summary: Mapping[str, Any]) -> bytes | None:
  import matplotlib
  from matplotlib.figure import Figure

  # Equal numbers give equal files.
  with matplotlib.rc_context({"svg.hashsalt": "streamt1", "svg.fonttype": "none", "axes.spines.top": False}):
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines["right"].set_visible(False)
    if not draw(axes, summary):
      return None
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
  return written.getvalue()


def _band(axes: Any, x: Sequence[float], found: Sequence[Mapping[str, float]], label: str, style: str = "-") -> None:
  (line,) = axes.plot(x, [each["mean"] for each in found], style, label=label, marker="o", markersize=3)
  low, high = ([each[name] for each in found] for name in ("low", "high"))
  axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _all_known(rows: Sequence[Mapping[str, Any]], *names: str) -> bool:
  """Whether there are such numbers in every row."""
  return all(row[name] is not None for row in rows for name in names)


def _families(methods: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
  """The methods that make videos of their own, by name, each with its sizes from cheap to dear."""
  found: dict[str, list[Mapping[str, Any]]] = {}
  for of in methods.values():
    if of["picks"] is None:
      found.setdefault(of["method"], []).append(of)
  return {name: sorted(sizes, key=lambda of: of["cost"]["tflop"]) for name, sizes in found.items()}


def _score_against_tflop(axes: Any, summary: Mapping[str, Any]) -> bool:
  """Held-out score against TFLOP of a video: a curve for each method, and the pool's from one to all."""
  primary, methods, pool = summary["primary_metric"], summary["methods"], summary["pool"]
  unit = summary["judged_plain"]["tflop"]
  if not _all_known(pool, "chosen", "oracle"):
    return False
  _band(axes, [unit * row["n"] for row in pool], [row["chosen"] for row in pool], "best of n")
  axes.plot(
    [unit * row["n"] for row in pool],
    [row["oracle"]["mean"] for row in pool],
    ":",
    color="0.5",
    label="perfect judge of n",
  )
  for name, sizes in _families(methods).items():
    sizes = [of for of in sizes if of["held_out"][primary] is not None]
    found = [of["held_out"][primary] for of in sizes]
    means = [each["mean"] for each in found]
    # A method of one size is a point, which has no band.
    errors = [[abs(each["mean"] - each[end]) for each in found] for end in ("low", "high")]
    options = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1}
    axes.errorbar([of["cost"]["tflop"] for of in sizes], means, errors, label=name, **options)
  axes.set(xscale="log", xlabel="TFLOP of a video, rewards included", ylabel=primary)
  axes.legend(frameon=False, fontsize=8)
  return unit > 0


def _drift(axes: Any, summary: Mapping[str, Any]) -> bool:
  """Verdict of every part of the video."""
  methods = {label: of for label, of in summary["methods"].items() if of["windows"] and None not in of["windows"]}
  if not methods:
    return False
  for label, of in methods.items():
    _band(axes, range(1, len(of["windows"]) + 1), of["windows"], label)
  axes.set(xlabel="part of the video", ylabel="share that shows its caption", ylim=(-0.02, 1.02))
  axes.legend(frameon=False, fontsize=8)
  return True


def _regret(axes: Any, summary: Mapping[str, Any]) -> bool:
  """What the reward's choice loses against a perfect one."""
  pool = summary["pool"]
  if not _all_known(pool, "regret"):
    return False
  _band(axes, [row["n"] for row in pool], [row["regret"] for row in pool], "perfect judge less the reward's choice")
  axes.set(xlabel="plain videos to choose from", ylabel=f"regret ({summary['primary_metric']})")
  axes.legend(frameon=False, fontsize=8)
  return True


def _over_optimisation(axes: Any, summary: Mapping[str, Any]) -> bool:
  """The score that selects, and the held-out score, against n."""
  pool = summary["pool"]
  n = [row["n"] for row in pool]
  if not _all_known(pool, "score", "chosen"):
    return False
  _band(axes, n, [row["chosen"] for row in pool], summary["primary_metric"])
  axes.set(xlabel="plain videos to choose from", ylabel=summary["primary_metric"])
  other = axes.twinx()
  other.plot(n, [row["score"]["mean"] for row in pool], "--", color="0.4")
  other.set_ylabel("score that selects (dashed)")
  return True


def _cost_split(axes: Any, summary: Mapping[str, Any]) -> bool:
  """TFLOP by part, a bar for each method."""
  methods = summary["methods"]
  bottom = [0.0] * len(methods)
  for part in PARTS:
    heights = [of["cost"][f"tflop_{part}"] for of in methods.values()]
    axes.barh(list(methods), heights, left=bottom, label=part.replace("_", " "))
    bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
  axes.invert_yaxis()
  axes.set(xlabel="TFLOP of a video")
  axes.legend(frameon=False, fontsize=8)
  return max(bottom) > 0


class _Plot(NamedTuple):
  """Its title, and what draws it; false if there is nothing to draw."""

  title: str
  draw: Callable[[Any, Mapping[str, Any]], bool]


_PLOTS = {
  "score_against_tflop": _Plot("Held-out score against TFLOP of a video", _score_against_tflop),
  "drift": _Plot("Along the video", _drift),
  "regret": _Plot("What the reward's choice loses", _regret),
  "over_optimisation": _Plot("The score that selects, and the held-out score", _over_optimisation),
  "cost_split": _Plot("What the TFLOP are spent on", _cost_split),
}
"""By the names of their files."""
