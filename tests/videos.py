"""Video files, whole."""

import pathlib

import numpy as np

from streamt1_jax.io import video


def read_video(path: pathlib.Path) -> tuple[np.ndarray, float]:
  """All frames, uint8 `[T, H, W, 3]`, and frames per second."""
  info = video.probe_video(path)
  return video.read_frames(path, range(info.num_frames), info.num_frames), info.fps
