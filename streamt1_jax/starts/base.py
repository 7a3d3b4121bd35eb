"""What the kinds of start have in common."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8

from streamt1_jax.codec.encoder import ChunkEncoder
from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.io import pictures
from streamt1_jax.steering import Start


@dataclasses.dataclass(frozen=True)
class Studio:
  """What a start is made with.

  Attributes:
    model: sizes.
    encoder: pixels to latents.
    say: is told, in a sentence each, what was done to the input.
  """

  model: ModelConfig
  encoder: ChunkEncoder
  say: Callable[[str], None]

  def fitted(self, frames: Shaped[np.ndarray, " ..."], what: str) -> UInt8[np.ndarray, "T height width 3"]:
    """Frames in the model's size. Raises ConfigError for what is no uint8 `[T, height, width, 3]`."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
      raise ConfigError(f"{what} must be uint8 RGB, [..., height, width, 3], got {frames.dtype} {list(frames.shape)}")
    for sentence in pictures.tell_fit(frames, *self.encoder.size):
      self.say(f"{what}: {sentence}")
    return pictures.fitted(frames, *self.encoder.size)


MakeStart = Callable[[Studio, Any], Start]
"""Makes a start of what the user gave. Raises ConfigError if that cannot be used."""


def name_of(given: Any) -> str:
  """What the user gave, in a message."""
  return os.fspath(given) if isinstance(given, (str, os.PathLike, epath.Path)) else "the given array"


def picture_of(given: Any) -> Shaped[np.ndarray, " ..."]:
  """A picture that is given as an array or as a file."""
  return given if isinstance(given, np.ndarray) else pictures.read_picture(given)
