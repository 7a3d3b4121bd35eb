"""Brightness, saturation, clipping and sharpness of every frame: what a long video loses first."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8


def measure(frames: UInt8[np.ndarray, "T H W 3"]) -> dict[str, Float[np.ndarray, " T"]]:
  """By name, a value of each frame, all in 0..1 but for `sharpness`.

  `brightness` is the mean of all values; `saturation` the mean of (largest - smallest) / largest of a pixel's colours;
  `clipped` the share of values that are 0 or 255; `sharpness` the variance of the Laplacian of the grey picture, which
  noise raises as well.
  """
  rows = [_of_frame(frame) for frame in frames]
  return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _of_frame(frame: np.ndarray) -> dict[str, float]:
  colours = frame.astype(np.float32) / 255
  largest, smallest = colours.max(axis=-1), colours.min(axis=-1)
  grey = colours.mean(axis=-1)
  laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
  return {
    "brightness": float(colours.mean()),
    "saturation": float(((largest - smallest) / np.maximum(largest, 1e-6)).mean()),
    "clipped": float(((frame == 0) | (frame == 255)).mean()),
    "sharpness": float(laplacian.var()),
  }
