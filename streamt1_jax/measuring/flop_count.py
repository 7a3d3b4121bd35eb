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
  name, parameters = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval
    outputs = kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
    return 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
  if name == "pallas_call":
    return float(parameters["cost_estimate"].flops)
  nested = [count(inner) for inner in _nested(parameters)]
  if name == "cond":
    return max(nested)
  return sum(nested) * (parameters["length"] if name == "scan" else 1)


def _nested(parameters: dict[str, Any]) -> Iterator[Any]:
  for value in parameters.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (Jaxpr, ClosedJaxpr)):
        yield item
