"""The kinds of start there are."""

from streamt1_jax.starts.base import MakeStart
from streamt1_jax.starts.clamp import clamp
from streamt1_jax.starts.continued import continued
from streamt1_jax.starts.latents import latents
from streamt1_jax.starts.still import still

STARTS: dict[str, MakeStart] = {
  "still": still,
  "clamp": clamp,
  "video": continued,
  "latents": latents,
}
"""By name; the first two are the ways to begin with a picture, `ModelConfig.image_start`."""
