"""Whether weights are finite, seen from their bits: no copy, and nothing to compile."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files


def is_finite(values: Shaped[np.ndarray, " ..."]) -> bool:
  """Whether no value is NaN or Inf; integers and booleans always are.

  The bits of a positive Inf and of every positive NaN, read as a signed integer, are larger than those of all finite
  numbers. Read as an unsigned integer this is so for the negative ones. Two maxima therefore tell, in one pass over
  memory each, where `np.isfinite` would make an array and take seven times as long in bfloat16.
  """
  if not jnp.issubdtype(values.dtype, jnp.floating) or not values.size:
    return True
  infinity = np.array(np.inf, values.dtype)
  signed, unsigned = f"i{values.dtype.itemsize}", f"u{values.dtype.itemsize}"
  positive = values.view(signed).max() < infinity.view(signed)
  return bool(positive and values.view(unsigned).max() < (-infinity).view(unsigned))


def refuse(names: Sequence[str], source: str) -> None:
  """Raises ConfigError unless `names`, the weights of `source` that are not finite, is empty."""
  if names:
    raise ConfigError(f"NaN or Inf in {source}: {part_files.list_some(names)}")
