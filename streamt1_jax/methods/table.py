"""The searches with names: a new one is a file and a line here."""

from collections.abc import Mapping

from streamt1_jax.config import ConfigError
from streamt1_jax.messages import shortened
from streamt1_jax.methods import plain, restarts, rewind, stream_t1, toolkit
from streamt1_jax.methods.spec import Method

_ALL = (
  stream_t1.STREAM_T1,
  plain.NONE,
  stream_t1.STREAM_T1_PAPER,
  plain.BEAM,
  plain.GREEDY,
  plain.BEST_OF_N,
  stream_t1.NO_PROPAGATION,
  stream_t1.NO_SINKING,
  stream_t1.EMA_ONLY,
  stream_t1.SHORT_ONLY,
  stream_t1.LONG_ONLY,
  toolkit.CUMULATIVE,
  toolkit.PER_BEAM,
  toolkit.PROBABILISTIC,
  toolkit.RANK_ENSEMBLE,
  toolkit.EVERY_J,
  toolkit.LOOK_AHEAD,
  toolkit.ROUNDS,
  toolkit.PARTICLES,
  toolkit.PARTICLES_SUM,
  restarts.ZERO_ORDER,
  rewind.BACKTRACKING,
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""By name."""


def find(name: str, methods: Mapping[str, Method] = METHODS) -> Method:
  """The method of this name. Raises ConfigError for one that is not there."""
  if name not in methods:
    raise ConfigError(f"there is no search {shortened(name)}; known: {', '.join(methods)}")
  return methods[name]
