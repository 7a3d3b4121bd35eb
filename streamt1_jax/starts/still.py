"""A picture that stands still for one chunk, which is given: any model can go on from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamt1_jax.starts.base import Studio, name_of, picture_of
from streamt1_jax.steering import Start


def still(studio: Studio, image: Any) -> Start:
  """Begins with a picture, repeated for the frames of the first chunk (9 of Wan's), encoded as the video it then is.

  Args:
    studio: what it is made with.
    image: uint8 `[height, width, 3]`, or a file.
  """
  picture = studio.fitted(picture_of(image)[None], f"picture {name_of(image)}")
  return Start(latents=studio.encoder.chunks(np.repeat(picture, studio.encoder.first_frames, axis=0)))
