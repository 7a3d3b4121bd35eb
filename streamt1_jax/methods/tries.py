"""What a method that tries several continuations from the host says of each."""

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from streamt1_jax.config.base import require
from streamt1_jax.state import SearchState

Config = TypeVar("Config")


class Try(NamedTuple):
  """Chunks that were made one after the other and then judged.

  Attributes:
    begin: the first of them, counted from the beginning of the video.
    chunks: how many.
    seed: what was new in them was drawn from it.
    score: what they were judged by; higher is better.
    kept: whether they are in the video.
    judged_frames: frames that the video reward saw of them; 0 if it was not asked.
  """

  begin: int
  chunks: int
  seed: int
  score: float
  kept: bool
  judged_frames: int = 0


Tell = Callable[[Try], None]
"""Receives every try, in the order they were made, once it is known which are kept."""


def silent(tried: Try) -> None:
  """Tells nobody."""
  del tried


def describe_tries(tries: Sequence[Try]) -> list[dict[str, Any]]:
  """What `trace.json` says of chunks that were tried; those that were not kept have no nodes."""
  return [each._asdict() | {"score": each.score if math.isfinite(each.score) else None} for each in tries]


@jax.jit
def copied(state: SearchState) -> SearchState:
  """The state in buffers of its own: the next chunk takes those of the state that it is given."""
  return jax.tree.map(jnp.copy, state)


def of_numbers(config_type: type[Config], numbers: Mapping[str, float]) -> Config:
  """The dataclass of numbers as flags give them: 2.0 is an integer where one is needed.

  Raises ConfigError for an unknown name, a number that is not whole, and what the dataclass refuses.
  """
  hints = typing.get_type_hints(config_type)
  values = {}
  for name, value in numbers.items():
    require(name in hints, f"there is no number {name}; known: {', '.join(hints)}")
    require(hints[name] is float or float(value).is_integer(), f"{name} must be a whole number, got {value}")
    values[name] = hints[name](value)
  return config_type(**values)
