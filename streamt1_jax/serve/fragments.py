"""A video as fragmented MP4 that a browser plays while it is made (MediaSource).

  init segment   ftyp, moov: sizes and codec, once
  fragment       moof, mdat: one chunk, which begins with a keyframe and lies where it belongs on the time line

Every chunk is encoded by itself: nothing is kept for the next one, and a late viewer begins with any chunk.
"""

from __future__ import annotations

import fractions
import io
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8

from streamt1_jax.io import video

# With `frag_discont` a fragment says at what time of the whole video it begins.
_OPTIONS = {"movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer+negative_cts_offsets"}


class Fragment(NamedTuple):
  """One chunk.

  Attributes:
    init: what a player must have read before any fragment; equal for all fragments of a video.
    media: the fragment.
    begin: first frame, counted from the beginning of the video.
    num_frames: frames.
  """

  init: bytes
  media: bytes
  begin: int
  num_frames: int


class Film:
  """Encodes the chunks of one video, one after the other."""

  def __init__(self, fps: int, *, scale: int = 1, constant_rate_factor: int = 18):
    """Nothing is encoded yet.

    Args:
      fps: frames per second.
      scale: every pixel becomes a square of this many pixels on a side.
      constant_rate_factor: x264's quality, 0 (best) to 51.
    """
    self.fps, self._scale, self._quality = fps, scale, constant_rate_factor
    self._next = 0

  @property
  def seconds(self) -> float:
    """Length of what was encoded."""
    return self._next / self.fps

  def add(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Fragment:
    """The next chunk, RGB, at least one frame; all chunks are of one size."""
    frames = video.even_frames(frames, self._scale)
    begin, self._next = self._next, self._next + len(frames)
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4", options=_OPTIONS) as container:
      stream = video.add_stream(container, frames.shape[1:3], self.fps, self._quality)
      # Frames that wait for later ones would begin before the chunk does.
      stream.codec_context.max_b_frames = 0
      stream.codec_context.time_base = fractions.Fraction(1, self.fps)
      for number, frame in enumerate(frames, begin):
        container.mux(stream.encode(video.picture(frame, number)))
      container.mux(stream.encode())
    init, media = split(buffer.getvalue())
    return Fragment(init, media, begin, len(frames))

  def mime(self, init: bytes) -> str:
    """What a browser is asked whether it can play: profile and level are in the init segment."""
    at = init.index(b"avcC") + 5
    return f'video/mp4; codecs="avc1.{init[at : at + 3].hex()}"'


def split(content: bytes) -> tuple[bytes, bytes]:
  """Parts an MP4 of fragments into its init segment and the rest."""
  at = 0
  while at < len(content):
    size, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
    if kind == b"moof":
      break
    at += size
  return content[:at], content[at:]
