"""Comparisons of ways to make videos, and of ways to decide: rows in a file, and what they say."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.data import verify
from streamt1_jax.state import ChunkTrace

METHODS = ("plain", "best_of_n", "search", "oracle_of_n")
DIFFERENCES = (("search", "plain"), ("search", "best_of_n"), ("best_of_n", "plain"))

_RESAMPLES = 10_000


def plain_seeds(seed: int, search: SearchConfig) -> list[int]:
  """Seeds of the N plain videos: those of the candidates of the search's first chunk."""
  return list(range(seed, seed + search.num_candidates))


def read_rows(path: epath.Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Rows of an earlier run with the same settings; a last line that was cut off does not count.

  Raises ConfigError if the file holds something else.
  """
  if not path.exists():
    return []
  rows = []
  try:
    lines = path.read_text().splitlines(keepends=True)
  except UnicodeDecodeError as error:
    raise ConfigError(f"--output={path} is not a comparison but something binary; give another file") from error
  for number, line in enumerate(lines, start=1):
    if not line.endswith("\n"):
      break
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ConfigError(f"--output={path}, line {number}: not JSON; give another file") from error
  # The first line is written by a rename, so that one without its end is another program's.
  if not rows or rows[0] != settings:
    raise ConfigError(f"--output={path} holds a comparison with other settings; give the same flags or another file")
  return rows[1:]


def write_rows(path: epath.Path, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
  """Writes all lines beside the file, then renames: a row is there whole or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  partial.write_text("".join(json.dumps(row) + "\n" for row in (settings, *rows)))
  partial.replace(path)


def interval(values: np.ndarray, captions: Sequence[str], seed: int = 0) -> dict[str, float]:
  """Mean of [prompts] values and its 95 % percentile bootstrap interval.

  What is drawn anew are the different captions, each with all of its prompts: those are not independent. Where all
  values are the same a bootstrap has no width; of n times the same verdict, 3 / n is the usual bound.
  """
  _, which = np.unique(np.asarray(captions), return_inverse=True)
  sums, counts = np.bincount(which, values), np.bincount(which)
  drawn = np.random.default_rng(seed).integers(0, len(sums), (_RESAMPLES, len(sums)))
  low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
  return {name: round(float(x), 3) for name, x in (("mean", values.mean()), ("low", low), ("high", high))}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
  """By method or difference, then by verdict: mean and interval."""
  captions = [row["caption"] for row in rows]
  values = {
    method: {name: np.array([row["verdicts"][method][name] for row in rows], float) for name in verify.VERDICTS}
    for method in METHODS
  }
  result = {method: {name: interval(found, captions) for name, found in of.items()} for method, of in values.items()}
  for first, second in DIFFERENCES:
    paired = {name: values[first][name] - values[second][name] for name in verify.VERDICTS}
    result[f"{first} - {second}"] = {name: interval(found, captions) for name, found in paired.items()}
  return result


def table(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """The summary in Markdown."""
  cell = lambda x: f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"
  lines = [f"| | {' | '.join(verify.VERDICTS)} |", "|---" * (len(verify.VERDICTS) + 1) + "|"]
  for name, of in result.items():
    lines.append(f"| {name} | {' | '.join(cell(of[verdict]) for verdict in verify.VERDICTS)} |")
  return "\n".join(lines)


class Decision(NamedTuple):
  """How one chunk was decided.

  Attributes:
    survivors: [K] int, best first.
    short: [N] float32 scores of the image reward.
  """

  survivors: np.ndarray
  short: np.ndarray

  @classmethod
  def of(cls, trace: ChunkTrace) -> "Decision":
    return cls(np.asarray(trace.survivor), np.asarray(trace.candidates.short).ravel())


def agreement(decided: list[list[Decision]], frames: list[int]) -> dict[int, dict[str, float]]:
  """Shares, by number of frames, of decisions equal to those of the first number."""
  report = {}
  for index, number in enumerate(frames):
    pairs = [(decisions[0], decisions[index]) for decisions in decided]
    share = lambda values: round(float(np.mean(values)), 3)
    report[number] = {
      "chunks": len(pairs),
      "same_best": share([a.survivors[0] == b.survivors[0] for a, b in pairs]),
      "same_survivors": share([set(a.survivors) == set(b.survivors) for a, b in pairs]),
      "same_order": share([same_order(a.short, b.short) for a, b in pairs]),
    }
  return report


def same_order(a: np.ndarray, b: np.ndarray) -> float:
  """Share of the pairs of entries that are in the same order in `a` and `b`."""
  first, second = np.triu_indices(len(a), 1)
  return float(np.mean((a[first] > a[second]) == (b[first] > b[second])))


def agreement_table(report: dict[int, dict[str, float]]) -> str:
  """The report in Markdown."""
  lines = ["| frames | chunks | same best | same survivors | same order |", "|---|---|---|---|---|"]
  for number, row in report.items():
    shares = " | ".join(f"{row[name]:.2f}" for name in ("same_best", "same_survivors", "same_order"))
    lines.append(f"| {number} | {row['chunks']} | {shares} |")
  return "\n".join(lines)
