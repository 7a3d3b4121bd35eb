"""Video files: read whole, and made in formats and with faults that `write_video` does not make."""

import fractions
import io
import pathlib
from collections.abc import Callable, Sequence

import av
import numpy as np
from PIL import Image

from streamt1_jax.io import video


def read_video(path: pathlib.Path) -> tuple[np.ndarray, float]:
  """All frames, uint8 `[T, H, W, 3]`, and frames per second."""
  info = video.probe_video(path)
  return video.read_frames(path, range(info.num_frames), info.num_frames), info.fps


def encode(
  format: str,
  codec: str = "mpeg4",
  *,
  frames: int = 9,
  size: tuple[int, int] = (32, 48),
  rate: int = 16,
  title: bytes = b"",
  times: Callable[[int], int] | None = None,
) -> bytes:
  """A video in any of FFmpeg's containers.

  Args:
    format: FFmpeg's name of the container.
    codec: FFmpeg's name of the encoder.
    frames: how many; each is of another grey.
    size: rows and columns.
    rate: frames per second that the file speaks of.
    title: of the file and of the pictures, byte for byte.
    times: from a frame's number to its time stamp in milliseconds, where they are not those of the rate.
  """
  buffer = io.BytesIO()
  with av.open(buffer, "w", format=format, metadata_encoding="latin-1") as container:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    if title:
      container.metadata["title"] = title.decode("latin-1")
      stream.metadata["title"] = title.decode("latin-1")
    for index in range(frames):
      frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 9 * index % 256, np.uint8), format="rgb24")
      if times is not None:
        frame.pts, frame.time_base = times(index), fractions.Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return buffer.getvalue()


def pictures(sizes: Sequence[tuple[int, int]], format: str = "avi", said: tuple[int, int] | None = None) -> bytes:
  """A video of one JPEG picture of each of `sizes` (rows, columns), in a file that speaks of `said`."""
  buffer = io.BytesIO()
  with av.open(buffer, "w", format=format) as container:
    stream = container.add_stream("mjpeg", rate=16)
    stream.height, stream.width, stream.pix_fmt = *(said or sizes[0]), "yuvj420p"
    for index, (height, width) in enumerate(sizes):
      picture = io.BytesIO()
      Image.new("L", (width, height)).save(picture, "JPEG")
      packet = av.Packet(picture.getvalue())
      packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, fractions.Fraction(1, 16)
      container.mux(packet)
  return buffer.getvalue()


def patched(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
  """`content` with `value` at `offset` bytes after the name of the last `box` of an mp4."""
  place = content.rindex(box) + 4 + offset
  return content[:place] + value + content[place + len(value) :]
