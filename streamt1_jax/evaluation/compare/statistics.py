"""The statistics of a comparison: best-of-n from one pool, intervals over captions, wins and regret.

Where captions come several times, or with several seeds, their values are not independent: a bootstrap draws captions,
each with all of its values.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

_RESAMPLES = 10_000

Captions = Sequence[Hashable] | Shaped[np.ndarray, " cases"]


class Decided(NamedTuple):
  """Expected numbers of cases that one method wins, ties and loses against another."""

  wins: float
  ties: float
  losses: float


def interval(values: Float[np.ndarray, " cases"], captions: Captions, seed: int = 0) -> dict[str, float]:
  """Mean of [cases] values and its 95 % percentile bootstrap interval.

  Where all values are the same it has no width; the usual bound after n equal verdicts is 3 / n.
  """
  sums, counts = _by_caption(values[:, None], captions)
  means = _resampled(sums, counts, seed)[:, 0]
  low, high = np.percentile(means, [2.5, 97.5])
  return {name: round(float(x), 4) for name, x in (("mean", values.mean()), ("low", low), ("high", high))}


def simultaneous(
  values: Float[np.ndarray, "cases methods"], captions: Captions, seed: int = 0
) -> list[dict[str, float]]:
  """Mean and interval of each column, such that all intervals together cover their means in 95 %.

  The bootstrap gives each column its standard error, and the largest |t| of all columns its quantile. A column whose
  values are all the same has an interval without width.
  """
  sums, counts = _by_caption(values, captions)
  means, drawn = values.mean(axis=0), _resampled(sums, counts, seed)
  error = drawn.std(axis=0)
  t = np.abs(drawn - means) / np.where(error > 0, error, np.inf)
  quantile = np.percentile(t.max(axis=1), 95)
  return [
    {"mean": round(float(m), 4), "low": round(float(m - quantile * e), 4), "high": round(float(m + quantile * e), 4)}
    for m, e in zip(means, error, strict=True)
  ]


def ratio_interval(
  numerator: Float[np.ndarray, " cases"], denominator: Float[np.ndarray, " cases"], captions: Captions, seed: int = 0
) -> dict[str, float] | None:
  """The ratio of two means and its interval; None where the denominator may be 0."""
  sums, counts = _by_caption(np.stack([numerator, denominator], axis=1), captions)
  drawn = _resampled(sums, counts, seed)
  if denominator.mean() <= 0 or (drawn[:, 1] <= 0).mean() > 0.025:
    return None
  ratios = drawn[:, 0] / np.where(drawn[:, 1] > 0, drawn[:, 1], np.nan)
  low, high = np.nanpercentile(ratios, [2.5, 97.5])
  mean = numerator.mean() / denominator.mean()
  return {name: round(float(x), 4) for name, x in (("mean", mean), ("low", low), ("high", high))}


def _by_caption(values: np.ndarray, captions: Captions) -> tuple[np.ndarray, np.ndarray]:
  """Sums [captions, columns] and counts [captions]."""
  _, which = np.unique(np.asarray(captions), return_inverse=True)
  sums = np.stack([np.bincount(which, column) for column in values.T], axis=1)
  return sums, np.bincount(which)


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
  """Means [resamples, columns] of captions that are drawn with replacement."""
  rng, size = np.random.default_rng(seed), len(counts)
  drawn = rng.integers(0, size, (_RESAMPLES, size))
  # How often each caption was drawn: a product then gives the sums, in little memory.
  flat = drawn + size * np.arange(_RESAMPLES)[:, None]
  often = np.bincount(flat.ravel(), minlength=_RESAMPLES * size).reshape(_RESAMPLES, size)
  return (often @ sums) / (often @ counts)[:, None]


def pick_probabilities(scores: Float[np.ndarray, " videos"], n: float) -> Float[np.ndarray, " videos"]:
  """Probability of every video of a pool to be the best of `n` that are drawn from it without replacement.

  The video with the j-th lowest of M scores is the best of n with probability C(j-1, n-1) / C(M, n); videos of equal
  scores share theirs. Scores that are not finite are the lowest, and equal. Between whole numbers it is interpolated.

  Raises ValueError unless 1 <= n <= M.
  """
  size = len(scores)
  if not 1 <= n <= size:
    raise ValueError(f"n must be in 1..{size}, got {n}")
  whole = math.floor(n)
  if whole < n:
    share = n - whole
    return (1 - share) * pick_probabilities(scores, whole) + share * pick_probabilities(scores, whole + 1)
  ranked = np.where(np.isfinite(scores), scores, -np.inf)
  by_rank = np.array([math.comb(rank, whole - 1) / math.comb(size, whole) for rank in range(size)])
  order = np.argsort(ranked, kind="stable")
  _, group = np.unique(ranked, return_inverse=True)
  shared = np.bincount(group[order], by_rank) / np.bincount(group)
  return shared[group]


def decided(
  first: tuple[Float[np.ndarray, " a"], Float[np.ndarray, " a"]],
  second: tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"]],
) -> Decided:
  """How probably the first of two independent picks is better, equal and worse; each is values and probabilities."""
  joint = first[1][:, None] * second[1][None]
  sign = np.sign(first[0][:, None] - second[0][None])
  return Decided(*(float(joint[sign == which].sum()) for which in (1, 0, -1)))
