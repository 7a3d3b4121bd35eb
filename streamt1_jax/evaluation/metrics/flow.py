"""Optical flow of neighbouring frames by DIS (Kroeger et al., arXiv 1603.03590), as OpenCV has it.

On rendered shapes of known speed it is right within 1 %, if small frames are enlarged first.
"""

from __future__ import annotations

import functools
import types

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from streamt1_jax.config import ConfigError

_SMALLEST_SIDE = 128
_WRAP = 4  # A torus is continued by this part of its size on every side.


@functools.cache
def opencv() -> types.ModuleType:
  """OpenCV. Raises ConfigError if it is not installed."""
  try:
    import cv2
  except ImportError as error:
    raise ConfigError("optical flow needs the extra eval: pip install 'streamt1_jax[eval]'") from error
  return cv2


class Flow:
  """Flow between frames of one size.

  Attributes:
    torus: whether what leaves a frame on one side comes in at the other.
  """

  def __init__(self, torus: bool = False):
    cv2 = opencv()
    self.torus = torus
    self._engine = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

  def __call__(
    self, first: UInt8[np.ndarray, "H W 3"], second: UInt8[np.ndarray, "H W 3"]
  ) -> Float32[np.ndarray, "H W 2"]:
    """How far every pixel of `first` has moved in `second`: columns, rows, in pixels."""
    cv2 = opencv()
    height, width = first.shape[:2]
    scale = max(1, -(-_SMALLEST_SIDE // min(height, width)))
    top, left = (height // _WRAP, width // _WRAP) if self.torus else (0, 0)
    pad = ((top, top), (left, left), (0, 0))
    grey = []
    for frame in (first, second):
      wide = np.pad(frame, pad, mode="wrap")
      large = cv2.resize(wide, (wide.shape[1] * scale, wide.shape[0] * scale), interpolation=cv2.INTER_LINEAR)
      grey.append(cv2.cvtColor(large, cv2.COLOR_RGB2GRAY))
    flow = self._engine.calc(*grey, None)
    small = cv2.resize(flow, (width + 2 * left, height + 2 * top), interpolation=cv2.INTER_AREA) / scale
    return np.ascontiguousarray(small[top : top + height, left : left + width], np.float32)

  def warp(
    self, values: Shaped[np.ndarray, "H W C"], flow: Float32[np.ndarray, "H W 2"]
  ) -> Float32[np.ndarray, "H W C"]:
    """`values` [H, W, C] where `flow` points: what every pixel has become, or come from."""
    cv2 = opencv()
    height, width = flow.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    border = cv2.BORDER_WRAP if self.torus else cv2.BORDER_REPLICATE
    x, y = columns + flow[..., 0], rows + flow[..., 1]
    return cv2.remap(values.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=border)
