"""Video files from anybody, opened so that they can neither reach beyond themselves nor take all memory.

FFmpeg reads hundreds of formats. Some are lists of other files or of network addresses, such as SDP, HLS and concat
scripts, and a text file with the name of a video is enough to reach them. So only formats that hold their pictures
themselves are opened, FFmpeg gets the bytes and never a name, and no protocol is allowed to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, cast

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.format import Flags
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import paths

FORMATS = (
  "mov", "matroska", "avi", "flv", "mpegts", "mpeg", "asf", "ogg", "mxf", "nut", "ivf", "yuv4mpegpipe", "gif", "apng"
)  # fmt: skip
"""FFmpeg's names of the containers that are read; "mov" is also mp4 and 3gp, "matroska" also webm."""
_TIMELESS = ("h264", "hevc", "m4v", "mpegvideo", "png_pipe", "jpeg_pipe", "webp_pipe")
"""Pictures without a container. They are opened to say what they lack, which is a frame rate."""

MOST_PIXELS = 1 << 26
"""A frame of more pixels, such as 8193x8192, is refused before memory is taken for it."""

_LIMITS = {"max_pixels": str(MOST_PIXELS)}
_OPEN_SECONDS = 60.0
_RATE_TOLERANCE = 0.05
# Boxes that say how many frames there are, with the place of the number after the name.
_COUNTS = re.compile(rb"stsz.{4}(?P<size>.{4})(?P<samples>.{4})|trun.{4}(?P<run>.{4})", re.DOTALL)


@contextlib.contextmanager
def opened(path: epath.PathLike) -> Iterator[tuple[InputContainer, av.VideoStream]]:
  """The container and its first video stream.

  Raises:
    ConfigError: the file is missing, is no video of these formats, has no decoder, or has frames of more than
      `MOST_PIXELS` pixels. Also for whatever goes wrong in the body: it reads the file, and PyAV raises many types.
  """
  source = epath.Path(path)
  if not paths.is_regular_file(source):
    raise ConfigError(f"{source} does not exist or is not a file; expected a video")
  try:
    with source.open("rb") as file, _container(source, file) as container:
      yield container, _video_stream(source, container)
  except ConfigError:
    raise
  except FFmpegError as error:
    raise ConfigError(f"{source} is not a readable video: {error.strerror}") from error
  except Exception as error:
    raise ConfigError(f"{source} cannot be read: {type(error).__name__}: {error}") from error


class _Nameless:
  """What FFmpeg gets of a file: its bytes. From a name it would make guesses."""

  def __init__(self, file: Any):
    self._file, self.read, self.tell = file, file.read, file.tell

  def seek(self, offset: int, whence: int) -> int:
    """Goes to a place. Where a damaged file leads nowhere, FFmpeg wants a negative number; PyAV prints exceptions."""
    try:
      return self._file.seek(offset, whence)
    except (OSError, ValueError):
      return -1


def _container(source: epath.Path, file: Any) -> InputContainer:
  _require_plausible_counts(source, file)
  try:
    return av.open(
      _Nameless(file),
      mode="r",
      options=_LIMITS,
      container_options={"format_whitelist": ",".join((*FORMATS, *_TIMELESS)), "protocol_whitelist": ""},
      metadata_errors="replace",  # Titles in Latin-1 are common, and nobody reads them here.
      timeout=(_OPEN_SECONDS, None),
    )
  except ArgumentError as error:
    allowed = "mp4, mov, mkv, webm, avi and the like"
    raise ConfigError(f"{source} is not a readable video: its format is none of {allowed}") from error


def _video_stream(source: epath.Path, container: InputContainer) -> av.VideoStream:
  if not container.streams.video:
    raise ConfigError(f"{source} is not a video: it has no pictures")
  stream = container.streams.video[0]
  if stream.codec_context is None:
    raise ConfigError(f"{source} is not readable: FFmpeg knows no decoder for its codec")
  if not 0 < stream.width * stream.height <= MOST_PIXELS:
    # FFmpeg forgets a size that it refuses.
    raise ConfigError(f"{source} is not readable: its frames have no size, or more than {MOST_PIXELS} pixels")
  stream.codec_context.options = _LIMITS
  return stream


def _require_plausible_counts(source: epath.Path, file: Any) -> None:
  """Raises ConfigError for an mp4 that says it holds more frames than bytes: FFmpeg takes 36 bytes for each."""
  size = file.seek(0, os.SEEK_END)
  for start, end in _boxes(file, size):
    file.seek(start)
    for found in _COUNTS.finditer(file.read(end - start)):
      each = int.from_bytes(found["size"] or b"\0\0\0\1")
      frames = int.from_bytes(found["samples"] or found["run"])
      if max(each, 1) * frames > size:
        raise ConfigError(f"{source} is not a readable video: it says it holds {frames} frames in {size} bytes")
  file.seek(0)


def _boxes(file: Any, size: int) -> Iterator[tuple[int, int]]:
  """Where an mp4's descriptions of frames begin and end; nothing for other files."""
  place = 0
  while place + 8 <= size:
    file.seek(place)
    length, name, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
    if not re.fullmatch(rb"[ -~\xa9]{4}", name):
      return
    length = long if length == 1 else length or size - place
    if length < 8:
      return
    if name in (b"moov", b"moof"):
      yield place, min(place + length, size)
    place += length


def shown_frames(container: InputContainer, stream: av.VideoStream) -> int:
  """How many frames the file says it shows, even if some are missing; 0 if it does not say."""
  if not stream.frames or "mp4" not in container.format.name.split(","):
    return stream.frames
  # An mp4 counts all frames it holds, and its edit list says which are shown. FFmpeg marks the others as discarded.
  return sum(not entry.is_discard for entry in stream.index_entries)


def frame_rate(
  path: epath.PathLike, container: InputContainer, stream: av.VideoStream, times: Sequence[tuple[int, int]]
) -> float:
  """Frames per second: what the file says, unless its own time stamps contradict it. Then it is their average.

  Args:
    path: names the file in messages.
    container: the file.
    stream: its pictures.
    times: per frame shown, in any order, its time stamp and its duration (0 if unknown), in units of the stream.

  Raises:
    ConfigError: neither a rate nor times are in the file.
  """
  # FFmpeg makes up 25 frames per second for pictures and for streams without time stamps.
  made_up = container.format.flags & Flags.no_timestamps.value or container.format.name.endswith("_pipe")
  said, (first, _), (last, duration) = stream.average_rate, *_ends(times)
  measured = [
    Fraction(frames) / (span * cast(Fraction, stream.time_base))
    # A container either says how long its last frame is shown, or it does not.
    for frames, span in ((len(times) - 1, last - first), (len(times), last - first + duration))
    if frames > 0 and last > first
  ]
  if made_up or not (said or measured):
    raise ConfigError(f"{path} does not say its frame rate")
  if said and (not measured or any(_agree(said, rate, stream, len(times)) for rate in measured)):
    return float(said)
  return float(measured[0])


def _ends(times: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
  return (min(times), max(times)) if times else ((0, 0), (0, 0))


def _agree(said: Fraction, measured: Fraction, stream: av.VideoStream, frames: int) -> bool:
  """Whether two rates differ by no more than the rounding of time stamps explains, or by too little to matter."""
  rounding = 2 * cast(Fraction, stream.time_base) * max(said, measured) / max(frames - 1, 1)
  return abs(said / measured - 1) <= max(_RATE_TOLERANCE, rounding)
