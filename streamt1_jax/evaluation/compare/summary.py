"""All numbers of a comparison, as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.compare import statistics
from streamt1_jax.evaluation.compare.contenders import Contender
from streamt1_jax.evaluation.compare.outcomes import AXES, Outcome, Results
from streamt1_jax.evaluation.compare.statistics import interval, simultaneous
from streamt1_jax.policies import alpha_of

_SAME = 1 + 1e-9  # Sums of equal parts may differ in their last bits.


def summarise(results: Results, contenders: Sequence[Contender], metrics: Sequence[str]) -> dict[str, Any]:
  """The numbers of all methods.

  Args:
    results: rows and plan.
    contenders: the methods, in the order of the table.
    metrics: of the held-out judge, the primary one first.

  Returns:
    `methods` by label; `judged_plain`, the cost of a plain video that the reward judges; `pool`, by n: what best-of-n
    and a perfect judge give; `alpha`, the temperature of particles that its scores give, or None; `equal_cost`,
    differences of the primary metric at equal forwards, TFLOP and seconds.
  """
  plain = results.best_of(1, "none")
  outcomes = {contender.label: results.outcome(contender) for contender in contenders}
  methods = {
    contender.label: {"method": contender.method.name, "picks": contender.picks}
    | _method(results, outcomes[contender.label], metrics)
    | _times_plain(outcomes[contender.label], plain)
    for contender in contenders
  }
  rivals = [label for contender, label in zip(contenders, outcomes) if contender.picks != 1]
  for label, found in zip(rivals, _against_plain(results, plain, [outcomes[label] for label in rivals], metrics)):
    methods[label]["minus_plain"] = found
  return {
    "primary_metric": results.plan.primary,
    "methods": methods,
    "judged_plain": _rounded({name: value / 2 for name, value in results.best_of(2).cost.items()}),
    "pool": [_of_pool(results, n) for n in range(1, results.plan.pool + 1)],
    "alpha": _alpha(results),
    "equal_cost": _equal_cost(results, contenders, outcomes),
    "cases": len(results.plan.cases),
    "captions": len(set(results.captions)),
  }


def _method(results: Results, outcome: Outcome, metrics: Sequence[str]) -> dict[str, Any]:
  captions = results.captions
  found: dict[str, Any] = {"held_out": {name: _known_interval(outcome.values(name), captions) for name in metrics}}
  found["score"] = _known_interval(outcome.scores(), captions)
  found["cost"] = _rounded(outcome.cost)
  found["windows"] = [_known_interval(column, captions) for column in outcome.windows().T]
  motion = {name: _known_interval(outcome.motion(name), captions) for name in ("dynamic", "speed")}
  found |= {name: value for name, value in motion.items() if value is not None}
  diversity = results.diversity(outcome)
  return found | ({} if diversity is None else {"diversity": round(diversity, 3)})


def _times_plain(outcome: Outcome, plain: Outcome) -> dict[str, float]:
  unit = plain.cost["tflop"]
  return {"times_plain": round(outcome.cost["tflop"] / unit, 3)} if unit > 0 else {}


def _against_plain(
  results: Results, plain: Outcome, outcomes: Sequence[Outcome], metrics: Sequence[str]
) -> list[dict[str, Any]]:
  """Differences from plain streaming, and on the primary metric intervals that hold together, and wins."""
  if not outcomes:
    return []
  primary, captions = results.plan.primary, results.captions
  differences = np.stack([outcome.values(primary) - plain.values(primary) for outcome in outcomes], axis=1)
  # A case without a verdict of one method says nothing of several methods together.
  known = np.isfinite(differences).all(axis=1)
  hold = simultaneous(differences[known], np.asarray(captions)[known]) if known.any() else [None] * len(outcomes)
  found = []
  for outcome, together in zip(outcomes, hold, strict=True):
    each = {name: _known_interval(outcome.values(name) - plain.values(name), captions) for name in metrics}
    found.append({"simultaneous": together, "held_out": each, **_decided(outcome, plain, primary)._asdict()})
  return found


def _decided(first: Outcome, second: Outcome, metric: str) -> statistics.Decided:
  of = lambda pick: (np.array([_number(row["held_out"].get(metric)) for row in pick.rows]), pick.weights)
  cases = [statistics.decided(of(a), of(b)) for a, b in zip(first.picks, second.picks, strict=True)]
  return statistics.Decided(*(round(sum(part), 3) for part in zip(*cases, strict=True)))


def _of_pool(results: Results, n: int) -> dict[str, Any]:
  """Best-of-n of the pool: chosen by the reward, at random and by a perfect judge."""
  primary, captions = results.plan.primary, results.captions
  random, chosen, oracle = (
    pick.values(primary) for pick in (results.best_of(1), results.best_of(n), results.oracle_of(n))
  )
  return {
    "n": n,
    "score": _known_interval(results.best_of(n).scores(), captions),
    "chosen": _known_interval(chosen, captions),
    "oracle": _known_interval(oracle, captions),
    "regret": _known_interval(oracle - chosen, captions),
    # 0 is a perfect choice, 1 a random one, and more is harmful.
    "normalised_regret": _known_ratio(oracle - chosen, oracle - random, captions),
  }


def _alpha(results: Results) -> float | None:
  """`policies.alpha_of` of the prompts all of whose plain videos have a score; None where they give no scale."""
  scores: dict[int, list[float]] = {}
  for case, pool in zip(results.plan.cases, results.pools(), strict=True):
    scores.setdefault(case.prompt, []).extend(_number(row["score"]) for row in pool)
  known = [each for each in scores.values() if np.isfinite(each).all()]
  try:
    return float(f"{alpha_of(np.array(known)):.4g}") if known else None
  except ConfigError:
    return None


def _equal_cost(
  results: Results, contenders: Sequence[Contender], outcomes: dict[str, Outcome]
) -> list[dict[str, Any]]:
  """Each method with videos of its own against best-of-n, and the other methods, at no more than its cost."""
  rows, unit = [], results.best_of(2)
  for contender in (each for each in contenders if each.picks is None):
    reference = outcomes[contender.label]
    for axis in (name for name in AXES if unit.cost[name] > 0):
      n = reference.cost[axis] / (unit.cost[axis] / 2)
      used = float(np.clip(n, 1, results.plan.pool))
      best = results.best_of(used)
      told = {"n": round(n, 2), "beyond_pool": bool(n > results.plan.pool)}
      rows.append(_difference(results, reference, axis, best, "best_of_n") | told)
      for rival in _affordable(contender, contenders, outcomes, axis):
        rows.append(_difference(results, reference, axis, rival, rival.label))
  return rows


def _affordable(
  contender: Contender, contenders: Sequence[Contender], outcomes: dict[str, Outcome], axis: str
) -> list[Outcome]:
  """For every other method with videos of its own, the dearest size that costs no more than the contender."""
  limit, found = outcomes[contender.label].cost[axis] * _SAME, {}
  for rival in contenders:
    outcome = outcomes[rival.label]
    if rival.picks is not None or rival.method.name == contender.method.name or outcome.cost[axis] > limit:
      continue
    best = found.get(rival.method.name)
    if best is None or outcome.cost[axis] > best.cost[axis]:
      found[rival.method.name] = outcome
  return list(found.values())


def _difference(results: Results, reference: Outcome, axis: str, rival: Outcome, against: str) -> dict[str, Any]:
  primary = results.plan.primary
  difference = reference.values(primary) - rival.values(primary)
  return {
    "method": reference.label,
    "axis": axis,
    "cost": float(f"{reference.cost[axis]:.6g}"),
    "against": against,
    "difference": _known_interval(difference, results.captions),
    **_decided(reference, rival, primary)._asdict(),
  }


def _rounded(cost: dict[str, float]) -> dict[str, float]:
  return {name: float(f"{value:.6g}") for name, value in cost.items()}


def _known_interval(values: np.ndarray, captions: Sequence[str]) -> dict[str, float] | None:
  """The interval over the cases that have a value; None if no case has one."""
  known = np.isfinite(values)
  return interval(values[known], np.asarray(captions)[known]) if known.any() else None


def _known_ratio(numerator: np.ndarray, denominator: np.ndarray, captions: Sequence[str]) -> dict[str, float] | None:
  known = np.isfinite(numerator) & np.isfinite(denominator)
  if not known.any():
    return None
  return statistics.ratio_interval(numerator[known], denominator[known], np.asarray(captions)[known])


def _number(value: Any) -> float:
  return float("nan") if value is None else float(value)
