"""Strips: three small frames of a candidate side by side, one JPEG each.

  pictures.zip    CHUNK/CANDIDATE.jpg, stored without compression; it grows with the search

A search whose report is wanted keeps one of every candidate, or of survivors alone where losers are not decoded for
good. What is in the video needs no strip of its own: its frames are read from there.
"""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8
from PIL import Image

from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files, result_files, video
from streamt1_jax.state import PREVIEW_WIDTH, ChunkTrace

FRAMES_PER_STRIP = 3
_QUALITY = 88
_MEMBER = re.compile(r"(\d{1,7})/(\d{1,4})\.jpg")
_MOST_BYTES, _MOST_ROWS = 1 << 20, 1 << 12
"""The most of one strip that is read; those written here have some kilobytes, and a hundred rows."""

Strips = Mapping[tuple[int, int], bytes]
"""JPEGs by chunk and candidate."""


class StripFile:
  """Takes strips while they come. Use it as a context."""

  def __init__(self, path: epath.PathLike):
    """Writes `path`, a file of this machine."""
    self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

  def __enter__(self) -> StripFile:
    return self

  def __exit__(self, *exception) -> None:
    self._zip.close()

  def add(self, chunk: int, strips: Mapping[int, bytes]) -> None:
    """Keeps the strips of candidates of a chunk, by number."""
    for number, strip in strips.items():
      # Without a date: equal searches give equal files.
      self._zip.writestr(zipfile.ZipInfo(f"{chunk}/{number}.jpg"), strip)


def strips_of(
  trace: ChunkTrace,
  row: Mapping[str, Any],
  to_pixels: Callable[[Shaped[np.ndarray, "Q ..."]], UInt8[np.ndarray, "Q H W 3"]] = np.asarray,
) -> dict[int, bytes]:
  """Strips of the candidates of a chunk by number: of all where the trace has previews, else of survivors.

  Args:
    trace: the chunk; its candidates have numbers parent * B + i.
    row: what `trace.describe_chunk` says of it.
    to_pixels: from frames as the trace has them to uint8 `[Q, H, W, 3]`.
  """
  if trace.previews is None:
    frames = dict(zip(row["survivors"], np.asarray(trace.frames), strict=True))
  else:
    flat = np.asarray(trace.previews).reshape(-1, *trace.previews.shape[2:])
    frames = {entry["candidate"]: flat[entry["candidate"]] for entry in row["candidates"]}
  return {number: strip_of(to_pixels(each)) for number, each in frames.items()}


def strip_of(frames: UInt8[np.ndarray, "Q H W 3"]) -> bytes:
  """JPEG of three of some frames, uint8 `[Q, H, W, 3]`, side by side: the middles of three equal parts."""
  return _jpeg(Image.fromarray(np.concatenate([_small(frame) for frame in frames[_picked(len(frames))]], axis=1)))


def _picked(count: int) -> np.ndarray:
  return ((np.arange(FRAMES_PER_STRIP) + 0.5) * count / FRAMES_PER_STRIP).astype(int)


def middle_of(strip: bytes) -> bytes:
  """JPEG of the frame in the middle of a strip."""
  with Image.open(io.BytesIO(strip)) as image:
    width = image.width // FRAMES_PER_STRIP
    return _jpeg(image.crop((width, 0, 2 * width, image.height)))


def size_of(strip: bytes) -> tuple[int, int]:
  """Rows and columns of one frame of a strip, in pixels."""
  with Image.open(io.BytesIO(strip)) as image:
    return image.height, image.width // FRAMES_PER_STRIP


def _small(frame: np.ndarray) -> np.ndarray:
  image = Image.fromarray(frame)
  if image.width > PREVIEW_WIDTH:
    image = image.resize(
      (PREVIEW_WIDTH, max(1, round(image.height * PREVIEW_WIDTH / image.width))), Image.Resampling.BOX
    )
  return np.asarray(image)


def _jpeg(image: Image.Image) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0, optimize=True)
  return buffer.getvalue()


def as_data(content: bytes, kind: str = "image/jpeg") -> str:
  """A URL that holds the content itself."""
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def kept(folder: epath.Path, begin: int = 0) -> dict[tuple[int, int], bytes]:
  """The strips that a search kept of chunks from `begin` on.

  Raises ConfigError if the file is damaged, or holds something else.
  """
  path = folder / result_files.PICTURES
  if not path.is_file():
    return {}
  strips = {}
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      for entry in archive.infolist():
        name = _MEMBER.fullmatch(entry.filename)
        if not name or entry.file_size > _MOST_BYTES or entry.compress_type != zipfile.ZIP_STORED:
          raise ConfigError(f"{path} holds something else than pictures of this program: {entry.filename[:60]!r}")
        if int(name[1]) < begin:
          continue
        content = archive.read(entry)
        _check(content, f"{path} is damaged: {entry.filename}")
        strips[int(name[1]), int(name[2])] = content
  except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError) as error:
    raise ConfigError(f"{path} cannot be read: {part_files.first_line(error)}") from error
  return strips


def _check(strip: bytes, where: str) -> None:
  """Raises ConfigError, which begins with `where`, unless `strip` is a whole JPEG of the size that strips have."""
  try:
    with Image.open(io.BytesIO(strip), formats=("JPEG",)) as image:
      if image.width > FRAMES_PER_STRIP * PREVIEW_WIDTH or image.height > _MOST_ROWS:
        raise ConfigError(f"{where} has {image.width}x{image.height} pixels")
      image.load()
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    # A ConfigError is a ValueError.
    raise error if isinstance(error, ConfigError) else ConfigError(f"{where} is no whole JPEG") from error


def from_video(path: epath.Path, spans: Mapping[int, tuple[int, int]]) -> dict[int, bytes]:
  """Strips of chunks of a video, from the frames [begin, end) that each has there; {} for a video of other length.

  Raises ConfigError if the file is no video, or damaged.
  """
  num_frames = video.probe_video(path).num_frames
  if not spans or max(end for _, end in spans.values()) > num_frames:
    return {}
  places = {chunk: begin + _picked(end - begin) for chunk, (begin, end) in spans.items()}
  needed = np.unique(np.concatenate(list(places.values())))
  frames = video.read_frames(path, needed, num_frames)
  return {chunk: strip_of(frames[np.searchsorted(needed, picked)]) for chunk, picked in places.items()}
