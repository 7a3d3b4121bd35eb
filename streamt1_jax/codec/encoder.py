"""The Wan VAE encoder for what a video begins with; its weights stay on disk until something is encoded."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt8

from streamt1_jax.config import ModelConfig
from streamt1_jax.nn import precision
from streamt1_jax.typing import Params


class ChunkEncoder:
  """Encodes pictures and videos, chunk by chunk as a stream."""

  def __init__(self, model: ModelConfig, graphdef: nnx.GraphDef, load: Callable[[], Params]):
    """Nothing is loaded yet.

    Args:
      model: with a codec.
      graphdef: of its `VideoEncoder`.
      load: reads its weights.
    """
    self.model, self._graphdef, self._load = model, graphdef, load

  @functools.cached_property
  def _params(self) -> Params:
    return self._load()

  @property
  def size(self) -> tuple[int, int]:
    """Rows and columns of a frame."""
    stride = self.model.required_codec.spatial_stride
    return self.model.latent_height * stride, self.model.latent_width * stride

  @property
  def first_frames(self) -> int:
    """Frames of the first chunk."""
    return 1 + self.model.required_codec.temporal_stride * (self.model.chunk_frames - 1)

  @property
  def later_frames(self) -> int:
    """Frames of every later chunk."""
    return self.model.required_codec.temporal_stride * self.model.chunk_frames

  def chunks_in(self, frames: int) -> int:
    """How many whole chunks a video of `frames` frames has."""
    return max(0, (frames - self.first_frames) // self.later_frames + 1)

  def frames_of(self, chunks: int) -> int:
    """Frames of a video of `chunks` chunks, 12 m - 3 of Wan's."""
    return self.first_frames + (chunks - 1) * self.later_frames

  def picture(self, picture: UInt8[np.ndarray, "height width 3"]) -> Float32[np.ndarray, "C H W"]:
    """The one latent frame of a picture of `size`."""
    latents, _ = _encode(self._params, picture[None], self._state(), self._graphdef, first=True)
    return np.asarray(latents[0])

  def chunks(self, frames: UInt8[np.ndarray, "T height width 3"]) -> Float32[np.ndarray, "chunks F C H W"]:
    """Latents of `frames_of` some number of chunks, of `size`. A stream is exact: its cuts do not show."""
    state, chunks, first = self._state(), [], True
    pieces = np.split(frames, range(self.first_frames, len(frames), self.later_frames))
    for piece in pieces:
      latents, state = _encode(self._params, piece, state, self._graphdef, first=first)
      chunks.append(np.asarray(latents))
      first = False
    return np.stack(chunks)

  def _state(self):
    dtype = jax.tree.leaves(self._params)[0].dtype
    return nnx.merge(self._graphdef, self._params).init_state(*self.size, dtype)


@functools.partial(jax.jit, static_argnames=("graphdef", "first"))
def _encode(params, frames, state, graphdef, *, first):
  dtype = jax.tree.leaves(params)[0].dtype
  pixels = (frames.astype(jnp.float32) / 255 * 2 - 1).astype(dtype)
  with precision.of_weights(params):
    latents, state = nnx.merge(graphdef, params).encode_step(pixels, state, first)
  return latents.astype(jnp.float32), state
