"""What each method gives in each case, from the rows of a comparison.

A method that picks among plain videos gives each of them with some probability: so one pool serves every N, and its
means have little noise. Another method gives the one video that it made.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from streamt1_jax.evaluation.compare import held_out
from streamt1_jax.evaluation.compare.contenders import Contender
from streamt1_jax.evaluation.compare.pool import PLAIN, Key, Plan, Row
from streamt1_jax.evaluation.compare.statistics import pick_probabilities

AXES = ("forwards", "tflop", "seconds")
"""What methods are made equal in."""
_FORWARDS = ("denoise", "look_ahead", "commit")


class Pick(NamedTuple):
  """The videos that a method may give in one case, and how probable each is."""

  rows: Sequence[Row]
  weights: Float[np.ndarray, " videos"]

  def mean(self, value: Callable[[Row], float | None]) -> float:
    """Expected value; over the videos that have one, and NaN without any."""
    found = [(weight, value(row)) for row, weight in zip(self.rows, self.weights, strict=True)]
    known = [(weight, float(x)) for weight, x in found if x is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * x for weight, x in known) / total if total > 0 else float("nan")


class Outcome(NamedTuple):
  """A method's picks, case by case, and its mean cost by axis and part."""

  label: str
  picks: list[Pick]
  cost: dict[str, float]

  def values(self, metric: str) -> Float[np.ndarray, " cases"]:
    """Expected values of a metric."""
    return np.array([pick.mean(lambda row: row["held_out"].get(metric)) for pick in self.picks])

  def scores(self) -> Float[np.ndarray, " cases"]:
    """Expected scores by the reward that selects."""
    return np.array([pick.mean(lambda row: row["score"]) for pick in self.picks])

  def windows(self) -> Float[np.ndarray, "cases windows"]:
    """Expected values of the parts of the video."""
    count = min(len(row["windows"]) for pick in self.picks for row in pick.rows)
    part = lambda pick, index: pick.mean(lambda row: row["windows"][index])
    return np.array([[part(pick, index) for index in range(count)] for pick in self.picks]).reshape(
      len(self.picks), count
    )

  def motion(self, name: str) -> Float[np.ndarray, " cases"]:
    """Expected values of what optical flow finds; NaN where it was not asked."""
    return np.array([pick.mean(lambda row: (row.get("motion") or {}).get(name)) for pick in self.picks])


class Results(NamedTuple):
  """The rows of a finished comparison, and its plan."""

  plan: Plan
  rows: Mapping[Key, Row]

  @property
  def captions(self) -> list[str]:
    """The caption of every case; cases of one caption are one cluster."""
    return [self.plan.scenes[case.prompt].text for case in self.plan.cases]

  def pools(self) -> list[list[Row]]:
    """The plain videos of every case."""
    places = range(self.plan.pool)
    return [[self.rows[Key(PLAIN, case.prompt, case.take, place)] for place in places] for case in self.plan.cases]

  def outcome(self, contender: Contender) -> Outcome:
    """What a contender gives."""
    if contender.picks is not None:
      return self.best_of(contender.picks, contender.label)
    own = [self.rows[Key(contender.label, case.prompt, case.take)] for case in self.plan.cases]
    # With one beam nobody chooses at the end, and the last verdict is for the record alone.
    cost = cost_of(own, chooses=contender.search.top_k > 1)
    return Outcome(contender.label, [Pick([row], np.ones(1)) for row in own], cost)

  def best_of(self, n: float, label: str = "", by: Callable[[Row], Any] | None = None) -> Outcome:
    """The best of `n` plain videos by the reward of whole videos, or by another score; 1 is a random one."""
    score = by or (lambda row: row["score"])
    pools = self.pools()
    picks = [Pick(pool, pick_probabilities(_scores(pool, score), n)) for pool in pools]
    one = cost_of([row for pool in pools for row in pool], chooses=n > 1)
    alike = ("depth",)
    return Outcome(label, picks, {name: x if name in alike else n * x for name, x in one.items()})

  def oracle_of(self, n: float) -> Outcome:
    """What a perfect judge would pick of `n` plain videos."""
    return self.best_of(n, by=lambda row: row["held_out"].get(self.plan.primary))

  def diversity(self, outcome: Outcome) -> float | None:
    """Mean distance of videos of one prompt from different seeds; None with one seed."""
    of_prompts = [(case.prompt, pick) for case, pick in zip(self.plan.cases, outcome.picks, strict=True)]
    distances = []
    for _, group in itertools.groupby(of_prompts, key=lambda each: each[0]):
      takes = [pick for _, pick in group]
      distances += [_distance(*pair) for pair in itertools.combinations(takes, 2)]
    return float(np.mean(distances)) if distances else None


def cost_of(rows: Sequence[Row], *, chooses: bool) -> dict[str, float]:
  """Mean cost of videos; with the last verdict if somebody chooses by it.

  Seconds are medians, of videos for which no program was built where there are some.
  """
  parts = ("made", "verdict") if chooses else ("made",)
  mean = lambda value: float(np.mean([value(row) for row in rows]))
  sum_of = lambda row, kind, names: sum(row[part][kind].get(name, 0) for part in parts for name in names)
  tflop = {
    name: mean(lambda row, names=names: sum_of(row, "tflop", names))
    for name, names in (
      ("generator", ("forwards",)),
      ("codec", ("decoding",)),
      ("image_reward", ("image_reward",)),
      ("video_reward", ("video_reward",)),
    )
  }
  warm = [row for row in rows if not row["compilations"]] or rows
  seconds = [row["seconds"] + (row["verdict_seconds"] if chooses else 0.0) for row in warm]
  return {
    "forwards": mean(lambda row: sum_of(row, "cost", _FORWARDS)),
    "tflop": sum(tflop.values()),
    "seconds": float(np.median(seconds)),
    "depth": mean(lambda row: row["depth"]),
    "decoded": mean(lambda row: sum_of(row, "cost", ("decoded", "previewed"))),
    "image_frames": mean(lambda row: sum_of(row, "cost", ("image_frames",))),
    "video_frames": mean(lambda row: sum_of(row, "cost", ("video_frames",))),
    **{f"tflop_{name}": value for name, value in tflop.items()},
  }


def _scores(pool: Sequence[Row], score: Callable[[Row], Any]) -> np.ndarray:
  return np.array([np.nan if (value := score(row)) is None else float(value) for row in pool])


def _distance(one: Pick, other: Pick) -> float:
  pairs = itertools.product(zip(one.rows, one.weights, strict=True), zip(other.rows, other.weights, strict=True))
  far = lambda a, b: _signature_distance(a["signature"], b["signature"])
  return float(sum(w * v * far(a, b) for (a, w), (b, v) in pairs if w and v))


_signature_distance = functools.lru_cache(maxsize=1 << 20)(held_out.distance)
