"""FLOP of a traced function: products and convolutions, 2 per multiply-add; nothing else counts.

Counted before the compiler divides the work: the whole of it, on however many devices. Loops count as often as they
run, and of branches the longest. A loop whose end is data counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count(jaxpr: Any) -> float:
  """FLOP of a jaxpr, such as `jax.make_jaxpr(f)(*arguments)`."""
  return sum(_equation(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(equation: Any) -> float:
  return _COUNTS.get(equation.primitive.name, _inner)(equation)


def _product(equation: Any) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
  kernel = equation.invars[1].aval
  outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
  return 2.0 * equation.outvars[0].aval.size * kernel.size / outputs


def _kernel(equation: Any) -> float:
  return float(equation.params["cost_estimate"].flops)


def _longest_branch(equation: Any) -> float:
  return max(map(count, _nested(equation.params)))


def _loop(equation: Any) -> float:
  return _inner(equation) * equation.params["length"]


def _inner(equation: Any) -> float:
  return sum(map(count, _nested(equation.params)))


_COUNTS = {
  "dot_general": _product,
  "conv_general_dilated": _convolution,
  "pallas_call": _kernel,
  "cond": _longest_branch,
  "scan": _loop,
}
"""By primitive; any other one counts what is in it."""


def _nested(parameters: dict[str, Any]) -> Iterator[Any]:
  for value in parameters.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (Jaxpr, ClosedJaxpr)):
        yield item
