"""A comparison of ways to make videos: its rows in a file, and what they say."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.data import verify

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
  for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
    if not line.endswith("\n"):
      break
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ConfigError(f"--output={path}, line {number}: not JSON; give another file") from error
  if rows and rows[0] != settings:
    raise ConfigError(f"--output={path} holds a comparison with other settings; give the same flags or another file")
  return rows[1:]


def write_rows(path: epath.Path, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
  """Writes all lines beside the file, then renames: a row is there whole or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  partial.write_text("".join(json.dumps(row) + "\n" for row in (settings, *rows)))
  partial.replace(path)


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
  """Mean of [prompts] values and the 95 % percentile bootstrap interval over prompts."""
  resampled = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
  low, high = np.percentile(values[resampled].mean(axis=1), [2.5, 97.5])
  return {name: round(float(x), 3) for name, x in (("mean", values.mean()), ("low", low), ("high", high))}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
  """By method or difference, then by verdict: mean and interval."""
  values = {
    method: {name: np.array([row["verdicts"][method][name] for row in rows], float) for name in verify.VERDICTS}
    for method in METHODS
  }
  result = {method: {name: interval(found) for name, found in of.items()} for method, of in values.items()}
  for first, second in DIFFERENCES:
    paired = {name: values[first][name] - values[second][name] for name in verify.VERDICTS}
    result[f"{first} - {second}"] = {name: interval(found) for name, found in paired.items()}
  return result


def table(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """The summary in Markdown."""
  cell = lambda x: f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"
  lines = [f"| | {' | '.join(verify.VERDICTS)} |", "|---" * (len(verify.VERDICTS) + 1) + "|"]
  for name, of in result.items():
    lines.append(f"| {name} | {' | '.join(cell(of[verdict]) for verdict in verify.VERDICTS)} |")
  return "\n".join(lines)
