"""How often a reward is right: the pairs that it is asked about, and what its scores of them say."""

import numpy as np

from streamt1_jax.rewards.videoalign import DIMENSIONS
from streamt1_jax.training import preferences
from streamt1_jax.training.preferences import CORRUPTIONS, PairConfig


def held_out_pairs(count: int, on_frames: bool) -> PairConfig:
  """Pairs of which only one clip has a defect; half of them go through the codec.

  Captions are complete, and so none that is right equals a caption of training: scenes are divided by a hash of all six
  attributes. (Shortened, 93 % of them and more would be captions of training, word for word.) Of single frames this
  says less: all visible combinations, of size, colour, shape and background, occur in training, with another
  direction or speed.
  """
  return PairConfig(count, on_frames, through_codec=count // 2, omit_probability=0.0, milder_probability=0.0)


def describe(scores: np.ndarray, late: np.ndarray, kind: str) -> dict[str, float | int]:
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
  families = {family: [n for n in report if CORRUPTIONS[n].family == family] for family in preferences.FAMILIES}
  result = {"agreement": mean(list(report), "agreement"), "caption_swapped": mean(list(report), "caption_swapped")}
  return result | {family: mean(names, "agreement") for family, names in families.items() if names}


def table(report: dict[str, dict]) -> str:
  """The report in Markdown."""
  columns = ["agreement", "whole_window", "last_chunk_only", *DIMENSIONS, "caption_swapped"]
  columns = [column for column in columns if any(column in row for row in report.values())]
  lines = [f"| corruption | pairs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
  for name, row in report.items():
    cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
    lines.append(f"| {name} | {row['pairs']} | {' | '.join(cells)} |")
  return "\n".join(lines)
