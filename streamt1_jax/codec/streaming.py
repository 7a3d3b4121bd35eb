"""The Wan VAE decoder as the search sees it: latents in, quantised frames out, state explicit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from streamt1_jax.codec.base import Count
from streamt1_jax.codec.vae import quantize_frames
from streamt1_jax.config import CodecConfig
from streamt1_jax.nn import precision
from streamt1_jax.typing import Frames, Latents, Params


@dataclasses.dataclass(frozen=True)
class StreamingDecoder:
  """Implements `codec.base.Codec`.

  Attributes:
    graphdef: graph definition of a `VideoDecoder`; its parameters are the `params` of every method.
    config: the codec's sizes.
    latent_size: rows and columns of the latent.
    frame_by_frame: decodes one latent frame after the other, with the activations of one.
  """

  graphdef: nnx.GraphDef
  config: CodecConfig
  latent_size: tuple[int, int]
  frame_by_frame: bool = False

  def init_state(self, params: Params) -> Any:
    dtype = jax.tree.leaves(params)[0].dtype
    return nnx.merge(self.graphdef, params).init_state(*self.latent_size, dtype)

  def decode(self, params: Params, latents: Latents, state: Any, *, first: bool) -> tuple[Frames, Any]:
    latents = latents.astype(jax.tree.leaves(params)[0].dtype)
    if not self.frame_by_frame:
      return self._step(params, latents, state, first)
    frames = []
    if first:
      start, state = self._step(params, latents[:1], state, first)
      frames, latents = [start], latents[1:]

    def step(state, latent):
      frames, state = self._step(params, latent[None], state, False)
      return state, frames

    state, rest = jax.lax.scan(step, state, latents)
    return jnp.concatenate([*frames, rest.reshape(-1, *rest.shape[2:])]), state

  def _step(self, params: Params, latents: Float[Array, "F C H W"], state: Any, first: bool) -> tuple[Frames, Any]:
    with precision.of_weights(params):
      frames, state = nnx.merge(self.graphdef, params).decode_step(latents, state, first)
    return quantize_frames(frames), state

  def frame_shape(self) -> tuple[int, ...]:
    height, width = self.latent_size
    return (height * self.config.spatial_stride, width * self.config.spatial_stride, 3)

  def num_frames(self, latent_frames: Count, *, first: bool) -> Count:
    stride = self.config.temporal_stride
    return 1 + stride * (latent_frames - 1) if first else stride * latent_frames

  def frame_dtype(self) -> jnp.dtype:
    return jnp.dtype(jnp.uint8)
