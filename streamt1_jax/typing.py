"""The dimension legend, and the array types that use it.

  K  beams                        B  candidates per beam           N  candidates per chunk, K * B
  F  latent frames of a chunk     C  latent channels               H, W  rows and columns of a latent frame
  S  denoising steps              R  memory slots                  L  transformer blocks
  T  tokens of a chunk            X  text tokens                   M  model width
  A  attention heads              D  channels of a head            E  width of the text encoder
  P  decoded past frames kept for the video reward                 Q  pixel frames of a chunk

An unbatched function is written for one candidate or one beam; `vmap` adds B and K in front.

Types are jaxtyping's: a dtype, and a shape of space-separated names. One name stands for one size within one call. The
tests check every call with beartype (`tests/conftest.py`); nothing is checked outside them, where types cost nothing.
A shape of one name begins with a space, or else linters take the name for a variable.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

if TYPE_CHECKING:
  Device: TypeAlias = Any  # pyright takes `jax.Device` of jax 0.10 for a variable
else:
  Device = jax.Device

HostArray: TypeAlias = np.ndarray | jax.Array
"""On the host or on a device."""

Weight: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""A weight on a device or on the host, or its shape alone."""

if TYPE_CHECKING:
  Params: TypeAlias = dict[str, Any]
  """The weights of one model: names to weights and to further such dicts."""
else:

  class _EveryLeaf(type):
    def __instancecheck__(cls, tree: Any) -> bool:
      return all(isinstance(leaf, Weight) for leaf in jax.tree.leaves(tree))

  class Params(metaclass=_EveryLeaf):
    """The weights of one model. What the tests check of it is that every leaf of the tree is a weight."""


SearchParams: TypeAlias = dict[str, Params]
"""The weights of a search: "backbone" (of the generator), "codec", "image_reward" and "video_reward"."""

Latents: TypeAlias = Float32[Array, "F C H W"]
"""A chunk, in the normalised latent space."""
Frames: TypeAlias = UInt8[HostArray, "Q height width 3"]
"""Pixels in RGB."""
Decoded: TypeAlias = Shaped[HostArray, "Q ..."]
"""Frames as a codec returns them: pixels, or something else that its rewards can read."""
Queries: TypeAlias = Float[Array, "T A D"]
"""Queries of a chunk, rotated."""
Tokens: TypeAlias = Float[Array, "F frame_tokens M"]
"""Hidden states of a chunk; a frame has T / F tokens."""
TimeFeatures: TypeAlias = Float32[Array, "F freq_dim"]
"""Sinusoids of a timestep per latent frame."""

FloatScalar: TypeAlias = Float32[Array, ""]
FloatLike: TypeAlias = float | np.floating | FloatScalar
"""A number that may be known while tracing."""
IntScalar: TypeAlias = Int32[Array, ""]
IntLike: TypeAlias = int | np.integer | IntScalar
"""A number that may be known while tracing."""

Implementation: TypeAlias = Literal["fold", "flash", "triton"]
"""How attention over memory slots is computed."""
