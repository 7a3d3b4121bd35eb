"""How alike the frames of a video stay, by features of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from streamt1_jax.evaluation.metrics import lite0
from streamt1_jax.evaluation.metrics.flow import opencv

LAGS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between the frames that are compared."""
EDGE = 0.15
"""Share of a video that is its beginning, and its end."""
_BATCH = 16


def features(frames: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T F"]:
  """Features of every frame, of length 1. Raises ConfigError without the extra `eval`."""
  cv2, params = opencv(), lite0.load()
  size = (lite0.SIZE, lite0.SIZE)
  kind = cv2.INTER_AREA if min(frames.shape[1:3]) >= lite0.SIZE else cv2.INTER_CUBIC
  pictures = np.stack([cv2.resize(frame, size, interpolation=kind) for frame in frames])
  missing = -len(pictures) % _BATCH
  padded = np.pad(pictures, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")
  batches = [lite0.features(params, padded[start : start + _BATCH]) for start in range(0, len(padded), _BATCH)]
  return _unit(np.concatenate([np.asarray(batch) for batch in batches])[: len(pictures)])


def consistency(found: Float[np.ndarray, "T F"]) -> float:
  """VBench's subject consistency: every frame against the one before and the first one, with these features."""
  cosine = lambda a, b: np.maximum(0, (a * b).sum(axis=-1))
  return float(((cosine(found[1:], found[:-1]) + cosine(found[1:], found[:1])) / 2).mean())


def coherence(found: Float[np.ndarray, "T F"], fps: float, lags: Sequence[float] = LAGS) -> dict[float, float]:
  """Mean cosine of all pairs of frames that are a lag apart, for every lag, in seconds, that the video holds."""
  steps = {lag: round(lag * fps) for lag in lags}
  return {
    lag: float((found[step:] * found[:-step]).sum(axis=-1).mean())
    for lag, step in steps.items()
    if 0 < step < len(found)
  }


def first_last(found: Float[np.ndarray, "T F"]) -> float:
  """Cosine of the mean features of the beginning and of the end."""
  first, last = edges(len(found))
  return float((_unit(found[first].mean(axis=0)) * _unit(found[last].mean(axis=0))).sum())


def edges(length: int) -> tuple[slice, slice]:
  """The beginning and the end of `length` values."""
  count = max(1, round(EDGE * length))
  return slice(0, count), slice(length - count, length)


def drift(values: Float[np.ndarray, " T"]) -> float:
  """Mean of the end less mean of the beginning: it has a sign."""
  first, last = edges(len(values))
  return float(values[last].mean() - values[first].mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
