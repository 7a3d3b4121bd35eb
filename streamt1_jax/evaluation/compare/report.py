"""The tables of a comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamt1_jax.evaluation.compare.outcomes import AXES
from streamt1_jax.io import markdown

_READ = """\
In brackets are 95 % bootstrap intervals over captions, each with all of its seeds. Those of "minus none" hold for all
methods together. Where all values are the same an interval has no width; the usual bound after n equal verdicts is 3/n.
A case without a verdict is left out. Wins, ties and losses are expected numbers of cases: a method that picks among
plain videos gives each with its probability. Costs are means of a video, with the rewards; seconds are medians without
compilation."""


def markdown_of(plan: Mapping[str, Any], summary: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
  """The whole page.

  Args:
    plan: of the folder.
    summary: of `summary.summarise`.
    notes: sentences about what could not be measured.
  """
  primary, methods = summary["primary_metric"], summary["methods"]
  later = [label for label, told in plan["methods"].items() if told["videos_before"] and label in methods]
  told = ", ".join(f"{name} {value}" for name, value in plan["fixed"].items() if name in _TOLD and value is not None)
  parts = [
    "# Comparison",
    f"Primary metric: `{primary}`. Cases: {summary['cases']}; different captions: {summary['captions']}; {told}.",
    "## Methods",
    _methods(primary, methods),
    _READ,
    *([f"Added after the first videos: {', '.join(later)}."] if later else []),
    *notes,
    "## At equal cost",
    f"Differences of `{primary}`. best_of_n takes as many plain videos as the cost allows, between whole numbers too; "
    "another method its dearest size that costs no more.",
    _equal_cost(summary["equal_cost"]) if summary["equal_cost"] else "No method makes videos of its own.",
    "## Best of n from one pool",
    "What the reward picks, what a perfect judge would, and what is lost: 0 of the normalised regret is a perfect "
    "choice, 1 a random one, more is harmful. Where the score rises and the chosen videos get worse, the reward is "
    "over-optimised.",
    _pool(summary["pool"]),
    "## All metrics",
    _metrics(methods),
    *_drift(methods),
  ]
  return "\n\n".join(parts) + "\n"


_TOLD = ("split", "seconds", "objects", "timelines", "num_prompts", "num_seeds", "pool", "seed", "device")


def _cell(found: Mapping[str, float] | None, digits: int = 3) -> str:
  if found is None:
    return ""
  return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _methods(primary: str, methods: Mapping[str, Any]) -> str:
  optional = [name for name in ("dynamic", "speed", "diversity") if any(name in of for of in methods.values())]
  columns = [
    "method",
    primary,
    "minus none",
    "wins / ties / losses",
    "forwards",
    "TFLOP",
    "x none",
    "seconds",
    "depth",
    *optional,
  ]
  rows = []
  for label, of in methods.items():
    versus = of.get("minus_plain")
    cells = [_cell(versus["simultaneous"]), _decided(versus)] if versus else ["", ""]
    forwards, tflop, seconds, depth = (f"{of['cost'][name]:.4g}" for name in (*AXES, "depth"))
    cost = [forwards, tflop, _optional(of.get("times_plain")), seconds, depth]
    rows.append([label, _cell(of["held_out"][primary]), *cells, *cost, *(_optional(of.get(name)) for name in optional)])
  return markdown.table(columns, rows)


def _decided(found: Mapping[str, Any]) -> str:
  return " / ".join(f"{found[name]:.4g}" for name in ("wins", "ties", "losses"))


def _optional(found: Any) -> str:
  return "" if found is None else f"{found['mean']:.3g}" if isinstance(found, Mapping) else f"{found:.3g}"


def _equal_cost(rows: Sequence[Mapping[str, Any]]) -> str:
  against = lambda row: (
    f"best of {row['n']:.4g}{', beyond the pool' if row['beyond_pool'] else ''}" if "n" in row else row["against"]
  )
  body = ([row["method"], row["axis"], against(row), _cell(row["difference"]), _decided(row)] for row in rows)
  return markdown.table(["method", "equal", "against", "difference", "wins / ties / losses"], body)


def _pool(rows: Sequence[Mapping[str, Any]]) -> str:
  names = ("score", "chosen", "oracle", "regret", "normalised_regret")
  body = ([str(row["n"]), *(_cell(row[name]) for name in names)] for row in rows)
  return markdown.table(["n", *(name.replace("_", " ") for name in names)], body)


def _metrics(methods: Mapping[str, Any]) -> str:
  names = [
    name for name in next(iter(methods.values()))["held_out"] if any(of["held_out"][name] for of in methods.values())
  ]
  body = ([label, *(_cell(of["held_out"][name]) for name in names)] for label, of in methods.items())
  return markdown.table(["method", *names], body)


def _drift(methods: Mapping[str, Any]) -> list[str]:
  count = max(len(of["windows"]) for of in methods.values())
  if not count:
    return []
  body = ([label, *map(_cell, of["windows"])] for label, of in methods.items())
  table = markdown.table(["method", *(f"part {index + 1}" for index in range(count))], body)
  return ["## Along the video", "Share of videos that show their caption, part by part.", table]
