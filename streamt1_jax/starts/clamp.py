"""A picture that is the first latent frame of the first chunk; the search makes the rest of it (LongLive 2.0)."""

from __future__ import annotations

from typing import Any

from streamt1_jax.config import ConfigError
from streamt1_jax.starts.base import Studio, name_of, picture_of
from streamt1_jax.steering import Start


def clamp(studio: Studio, image: Any) -> Start:
  """Begins with a picture as the first latent frame; no chunk is given.

  Args:
    studio: what it is made with.
    image: uint8 `[height, width, 3]`, or a file.

  Raises:
    ConfigError: the model was not trained for it.
  """
  if studio.model.image_start != "clamp":
    raise ConfigError(f"the model {studio.model.name!r} was not trained for image_start clamp; it can begin with still")
  picture = studio.fitted(picture_of(image)[None], f"picture {name_of(image)}")[0]
  return Start(image=studio.encoder.picture(picture))
