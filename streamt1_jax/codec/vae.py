"""The causal Wan video VAE as two explicit-state streams.

  frames [T, height, width, 3] ── encode_step ── latents [F, C, h, w] ── decode_step ── frames
                                      │                                     │
                          stream state in and out               stream state in and out

The first step of a stream turns 1 + r (F - 1) frames into F latent frames (r is the temporal stride, 4 for
Wan 2.1), every later step r F frames into F. Streaming is exact: however a video is cut into steps, the
result is that of a single first step with all of it. A stream state is a PyTree of arrays whose shapes never
change; streams cannot disturb one another.

Everything is unbatched: `vmap` for a batch. Computation is in the dtype of parameters and inputs. Source:
docs/reference/wan_vae.md; `patch_size` as in Wan 2.2.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from streamt1_jax.codec.layers import (
  CausalConv,
  ChannelNorm,
  Downsample,
  MiddleBlock,
  ResidualBlock,
  Upsample,
)
from streamt1_jax.config import CodecConfig, ConfigError
from streamt1_jax.typing import HostArray

Pixels: TypeAlias = Float[HostArray, "T height width 3"]
Latents: TypeAlias = Float[Array, "F C H W"]
StreamState: TypeAlias = Any  # nested tuples of [2 or 1, h, w, C] histories, in the order of the layers


class Moments(NamedTuple):
  """The posterior of the latent, before normalisation."""

  mean: Latents
  logvar: Latents


def patchify(
  frames: Float[HostArray, "T height width colors"], patch: int
) -> Float[HostArray, "T rows columns channels"]:
  """Space to depth, `[T, height, width, 3]` to `[T, height / p, width / p, 3 p p]`.

  Rows run fastest among the channels, then columns, then colours.
  """
  count, height, width, colors = frames.shape
  x = frames.reshape(count, height // patch, patch, width // patch, patch, colors)
  return x.transpose(0, 1, 3, 5, 4, 2).reshape(count, height // patch, width // patch, -1)


def unpatchify(x: Float[HostArray, "T rows columns channels"], patch: int) -> Float[HostArray, "T height width colors"]:
  """Inverse of `patchify`."""
  count, height, width, channels = x.shape
  x = x.reshape(count, height, width, channels // patch**2, patch, patch)
  return x.transpose(0, 1, 5, 2, 4, 3).reshape(count, height * patch, width * patch, -1)


def quantize_frames(frames: Float[HostArray, "*shape"]) -> UInt8[Array, "*shape"]:
  """Frames in [-1, 1] to uint8 by truncation, as the released code does; values outside are clipped."""
  scaled = 255.0 * jnp.clip(frames.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
  return scaled.astype(jnp.uint8)


class Stage(nnx.Module):
  """Residual blocks at one resolution, then the transition to the next, where there is one."""

  def __init__(
    self, in_dim: int, out_dim: int, num_blocks: int, resample: Downsample | Upsample | None, *, rngs: nnx.Rngs
  ):
    widths = [in_dim] + [out_dim] * num_blocks
    self.blocks = nnx.List([ResidualBlock(a, b, rngs=rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)])
    self.resample = resample

  def __call__(
    self, x: Float[Array, "T H W C"], history: tuple, first: bool
  ) -> tuple[Float[Array, "T_out H_out W_out out"], tuple]:
    block_histories, resample_history = history
    updated = []
    for block, block_history in zip(self.blocks, block_histories, strict=True):
      x, block_history = block(x, block_history)
      updated.append(block_history)
    if self.resample is not None:
      x, resample_history = self.resample(x, resample_history, first)
    return x, (tuple(updated), resample_history)


class VideoEncoder(nnx.Module):
  """Frames in [-1, 1] to latents."""

  def __init__(self, config: CodecConfig, *, rngs: nnx.Rngs):
    self.config = config
    widths = [config.base_dim * multiplier for multiplier in (1, *config.dim_mult)]
    transitions = zip(config.spatial_down, config.temporal_down, strict=True)
    self.conv_in = CausalConv(3 * config.patch_size**2, widths[0], rngs=rngs)
    resamples = [Downsample(dim, *halve, rngs=rngs) for dim, halve in zip(widths[1:], transitions, strict=False)]
    self.stages = nnx.List(
      Stage(a, b, config.num_res_blocks, resample, rngs=rngs)
      for a, b, resample in zip(widths[:-1], widths[1:], [*resamples, None], strict=True)
    )
    self.middle = MiddleBlock(widths[-1], rngs=rngs)
    self.norm_out = ChannelNorm(widths[-1])
    self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, rngs=rngs)
    self.quant = nnx.Linear(2 * config.latent_channels, 2 * config.latent_channels, rngs=rngs)

  def init_state(self, height: int, width: int, dtype: DTypeLike = jnp.float32) -> StreamState:
    """State before the first frame; `height` and `width` in pixels.

    Raises ConfigError unless they are multiples of the spatial stride.
    """
    stride = self.config.spatial_stride
    if height % stride or width % stride:
      raise ConfigError(f"frame size must be a multiple of {stride} pixels, got {height}x{width}")
    h, w = height // self.config.patch_size, width // self.config.patch_size
    conv_in = self.conv_in.init_history(h, w, dtype)
    stages = []
    for stage, spatial in zip(self.stages, (*self.config.spatial_down, False), strict=True):
      blocks = tuple(block.init_history(h, w, dtype) for block in stage.blocks)
      h, w = (h // 2, w // 2) if spatial else (h, w)
      stages.append((blocks, stage.resample and stage.resample.init_history(h, w, dtype)))
    middle = self.middle.init_history(h, w, dtype)
    return conv_in, tuple(stages), middle, self.conv_out.init_history(h, w, dtype)

  def moments_step(self, frames: Pixels, state: StreamState, first: bool) -> tuple[Moments, StreamState]:
    """Posterior of the latents of the next frames.

    Args:
      frames: in [-1, 1]; T is 1 + r (F - 1) in the first step, r F after.
      state: the stream so far.
      first: static; whether this is the first step of the stream.

    Returns:
      Moments, not normalised, and the new state.

    Raises:
      ConfigError: the number of frames does not fit.
    """
    _check_frames(frames.shape[0], self.config.temporal_stride, first)
    conv_in, stages, middle, conv_out = state
    x, conv_in = self.conv_in(jnp.asarray(patchify(frames, self.config.patch_size)), conv_in)
    x, stages = _run_stages(self.stages, x, stages, first)
    x, middle = self.middle(x, middle)
    x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), conv_out)
    mean, logvar = jnp.split(self.quant(x).transpose(0, 3, 1, 2), 2, axis=1)
    return Moments(mean, logvar), (conv_in, stages, middle, conv_out)

  def encode_step(self, frames: Pixels, state: StreamState, first: bool) -> tuple[Latents, StreamState]:
    """Normalised latents (the posterior's mean) of the next frames; arguments as in `moments_step`."""
    moments, state = self.moments_step(frames, state, first)
    mean, std = _latent_statistics(self.config, moments.mean.dtype)
    return (moments.mean - mean) / std, state

  def moments(self, frames: Pixels) -> Moments:
    """Posterior of a whole video, `[T, height, width, 3]` in [-1, 1] with T = 1 + r (F - 1)."""
    _, height, width, _ = frames.shape
    return self.moments_step(frames, self.init_state(height, width, frames.dtype), first=True)[0]

  def encode(self, frames: Pixels) -> Latents:
    """Normalised latents of a whole video, `[T, height, width, 3]` in [-1, 1] with T = 1 + r (F - 1)."""
    _, height, width, _ = frames.shape
    return self.encode_step(frames, self.init_state(height, width, frames.dtype), first=True)[0]


class VideoDecoder(nnx.Module):
  """Latents to frames in [-1, 1]."""

  def __init__(self, config: CodecConfig, *, rngs: nnx.Rngs):
    self.config = config
    widths = [config.base_dim * multiplier for multiplier in (*config.dim_mult, config.dim_mult[-1])][::-1]
    transitions = list(zip(config.spatial_down, config.temporal_down, strict=True))[::-1]
    self.post_quant = nnx.Linear(config.latent_channels, config.latent_channels, rngs=rngs)
    self.conv_in = CausalConv(config.latent_channels, widths[0], rngs=rngs)
    self.middle = MiddleBlock(widths[0], rngs=rngs)
    resamples = [Upsample(dim, *double, rngs=rngs) for dim, double in zip(widths[1:], transitions, strict=False)]
    # A spatial transition halves the channels it hands on.
    shares = [1, *(2 if spatial else 1 for spatial, _ in transitions)]
    self.stages = nnx.List(
      Stage(a // share, b, config.num_res_blocks + 1, resample, rngs=rngs)
      for a, b, share, resample in zip(widths[:-1], widths[1:], shares, [*resamples, None], strict=True)
    )
    self.norm_out = ChannelNorm(widths[-1])
    self.conv_out = CausalConv(widths[-1], 3 * config.patch_size**2, rngs=rngs)

  def init_state(self, latent_height: int, latent_width: int, dtype: DTypeLike = jnp.float32) -> StreamState:
    """State before the first latent frame."""
    h, w = latent_height, latent_width
    conv_in, middle = self.conv_in.init_history(h, w, dtype), self.middle.init_history(h, w, dtype)
    stages = []
    for stage, spatial in zip(self.stages, (*self.config.spatial_down[::-1], False), strict=True):
      blocks = tuple(block.init_history(h, w, dtype) for block in stage.blocks)
      stages.append((blocks, stage.resample and stage.resample.init_history(h, w, dtype)))
      h, w = (2 * h, 2 * w) if spatial else (h, w)
    return conv_in, middle, tuple(stages), self.conv_out.init_history(h, w, dtype)

  def raw_step(self, latents: Latents, state: StreamState, first: bool) -> tuple[Pixels, StreamState]:
    """As `decode_step`, but of latents before normalisation, and the frames are not clipped."""
    conv_in, middle, stages, conv_out = state
    x, conv_in = self.conv_in(self.post_quant(latents.transpose(0, 2, 3, 1)), conv_in)
    x, middle = self.middle(x, middle)
    x, stages = _run_stages(self.stages, x, stages, first)
    x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), conv_out)
    return unpatchify(x, self.config.patch_size), (conv_in, middle, stages, conv_out)

  def decode_step(self, latents: Latents, state: StreamState, first: bool) -> tuple[Pixels, StreamState]:
    """Frames of the next latent frames.

    Args:
      latents: normalised.
      state: the stream so far.
      first: static; whether this is the first step of the stream.

    Returns:
      Frames in [-1, 1], T = 1 + r (F - 1) in the first step and r F after; the new
      state.
    """
    mean, std = _latent_statistics(self.config, latents.dtype)
    frames, state = self.raw_step(latents * std + mean, state, first)
    return jnp.clip(frames, -1.0, 1.0), state

  def decode(self, latents: Latents) -> Pixels:
    """Frames `[1 + r (F - 1), height, width, 3]` in [-1, 1] of a whole video `[F, C, h, w]`."""
    _, _, height, width = latents.shape
    return self.decode_step(latents, self.init_state(height, width, latents.dtype), first=True)[0]


class VideoCodec(nnx.Module):
  """The encoder and the decoder of one VAE."""

  def __init__(self, config: CodecConfig, *, rngs: nnx.Rngs):
    self.encoder = VideoEncoder(config, rngs=rngs)
    self.decoder = VideoDecoder(config, rngs=rngs)


def _run_stages(stages: Iterable[Stage], x: jax.Array, histories, first: bool) -> tuple[jax.Array, tuple]:
  updated = []
  for stage, history in zip(stages, histories, strict=True):
    x, history = stage(x, history, first)
    updated.append(history)
  return x, tuple(updated)


def _latent_statistics(config: CodecConfig, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
  mean, std = jnp.asarray(config.latent_mean, dtype), jnp.asarray(config.latent_std, dtype)
  return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)


def _check_frames(count: int, stride: int, first: bool) -> None:
  if (count - first) % stride or count < 1:
    allowed = f"1 + a multiple of {stride}" if first else f"a positive multiple of {stride}"
    raise ConfigError(f"{'the first' if first else 'a later'} encoder step takes {allowed} frames, got {count}")
