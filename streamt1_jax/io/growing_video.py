"""A video file that grows while its frames come, in memory that does not.

  .NAME.partial     fragments, which a player shows although the video is not at its end
  NAME              the whole video, when it is

A video that is made at once is `video.write_video`.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, BinaryIO

import av
import numpy as np
from etils import epath
from jaxtyping import UInt8

from streamt1_jax.config import ConfigError
from streamt1_jax.io import paths, video

# A fragment a second, in microseconds, which goes to the disk at once.
_FRAGMENTS = {"movflags": "empty_moov+default_base_moof", "frag_duration": "1000000", "flush_packets": "1"}


class GrowingVideo:
  """Writes an H.264 MP4, chunk by chunk. Use it as a context: the file has its name when the body has ended.

  If the body raises, nothing is left, and an earlier file stays.

    with GrowingVideo("circle.mp4", fps=16) as growing:
      for chunk in session:
        growing.add(chunk.frames)
  """

  def __init__(self, path: epath.PathLike, fps: float, *, scale: int = 1, constant_rate_factor: int = 12):
    """Nothing is written before the first frames.

    Args:
      path: on this machine, ending in ".mp4"; its parent folders are made.
      fps: frames per second, positive.
      scale: every pixel becomes a square of this many pixels on a side.
      constant_rate_factor: x264's quality, 0 (best) to 51.

    Raises:
      ConfigError: an argument is out of range.
    """
    if paths.is_object_store(epath.Path(path)):
      raise ConfigError(f"{path}: on an object store no file grows; give a path of this machine")
    if not os.fspath(path).endswith(".mp4") or not 0 < fps < float("inf"):
      raise ConfigError(f"a growing video needs a name that ends in .mp4 and a positive fps, got {path} and {fps}")
    self._target = pathlib.Path(os.fspath(path))
    self._partial = self._target.parent / f".{self._target.name}.partial"
    self._options = fps, constant_rate_factor
    self._scale = scale
    self._container: Any = None
    self._stream: Any = None

  def __enter__(self) -> GrowingVideo:
    return self

  def __exit__(self, kind: type[BaseException] | None, *exception) -> None:
    whole = self._target.parent / f".{self._target.name}.whole"
    try:
      if self._container is not None:
        try:
          self._container.mux(self._stream.encode())
        finally:
          self._container.close()
        if kind is None:
          join(self._partial, whole)
          whole.replace(self._target)
    finally:
      for path in (self._partial, whole):
        path.unlink(missing_ok=True)

  def add(self, frames: UInt8[np.ndarray, "T H W 3"]) -> None:
    """Adds frames, uint8 `[T, H, W, 3]`, RGB, all of one size. Raises ConfigError if they are of another."""
    frames = video.even_frames(frames, self._scale)
    if self._container is None:
      self._target.parent.mkdir(parents=True, exist_ok=True)
      self._container = av.open(os.fspath(self._partial), mode="w", format="mp4", options=_FRAGMENTS)
      self._stream = video.add_stream(self._container, frames.shape[1:3], *self._options)
    if frames.shape[1:3] != (self._stream.height, self._stream.width):
      raise ConfigError(f"{self._target}: frames of {frames.shape[1]}x{frames.shape[2]} do not fit those before")
    video.encode(self._container, self._stream, frames)


def join(fragments: pathlib.Path | BinaryIO, whole: pathlib.Path) -> None:
  """Writes the video of a file of fragments in one piece: nothing is encoded again."""
  with av.open(fragments, mode="r") as source, av.open(os.fspath(whole), mode="w", format="mp4") as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    for packet in source.demux(source.streams.video[0]):
      # The last packet of a stream is empty.
      if packet.dts is not None:
        packet.stream = stream
        target.mux(packet)
