"""Frames as an H.264 file at a bit rate would give them back; nothing is written to a disk."""

from __future__ import annotations

import io

import av
import numpy as np
from jaxtyping import UInt8

from streamt1_jax.io import video


def encode(frames: UInt8[np.ndarray, "T height width 3"], fps: int, bit_rate: int) -> bytes:
  """An MP4: yuv420p, x264's preset `medium`, an average bit rate.

  The encoder has one thread: with several, x264 cuts frames into as many slices, and each machine would make another
  file.

  Args:
    frames: RGB, at least one, height and width even.
    fps: frames per second.
    bit_rate: bits per second, on average.
  """
  buffer = io.BytesIO()
  with av.open(buffer, mode="w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=fps, options=video.x264_options())
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt, stream.bit_rate = "yuv420p", bit_rate
    stream.codec_context.thread_count = 1
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
    container.mux(stream.encode())
  return buffer.getvalue()


def decode(file: bytes) -> UInt8[np.ndarray, "T height width 3"]:
  """All frames of a video file, RGB."""
  with av.open(io.BytesIO(file), mode="r") as container:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
