"""What the search asks of a codec, and the codec that does nothing."""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from streamt1_jax.typing import Decoded, Latents, Params

Count = TypeVar("Count", int, jax.Array)
"""A number of frames; an array where it is known only when the program runs."""


@runtime_checkable
class Codec(Protocol):
  """A causal video decoder with explicit state; unbatched, pure and hashable (it is static under `jit`)."""

  def init_state(self, params: Params) -> Any:
    """State of a stream that has not begun; the same shapes as every later state."""
    ...

  def decode(self, params: Params, latents: Latents, state: Any, *, first: bool) -> tuple[Decoded, Any]:
    """Frames of the next latents of a stream; `first` is static and true for the first call of a stream only."""
    ...

  def frame_shape(self) -> tuple[int, ...]:
    """Shape of one decoded frame."""
    ...

  def num_frames(self, latent_frames: Count, *, first: bool) -> Count:
    """Frames that `decode` returns for a number of latent frames."""
    ...

  def frame_dtype(self) -> jnp.dtype:
    """Dtype of the frames."""
    ...


@dataclasses.dataclass(frozen=True)
class LatentCodec:
  """Decodes nothing: a frame is a latent frame. For searches whose rewards read latents, and for benchmarks.

  Attributes:
    shape: shape of one latent frame, (C, H, W).
  """

  shape: tuple[int, int, int]

  def init_state(self, params: Params) -> tuple:
    del params
    return ()

  def decode(self, params: Params, latents: Latents, state: tuple, *, first: bool) -> tuple[Latents, tuple]:
    del params, first
    return latents, state

  def frame_shape(self) -> tuple[int, ...]:
    return self.shape

  def num_frames(self, latent_frames: Count, *, first: bool) -> Count:
    del first
    return latent_frames

  def frame_dtype(self) -> jnp.dtype:
    return jnp.dtype(jnp.float32)
