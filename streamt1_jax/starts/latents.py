"""Latents of a video of the same model: the new video goes on from exactly these."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamt1_jax.config import ConfigError
from streamt1_jax.starts.base import Studio
from streamt1_jax.steering import Start


def latents(studio: Studio, given: Any) -> Start:
  """Begins with latents, which are not encoded again.

  Args:
    studio: what it is made with.
    given: float32 `[latent frames, C, H, W]`, whole chunks, as `Video.latents` has them.

  Raises:
    ConfigError: they are of another size, no whole chunks, or not finite.
  """
  array, model = np.asarray(given), studio.model
  frames, *shape = model.latent_shape
  if array.dtype != np.float32 or list(array.shape[1:]) != shape or not len(array) or len(array) % frames:
    wanted = f"float32 [a multiple of {frames}, {', '.join(map(str, shape))}]"
    raise ConfigError(f"latents of this model are {wanted}, got {array.dtype} {list(array.shape)}")
  if not np.isfinite(array).all():
    raise ConfigError("the latents to begin with hold NaN or Inf")
  return Start(latents=array.reshape(-1, *model.latent_shape))
