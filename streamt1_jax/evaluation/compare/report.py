"""What a comparison says: its tables, and the same in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamt1_jax.evaluation.compare.outcomes import AXES
from streamt1_jax.io import markdown

_READ = """\
In brackets are 95 % bootstrap intervals over captions, each with all of its seeds. Those of "minus none" hold for all
methods together. Where all values are the same an interval has no width; the usual bound after n equal verdicts is 3/n.
A case without a verdict is left out. Wins, ties and losses are expected numbers of cases: a method that picks among
plain videos gives each with its probability. Costs are means of a video, with the rewards; seconds are medians without
compilation."""


class Section(NamedTuple):
  """A part of the page.

  Attributes:
    title: above it.
    before: sentences above its table.
    head: of the table; () for none.
    rows: of the table.
    after: sentences below it.
  """

  title: str
  before: Sequence[str] = ()
  head: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  after: Sequence[str] = ()


def sections(plan: Mapping[str, Any], summary: Mapping[str, Any], notes: Sequence[str] = ()) -> list[Section]:
  """The whole page, part by part.

  Args:
    plan: of the folder.
    summary: of `summary.summarise`.
    notes: sentences about what could not be measured.
  """
  primary, methods = summary["primary_metric"], summary["methods"]
  later = [label for label, told in plan["methods"].items() if told["videos_before"] and label in methods]
  told = ", ".join(f"{name} {value}" for name, value in plan["fixed"].items() if name in _TOLD and value is not None)
  added = [f"Added after the first videos: {', '.join(later)}."] if later else []
  equal = (
    Section("At equal cost", [_EQUAL.format(primary=primary)], *_equal_cost(summary["equal_cost"]))
    if summary["equal_cost"]
    else Section("At equal cost", [_EQUAL.format(primary=primary), "No method makes videos of its own."])
  )
  return [
    Section(
      "Comparison",
      [f"Primary metric: `{primary}`. Cases: {summary['cases']}; different captions: {summary['captions']}; {told}."],
    ),
    Section("Methods", [], *_methods(primary, methods), after=[_READ, *added, *notes]),
    equal,
    Section("Best of n from one pool", [_POOL], *_pool(summary["pool"]), after=_alpha(summary["alpha"])),
    Section("All metrics", [], *_metrics(methods)),
    *_drift(methods),
  ]


def markdown_of(plan: Mapping[str, Any], summary: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
  """`sections` in Markdown."""
  parts = []
  for number, section in enumerate(sections(plan, summary, notes)):
    table = [markdown.table(section.head, section.rows)] if section.head else []
    parts += [f"{'##' if number else '#'} {section.title}", *section.before, *table, *section.after]
  return "\n\n".join(parts) + "\n"


Table = tuple[Sequence[str], Sequence[Sequence[str]]]
_EQUAL = (
  "Differences of `{primary}`. best_of_n takes as many plain videos as the cost allows, between whole numbers too; "
  "another method its dearest size that costs no more."
)
_POOL = (
  "What the reward picks, what a perfect judge would, and what is lost: 0 of the normalised regret is a perfect "
  "choice, 1 a random one, more is harmful. Where the score rises and the chosen videos get worse, the reward is "
  "over-optimised."
)
_ALPHA = (
  "The temperature of the search `particles` by these scores: `--policy=alpha:{alpha:g}`. Take it from another split "
  "than the one that is compared."
)
_TOLD = ("split", "seconds", "objects", "timelines", "num_prompts", "num_seeds", "pool", "seed", "device", "dtype")


def _cell(found: Mapping[str, float] | None, digits: int = 3) -> str:
  if found is None:
    return ""
  return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _alpha(alpha: float | None) -> list[str]:
  return [] if alpha is None else [_ALPHA.format(alpha=alpha)]


def _methods(primary: str, methods: Mapping[str, Any]) -> Table:
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
  return columns, rows


def _decided(found: Mapping[str, Any]) -> str:
  return " / ".join(f"{found[name]:.4g}" for name in ("wins", "ties", "losses"))


def _optional(found: Any) -> str:
  return "" if found is None else f"{found['mean']:.3g}" if isinstance(found, Mapping) else f"{found:.3g}"


def _equal_cost(rows: Sequence[Mapping[str, Any]]) -> Table:
  against = lambda row: (
    f"best of {row['n']:.4g}{', beyond the pool' if row['beyond_pool'] else ''}" if "n" in row else row["against"]
  )
  body = [[row["method"], row["axis"], against(row), _cell(row["difference"]), _decided(row)] for row in rows]
  return ["method", "equal", "against", "difference", "wins / ties / losses"], body


def _pool(rows: Sequence[Mapping[str, Any]]) -> Table:
  names = ("score", "chosen", "oracle", "regret", "normalised_regret")
  body = [[str(row["n"]), *(_cell(row[name]) for name in names)] for row in rows]
  return ["n", *(name.replace("_", " ") for name in names)], body


def _metrics(methods: Mapping[str, Any]) -> Table:
  names = [
    name for name in next(iter(methods.values()))["held_out"] if any(of["held_out"][name] for of in methods.values())
  ]
  body = [[label, *(_cell(of["held_out"][name]) for name in names)] for label, of in methods.items()]
  return ["method", *names], body


def _drift(methods: Mapping[str, Any]) -> list[Section]:
  count = max(len(of["windows"]) for of in methods.values())
  if not count:
    return []
  head = ["method", *(f"part {index + 1}" for index in range(count))]
  body = [[label, *map(_cell, of["windows"])] for label, of in methods.items()]
  return [Section("Along the video", ["Share of videos that show their caption, part by part."], head, body)]
