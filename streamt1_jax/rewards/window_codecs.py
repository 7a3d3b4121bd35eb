"""What a window goes through before the video reward sees it. A new codec is a file and a line of the table."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards.base import FrameWindow
from streamt1_jax.rewards.h264 import H264
from streamt1_jax.rewards.scorers import VideoScorer


@runtime_checkable
class WindowCodec(Protocol):
  """Turns frames into what a reward sees of them. Pure and hashable.

  Attributes:
    name: in the table.
    on_host: whether it leaves the device, in a callback. Only a search that is driven from the host may use it then.
  """

  @property
  def name(self) -> str: ...

  @property
  def on_host(self) -> bool: ...

  def window(self, window: FrameWindow) -> FrameWindow:
    """One candidate's window, inside a chunk step. Raises ConfigError for frames that it cannot take."""
    ...

  def frames(self, frames: Shaped[np.ndarray, "T ..."]) -> Shaped[np.ndarray, "T ..."]:
    """All frames of a video, on the host. Raises ConfigError for frames that it cannot take."""
    ...

  def scorer(self, scorer: VideoScorer) -> VideoScorer:
    """What scores videos that have been through this codec, by a scorer of videos."""
    ...


class AsTheyAre:
  """Changes nothing: rewards see the frames on the device."""

  name, on_host = "none", False

  def window(self, window: FrameWindow) -> FrameWindow:
    return window

  def frames(self, frames: Shaped[np.ndarray, "T ..."]) -> Shaped[np.ndarray, "T ..."]:
    return frames

  def scorer(self, scorer: VideoScorer) -> VideoScorer:
    return scorer


REWARD_CODECS: Mapping[str, WindowCodec] = {codec.name: codec for codec in (AsTheyAre(), H264())}


def find(name: str) -> WindowCodec:
  """The codec of a name. Raises ConfigError for a name that is not in the table."""
  if name not in REWARD_CODECS:
    raise ConfigError(f"reward_codec must be one of {', '.join(REWARD_CODECS)}, got {name!r}")
  return REWARD_CODECS[name]


def require_usable(name: str) -> WindowCodec:
  """The codec of a name for a search of this process. Raises ConfigError where it cannot work."""
  codec = find(name)
  if codec.on_host and jax.process_count() > 1:
    raise ConfigError(
      f"reward_codec {name} works on the host of a single process, and there are {jax.process_count()}; use none"
    )
  return codec
