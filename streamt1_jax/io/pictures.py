"""Pictures from files, and pictures of any size brought to the size of a model."""

from __future__ import annotations

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from streamt1_jax.config import ConfigError


def read_picture(path: epath.PathLike) -> np.ndarray:
  """The picture of a file of any format Pillow reads, upright: uint8 `[height, width, 3]`, RGB.

  Raises ConfigError, naming the file, if it is missing or cannot be decoded.
  """
  file = epath.Path(path)
  if not file.is_file():
    raise ConfigError(f"picture {path} does not exist or is not a file")
  try:
    with file.open("rb") as opened, Image.open(opened) as picture:
      return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    # Pillow raises any of these for files that are damaged, or no pictures at all.
    raise ConfigError(f"picture {path} cannot be decoded: {str(error).splitlines()[0]}") from error


def fitted(frames: np.ndarray, height: int, width: int) -> np.ndarray:
  """Frames scaled until they fill `height` x `width`, and cut equally on both sides: uint8 `[T, height, width, 3]`.

  The aspect ratio of what they show stays.
  """
  if frames.shape[1:3] == (height, width):
    return frames
  fit = lambda frame: ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS)
  return np.stack([np.asarray(fit(frame)) for frame in frames])


def tell_fit(frames: np.ndarray, height: int, width: int) -> list[str]:
  """What `fitted` does to frames, in words; nothing if it does nothing."""
  own_height, own_width = frames.shape[1:3]
  if (own_height, own_width) == (height, width):
    return []
  cut = own_height * width != own_width * height
  return [f"{own_width}x{own_height} is scaled{' and cut at the edges' if cut else ''} to {width}x{height}"]
