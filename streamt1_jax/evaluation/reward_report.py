"""How often a reward is right: what its scores of pairs say."""

import numpy as np
from jaxtyping import Bool, Float

from streamt1_jax.io import markdown
from streamt1_jax.rewards.videoalign import DIMENSIONS
from streamt1_jax.training.corruptions import CORRUPTIONS, FAMILIES


def describe(scores: Float[np.ndarray, "B 2 2 R"], late: Bool[np.ndarray, " B"], kind: str) -> dict[str, float | int]:
  """Shares of pairs in the right order."""
  (better, worse), (better_other, _) = (scores[:, caption].swapaxes(0, 1) for caption in range(2))
  right = better.sum(axis=1) > worse.sum(axis=1)
  shares = {"pairs": len(right), "agreement": right.mean()}
  if late.any():
    shares |= {"whole_window": right[~late].mean(), "last_chunk_only": right[late].mean()}
  if scores.shape[-1] == len(DIMENSIONS):
    higher = (better > worse).mean(axis=0)
    shares |= {name: higher[DIMENSIONS.index(name)] for name in CORRUPTIONS[kind].falls}
  shares |= {"caption_swapped": (better[:, -1] > better_other[:, -1]).mean()}
  return {name: value if name == "pairs" else round(float(value), 3) for name, value in shares.items()}


def summary(report: dict[str, dict]) -> dict[str, float]:
  """Means over the corruptions: of all, and of each family."""
  mean = lambda names, column: round(float(np.mean([report[name][column] for name in names])), 3)
  families = {family: [n for n in report if CORRUPTIONS[n].family == family] for family in FAMILIES}
  result = {"agreement": mean(list(report), "agreement"), "caption_swapped": mean(list(report), "caption_swapped")}
  return result | {family: mean(names, "agreement") for family, names in families.items() if names}


def table(report: dict[str, dict]) -> str:
  """The report in Markdown."""
  columns = ["agreement", "whole_window", "last_chunk_only", *DIMENSIONS, "caption_swapped"]
  columns = [column for column in columns if any(column in row for row in report.values())]
  cell = lambda row, column: f"{row[column]:.2f}" if column in row else ""
  rows = ([name, str(row["pairs"]), *(cell(row, column) for column in columns)] for name, row in report.items())
  return markdown.table(["corruption", "pairs", *columns], rows)
