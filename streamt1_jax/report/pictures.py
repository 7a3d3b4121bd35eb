"""Strips: three small frames of a candidate side by side, one JPEG each. A search keeps those of its survivors.

  pictures.zip    CHUNK/CANDIDATE.jpg, stored without compression; it grows with the search

What is in the video needs no strip of its own: its frames are read from there.
"""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files, result_files, video

FRAMES_PER_STRIP = 3
_WIDTH = 160
"""Pixels of a frame in a strip, at most."""
_QUALITY = 88
_MEMBER = re.compile(r"(\d{1,7})/(\d{1,4})\.jpg")
_MOST_BYTES, _MOST_ROWS = 1 << 20, 1 << 12
"""Of one strip that is read; those written here have some kilobytes, and a hundred rows."""

Strips = Mapping[tuple[int, int], bytes]
"""JPEGs by chunk and candidate."""


class StripFile:
  """Takes survivors' frames while they come. Use it as a context."""

  def __init__(self, path: epath.PathLike):
    """Writes `path`, a file of this machine."""
    self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

  def __enter__(self) -> StripFile:
    return self

  def __exit__(self, *exception) -> None:
    self._zip.close()

  def add(self, chunk: int, numbers: Sequence[int], frames: Any) -> None:
    """Keeps candidates of a chunk: `frames`, uint8 `[N, Q, H, W, 3]`, are those of candidates `numbers`."""
    for place, number in enumerate(numbers):
      # A candidate may survive in several beams.
      if number not in numbers[:place]:
        self.add_encoded(chunk, {number: strip_of(np.asarray(frames[place]))})

  def add_encoded(self, chunk: int, strips: Mapping[int, bytes]) -> None:
    """Keeps what `strip_of` made of candidates of a chunk, by number."""
    for number, strip in strips.items():
      # Without a date: equal searches give equal files.
      self._zip.writestr(zipfile.ZipInfo(f"{chunk}/{number}.jpg"), strip)


def strip_of(frames: np.ndarray) -> bytes:
  """JPEG of the first, middle and last of some frames, uint8 `[Q, H, W, 3]`, side by side."""
  picked = frames[np.linspace(0, len(frames) - 1, FRAMES_PER_STRIP).round().astype(int)]
  return _jpeg(Image.fromarray(np.concatenate([_small(frame) for frame in picked], axis=1)))


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
  if image.width > _WIDTH:
    image = image.resize((_WIDTH, max(1, round(image.height * _WIDTH / image.width))), Image.Resampling.BOX)
  return np.asarray(image)


def _jpeg(image: Image.Image) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format="JPEG", quality=_QUALITY, subsampling=0, optimize=True)
  return buffer.getvalue()


def as_data(content: bytes, kind: str = "image/jpeg") -> str:
  """A URL that holds the content itself."""
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def kept(folder: epath.Path) -> dict[tuple[int, int], bytes]:
  """The strips that a search kept. Raises ConfigError if the file is damaged, or holds something else."""
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
      if image.width > FRAMES_PER_STRIP * _WIDTH or image.height > _MOST_ROWS:
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
  places = {
    chunk: np.linspace(begin, end - 1, FRAMES_PER_STRIP).round().astype(int) for chunk, (begin, end) in spans.items()
  }
  needed = np.unique(np.concatenate(list(places.values())))
  frames = video.read_frames(path, needed, num_frames)
  return {chunk: strip_of(frames[np.searchsorted(needed, picked)]) for chunk, picked in places.items()}
