"""Videos as H.264 in MP4, and contact sheets as PNG, for people to look at.

Rewards in a search see the frames on the device, never these files.
"""

from __future__ import annotations

import fractions
import functools
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from etils import epath
from jaxtyping import Int, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, video_source

_BACKGROUND = 24
_LABEL_COLOR = (220, 220, 220)


def write_video(
  path: epath.PathLike,
  frames: UInt8[np.ndarray, "T H W 3"],
  fps: float,
  *,
  scale: int = 1,
  constant_rate_factor: int = 12,
) -> None:
  """Writes an H.264 MP4 that every player shows (yuv420p, BT.709). The file appears whole or not at all.

  H.264 stores colour at half resolution. An odd height or width is made even by repeating the last row or column, and
  small frames keep sharp colours only with a `scale` of 2 or more.

  Args:
    path: the file, ending in ".mp4"; its parent folders are made.
    frames: uint8 `[T, H, W, 3]`, RGB, T at least 1.
    fps: frames per second, positive.
    scale: every pixel becomes a square of this many pixels on a side.
    constant_rate_factor: x264's quality, 0 (best) to 51.

  Raises:
    ConfigError: an argument is out of range.
    OSError: the file system refuses; an earlier file stays.
  """
  frames = np.asarray(frames)
  require_frames(frames)
  if epath.Path(path).suffix != ".mp4":
    raise ConfigError(f"a video file must end in .mp4, got {str(path)!r}")
  if not (np.isfinite(fps) and fps > 0):
    raise ConfigError(f"fps must be positive, got {fps}")
  if not 0 <= constant_rate_factor <= 51:
    raise ConfigError(f"constant_rate_factor must be in 0..51, got {constant_rate_factor}")
  atomic.replace_bytes(path, _encode(even_frames(frames, scale), fps, constant_rate_factor))


def even_frames(frames: UInt8[np.ndarray, "T H W 3"], scale: int) -> UInt8[np.ndarray, "T rows columns 3"]:
  """Frames enlarged by whole pixels, with an even number of rows and columns."""
  enlarged = enlarge(frames, scale)
  height, width = enlarged.shape[1:3]
  return np.pad(enlarged, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


class VideoInfo(NamedTuple):
  """What a video file says of itself.

  Attributes:
    num_frames: frames it shows. Frames that an editor has cut off may still lie in the file.
    fps: frames per second; the average if the rate varies, or the file's time stamps contradict what it says.
    height: rows of a frame as it is stored, in pixels, before a rotation that the file asks for.
    width: columns of a frame as it is stored.
  """

  num_frames: int
  fps: float
  height: int
  width: int


def probe_video(path: epath.PathLike) -> VideoInfo:
  """Length, speed and size of a video. Nothing is decoded if the file says how many frames it holds.

  Raises:
    ConfigError: the file is missing, empty, not a video of `video_source.FORMATS` or of an unknown codec, its frames
      have more than `video_source.MOST_PIXELS` pixels, or it does not say its frame rate.
  """
  with video_source.opened(path) as (container, stream):
    height, width, said = stream.height, stream.width, video_source.shown_frames(container, stream)
    seen, times = 0, []
    for entry in _shown_packets(container, stream) if said else container.decode(stream):
      seen += 1
      if entry.pts is not None:
        times.append((entry.pts, entry.duration or 0))
    if not (said or seen):
      raise ConfigError(f"{path} is empty: it holds no frame")
    if seen < said:
      raise ConfigError(f"{path} is incomplete: {seen} frames of {said}")
    return VideoInfo(said or seen, video_source.frame_rate(path, container, stream, times), height, width)


def _shown_packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
  # Demultiplexing ends with an empty packet.
  return (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)


def read_frames(
  path: epath.PathLike, indices: Sequence[int] | Int[np.ndarray, " N"], num_frames: int
) -> UInt8[np.ndarray, "N H W 3"]:
  """Some frames of a video file. The whole file is decoded, so that damage is noticed wherever it is.

  Args:
    path: a file of one of `video_source.FORMATS`.
    indices: which frames, at least one, 0..num_frames - 1.
    num_frames: what `probe_video` found.

  Returns:
    uint8 `[len(indices), H, W, 3]`, RGB, rotated as the file asks.

  Raises:
    ConfigError: as for `probe_video`, or the file is damaged or incomplete.
  """
  wanted, kept, count = {int(index) for index in indices}, {}, 0
  with video_source.opened(path) as (container, stream):
    said, size = stream.height * stream.width, None
    for frame in container.decode(stream):
      if frame.is_corrupt:
        raise ConfigError(f"{path} is damaged: frame {count} cannot be decoded whole")
      # The caller has memory for the frames that the file speaks of.
      if size is None and frame.height * frame.width > said:
        raise ConfigError(f"{path} is damaged: its frames are larger than it says")
      size = size or (frame.height, frame.width)
      if size != (frame.height, frame.width):
        raise ConfigError(f"{path} changes the size of its frames midway")
      if count in wanted:
        kept[count] = _upright(frame)
      count += 1
  if count != num_frames:
    raise ConfigError(f"{path} is incomplete: {count} frames of {num_frames}")
  if len({frame.shape for frame in kept.values()}) > 1:
    raise ConfigError(f"{path} turns its frames midway")
  return np.stack([kept[int(index)] for index in indices])


def _upright(frame: av.VideoFrame) -> np.ndarray:
  """uint8 `[H, W, 3]`, rotated: telephones store pictures as the sensor sees them, and how to turn them."""
  return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def sheet_indices(num_frames: int, count: int = 8) -> Int[np.ndarray, " N"]:
  """Which frames of a video its contact sheet shows, the first and the last among them: `count`, or all if fewer."""
  return np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int)


