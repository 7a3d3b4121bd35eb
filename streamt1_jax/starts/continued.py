"""The end of another video, in pixels: the new video goes on where it stops."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamt1_jax.config import ConfigError
from streamt1_jax.io import video as video_files
from streamt1_jax.starts.base import Studio, name_of
from streamt1_jax.steering import Start

_RATE_TOLERANCE = 0.01
"""Relative to the model's frame rate: 15.98 and 16 are the same to the eye."""


def continued(studio: Studio, video: Any) -> Start:
  """Begins with the last frames of a video, as many as make whole chunks; the front is cut.

  Args:
    studio: what it is made with.
    video: uint8 `[T, height, width, 3]` at the model's frame rate, or a file.

  Raises:
    ConfigError: the file cannot be read, has fewer frames per second than the model, or is shorter than a chunk.
  """
  encoder, name = studio.encoder, f"video {name_of(video)}"
  if isinstance(video, np.ndarray):
    total, pick = len(video), lambda wanted: video[wanted]
  else:
    total, pick = _opened(studio, video, name)
  chunks = encoder.chunks_in(total)
  if not chunks:
    least = f"{encoder.first_frames} frames at {studio.model.fps} per second"
    raise ConfigError(f"{name} is too short: a video begins with at least {least}, it has {total}")
  used = encoder.frames_of(chunks)
  if used < total:
    studio.say(f"{name}: its last {used} of {total} frames make whole chunks and are used")
  return Start(latents=encoder.chunks(studio.fitted(pick(np.arange(total - used, total)), name)))


def _opened(studio: Studio, path: Any, name: str):
  """How many frames a file has at the model's frame rate, and a function that reads some of these."""
  info, fps = video_files.probe_video(path), studio.model.fps
  if info.fps < fps * (1 - _RATE_TOLERANCE):
    raise ConfigError(f"{name} has {info.fps:g} frames per second; the model needs {fps}, and none are made up")
  step = info.fps / fps if info.fps > fps * (1 + _RATE_TOLERANCE) else 1.0
  if step != 1.0:
    studio.say(f"{name}: {info.fps:g} frames per second become {fps}, the nearest in time are taken")
  total = int((info.num_frames - 1) / step) + 1

  def pick(wanted: np.ndarray) -> np.ndarray:
    # From the end: the last frame is the one that the video goes on from.
    indices = np.round(info.num_frames - 1 - (total - 1 - wanted) * step).astype(int)
    return video_files.read_frames(path, indices, info.num_frames)

  return total, pick
