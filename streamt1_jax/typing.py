"""The dimension legend, and the array types that use it.

  K  beams                        B  candidates per beam           N  candidates per chunk, K * B
  F  latent frames of a chunk     C  latent channels               H, W  rows and columns of a latent frame
  S  denoising steps              R  memory slots                  L  transformer blocks
  T  tokens of a chunk            X  text tokens                   M  model width
  A  attention heads              D  channels of a head            E  width of the text encoder
  P  decoded past frames kept for the video reward                 Q  pixel frames of a chunk

An unbatched function is written for one candidate or one beam; `vmap` adds B and K in front.
"""

from typing import Any, Literal, TypeAlias

import jax

Params: TypeAlias = Any  # nested dict of arrays

Latents: TypeAlias = jax.Array  # [F, C, H, W] float32, normalised latent space
Frames: TypeAlias = jax.Array  # [Q, height, width, 3] uint8
Queries: TypeAlias = jax.Array  # [T, A, D]
Keys: TypeAlias = jax.Array  # [T, A, D], rotated; in memories [A, T, D]
Values: TypeAlias = jax.Array  # [T, A, D]; in memories [A, T, D]
Tokens: TypeAlias = jax.Array  # [F, T / F, M]
TimeFeatures: TypeAlias = jax.Array  # [F, freq_dim] sinusoids of a timestep per latent frame
Scalar: TypeAlias = jax.Array  # []

Implementation: TypeAlias = Literal["fold", "flash", "triton"]  # of attention over memory slots
