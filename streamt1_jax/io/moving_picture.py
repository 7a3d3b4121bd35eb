"""Moving pictures for pages: GIF, which every browser and every viewer of Markdown shows."""

import io

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic
from streamt1_jax.io.video import enlarge, require_frames

_COLORS = 64  # enough for drawn worlds; with 256 the noise of a background makes files several times larger
_SAMPLED = 16  # frames that the palette is chosen from


def write_gif(path: epath.PathLike, frames: UInt8[np.ndarray, "T H W 3"], fps: float, *, scale: int = 1) -> None:
  """Writes frames as a GIF that repeats for ever. The file appears whole or not at all.

  All frames share one palette, so that colours that stand still do not flicker.

  Args:
    path: where to.
    frames: uint8 `[T, H, W, 3]`, RGB.
    fps: frames per second, in (0, 50]: a GIF counts time in hundredths of a second, and viewers slow down anything
      faster.
    scale: every pixel becomes a square of this many pixels on a side.

  Raises:
    ConfigError: an argument is out of range.
    OSError: the file system refuses; an earlier file stays.
  """
  frames = np.asarray(frames)
  require_frames(frames)
  if not 0 < fps <= 50:
    raise ConfigError(f"fps of a GIF must be in (0, 50], got {fps}")
  sampled = frames[np.linspace(0, len(frames) - 1, min(_SAMPLED, len(frames))).astype(int)]
  palette = Image.fromarray(np.concatenate(sampled)).quantize(_COLORS)
  pictures = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in enlarge(frames, scale)]
  ends = np.round(100 * np.arange(len(frames) + 1) / fps).astype(int)
  buffer = io.BytesIO()
  durations = (10 * np.diff(ends)).tolist()
  pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
  atomic.replace_bytes(path, buffer.getvalue())
