"""Pictures from files, and pictures of any size brought to the size of a model."""

from __future__ import annotations

from typing import IO

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from streamt1_jax.config import ConfigError
from streamt1_jax.io import paths, video_source

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""Pillow's names of the formats that are read. It knows many more, and starts Ghostscript for one of them."""


def read_picture(path: epath.PathLike) -> UInt8[np.ndarray, "height width 3"]:
  """The picture of a file of one of `FORMATS`, upright: uint8 `[height, width, 3]`, RGB.

  Raises ConfigError, naming the file, if it is missing, has more than `video_source.MOST_PIXELS` pixels, or cannot be
  decoded.
  """
  file = epath.Path(path)
  if not paths.is_regular_file(file):
    raise ConfigError(f"picture {path} does not exist or is not a file")
  with file.open("rb") as opened:
    return decode_picture(opened, f"picture {path}")


def decode_picture(file: IO[bytes], name: str) -> UInt8[np.ndarray, "height width 3"]:
  """As `read_picture`, of what an open file holds; messages begin with `name`."""
  try:
    with Image.open(file, formats=FORMATS) as picture:
      if picture.width * picture.height > video_source.MOST_PIXELS:
        raise ConfigError(f"{name} has more than {video_source.MOST_PIXELS} pixels")
      return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
  except ConfigError:
    raise
  except UnidentifiedImageError as error:
    raise ConfigError(f"{name} is of none of these formats: {', '.join(FORMATS)}") from error
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    # Pillow raises any of these for files that are damaged, or no pictures at all.
    raise ConfigError(f"{name} cannot be decoded: {str(error).splitlines()[0]}") from error


def fitted(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> UInt8[np.ndarray, "T {height} {width} 3"]:
  """Frames scaled until they fill `height` x `width`, and cut equally on both sides: uint8 `[T, height, width, 3]`.

  The aspect ratio of what they show stays.
  """
  if frames.shape[1:3] == (height, width):
    return frames
  fit = lambda frame: ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS)
  return np.stack([np.asarray(fit(frame)) for frame in frames])


def tell_fit(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int) -> list[str]:
  """What `fitted` does to frames, in words; nothing if it does nothing."""
  own_height, own_width = frames.shape[1:3]
  if (own_height, own_width) == (height, width):
    return []
  cut = own_height * width != own_width * height
  return [f"{own_width}x{own_height} is scaled{' and cut at the edges' if cut else ''} to {width}x{height}"]