def sheet_of(
  frames: UInt8[np.ndarray, "N H W 3"],
  indices: Int[np.ndarray, " N"],
  fps: float,
  *,
  columns: int = 4,
  scale: int = 1,
  gap: int = 4,
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
  """The contact sheet of frames that were picked, in reading order, with the time in seconds under each.

  Args:
    frames: uint8 `[N, H, W, 3]`, RGB, N at least 1.
    indices: int `[N]`, places of the frames in the video; those of `sheet_indices` are evenly spaced.
    fps: frames per second of the video.
    columns: frames side by side; fewer if there are fewer frames.
    scale: every pixel becomes a square of this many pixels on a side.
    gap: pixels between frames and around the sheet.

  Returns:
    uint8 `[sheet_height, sheet_width, 3]` in pixels, RGB.

  Raises ConfigError unless `scale` is a positive integer.
  """
  labels = [f"{index / fps:.2f} s" for index in indices]
  return _lay_out(enlarge(frames, scale), labels, min(columns, len(indices)), gap)


def write_png(path: epath.PathLike, image: UInt8[np.ndarray, "H W 3"]) -> None:
  """Writes `image`, uint8 `[H, W, 3]`, RGB. The file appears whole or not at all.

  Raises:
    ConfigError: `image` is not such an array.
    OSError: the file system refuses; an earlier file stays.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
    raise ConfigError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG", optimize=True)
  atomic.replace_bytes(path, buffer.getvalue())


def require_frames(frames: Shaped[np.ndarray, " ..."]) -> None:
  """Raises ConfigError unless `frames` are uint8 `[T, H, W, 3]`, T at least 1."""
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
    raise ConfigError(f"frames must be uint8 [T, H, W, 3], T at least 1; got {frames.dtype} {list(frames.shape)}")


def enlarge(frames: UInt8[np.ndarray, "T H W 3"], scale: int) -> UInt8[np.ndarray, "T rows columns 3"]:
  """`[T, H * scale, W * scale, 3]`: pixels as squares. Raises ConfigError unless `scale` is a positive integer."""
  if not isinstance(scale, (int, np.integer)) or scale < 1:
    raise ConfigError(f"scale must be a positive integer, got {scale!r}")
  return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _encode(frames: np.ndarray, fps: float, constant_rate_factor: int) -> bytes:
  buffer = io.BytesIO()
  with av.open(buffer, mode="w", format="mp4") as container:
    stream = add_stream(container, frames.shape[1:3], fps, constant_rate_factor)
    encode(container, stream, frames)
    container.mux(stream.encode())
  return buffer.getvalue()


@functools.cache
def x264_options() -> dict[str, str]:
  """What every encoder is told: equal frames give equal files.

  The code that x264 has for AVX-512 gives another file now and then, and its code for AVX2 does not. Where there is no
  list of what the processor can do, x264 chooses.
  """
  listed = pathlib.Path("/proc/cpuinfo")
  has_avx512 = listed.is_file() and "avx512" in listed.read_text()
  return {"x264-params": "asm=avx2"} if has_avx512 else {}


def add_stream(
  container: OutputContainer, size: tuple[int, int], fps: float, constant_rate_factor: int
) -> av.VideoStream:
  """Begins an H.264 stream of frames of an even number of rows and columns."""
  stream = container.add_stream(
    "libx264",
    rate=fractions.Fraction(fps).limit_denominator(1001),
    options={"crf": str(constant_rate_factor), "preset": "medium"} | x264_options(),
  )
  stream.height, stream.width = size
  stream.pix_fmt = "yuv420p"
  # Players disagree about the colour matrix of files without these tags, and show every colour shifted.
  context = stream.codec_context
  context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
  context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
  return stream


def encode(container: OutputContainer, stream: av.VideoStream, frames: UInt8[np.ndarray, "T H W 3"]) -> None:
  """Encodes frames, uint8 `[T, H, W, 3]`, RGB. The encoder keeps some until it sees what follows."""
  for frame in frames:
    container.mux(stream.encode(picture(frame)))


def picture(frame: UInt8[np.ndarray, "H W 3"], number: int | None = None) -> av.VideoFrame:
  """What an encoder takes: `frame`, uint8 `[H, W, 3]`, RGB, at its place in the video or after the one before."""
  rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
  yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
  yuv.pts = number
  return yuv


def _lay_out(pictures: np.ndarray, labels: list[str], columns: int, gap: int) -> np.ndarray:
  font = ImageFont.load_default(size=11)
  boxes = [font.getbbox(label) for label in labels]
  label_height = max(bottom for _, _, _, bottom in boxes) + 3
  height, width = pictures.shape[1:3]
  step_x = max(width, max(int(np.ceil(right)) for _, _, right, _ in boxes)) + gap
  step_y = height + label_height + gap
  rows = -(-len(pictures) // columns)
  sheet = Image.new("RGB", (gap + columns * step_x, gap + rows * step_y), (_BACKGROUND,) * 3)
  draw = ImageDraw.Draw(sheet)
  for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
    x, y = gap + (index % columns) * step_x, gap + (index // columns) * step_y
    sheet.paste(Image.fromarray(picture), (x, y))
    draw.text((x, y + height + 1), label, fill=_LABEL_COLOR, font=font)
  return np.asarray(sheet)
