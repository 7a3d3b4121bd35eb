"""Windows through H.264, as in the released program: it writes each one to an mp4 file, and VideoAlign reads the file.

  past [.., P, H, W, 3] ─┐                                     on the host, a thread per candidate
  valid frames [..] ─────┼── callback ── encode ── decode ──── window [.., P + Q, H, W, 3]
  chunk [.., Q, H, W, 3] ┘

One callback takes all candidates that are judged together. Under a mesh their frames travel to one device first.
"""

import concurrent.futures
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped, UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.io import h264
from streamt1_jax.rewards.base import FrameWindow
from streamt1_jax.rewards.scorers import VideoScorer, VideoScores
from streamt1_jax.typing import Frames, HostArray


@dataclasses.dataclass(frozen=True)
class H264:
  """A `window_codecs.WindowCodec`.

  Attributes:
    fps: frames per second of the file; with `bit_rate` it gives the bits of a frame.
    bit_rate: bits per second, what the released version of PyAV takes by default.
  """

  fps: int = 16
  bit_rate: int = 1_024_000

  name = "h264"
  on_host = True

  def window(self, window: FrameWindow) -> FrameWindow:
    """The window as a reward would read it from a file. Raises ConfigError as `require_codable`."""
    require_codable(window.chunk)
    # Frames that are known not to be there do not travel.
    past = window.past[: window.num_past] if isinstance(window.num_past, int) else window.past
    length, own = past.shape[0], window.chunk.shape[0]
    shape = jax.ShapeDtypeStruct((length + own, *window.chunk.shape[1:]), jnp.uint8)
    num_past = jnp.int32(window.num_past)
    frames = jax.pure_callback(self._on_host, shape, past, num_past, window.chunk, vmap_method="expand_dims")
    if isinstance(window.num_past, int):
      return FrameWindow(frames[:length], window.num_past, frames[length:])
    return FrameWindow(frames, window.num_past, jax.lax.dynamic_slice_in_dim(frames, window.num_past, own))

  def frames(self, frames: Shaped[np.ndarray, "T ..."]) -> UInt8[np.ndarray, "T height width 3"]:
    """The frames of a whole video, on the host. Raises ConfigError as `require_codable`."""
    require_codable(frames)
    return h264.decode(h264.encode(frames, self.fps, self.bit_rate))

  def scorer(self, scorer: VideoScorer) -> "CodedScorer":
    """The scorer of videos that have been through this codec."""
    return CodedScorer(scorer, self)

  def _on_host(self, past: HostArray, num_past: HostArray, chunk: HostArray) -> np.ndarray:
    """Windows [..., P + Q, H, W, 3] of arrays whose leading axes have equal sizes or 1; what is not valid is 0."""
    past, num_past, chunk = np.asarray(past), np.asarray(num_past), np.asarray(chunk)
    lead = np.broadcast_shapes(past.shape[:-4], num_past.shape, chunk.shape[:-4])
    pasts, chunks = (np.broadcast_to(x, (*lead, *x.shape[-4:])) for x in (past, chunk))
    counts = np.broadcast_to(num_past, lead)
    windows = np.zeros((*lead, past.shape[-4] + chunk.shape[-4], *chunk.shape[-3:]), np.uint8)

    def fill(place: tuple[int, ...]) -> None:
      valid = np.concatenate([pasts[place][: counts[place]], chunks[place]])
      windows[place][: len(valid)] = self.frames(valid)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
      list(threads.map(fill, np.ndindex(lead)))
    return windows


@dataclasses.dataclass(frozen=True, eq=False)
class CodedScorer:
  """A `VideoScorer` that writes all frames of a video anew before it looks at its own.

  Attributes:
    scorer: of videos.
    codec: what writes them.
  """

  scorer: VideoScorer
  codec: H264

  @property
  def columns(self) -> tuple[str, ...]:
    return self.scorer.columns

  @property
  def reads_prompt(self) -> bool:
    return self.scorer.reads_prompt

  def look_at(self, num_frames: int, fps: float) -> Int[np.ndarray, " N"]:
    """All frames. Raises ConfigError for a video of another speed, too."""
    if fps != self.codec.fps:
      raise ConfigError(f"reward_codec h264 writes {self.codec.fps} frames per second, the video has {fps:g}")
    self.scorer.look_at(num_frames, fps)
    return np.arange(num_frames)

  def __call__(self, prompt: str | None, frames: Frames) -> VideoScores:
    own = self.scorer.look_at(len(frames), self.codec.fps)
    return self.scorer(prompt, self.codec.frames(np.asarray(frames))[own])


def require_codable(frames: Shaped[HostArray, "T ..."]) -> None:
  """Raises ConfigError unless frames are pictures of bytes whose height and width are even."""
  shape = "x".join(map(str, frames.shape[1:]))
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
    raise ConfigError(f"reward_codec h264 needs uint8 RGB frames, got {frames.dtype} of {shape}")
  if frames.shape[1] % 2 or frames.shape[2] % 2:
    raise ConfigError(f"reward_codec h264 needs frames of even height and width, got {shape}")
