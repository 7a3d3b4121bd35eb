"""The training of the tiny causal video VAE: clips, losses, optimiser, one step, and what is measured in the end.

random clips ── encoder ── moments ── sampled latents, made noisy ── decoder ── clips again: mse, l1
                              └────────────────────────────────────────────────────────────── kl
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, PRNGKeyArray, UInt8

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.data import shapes, world
from streamt1_jax.training import world_clips
from streamt1_jax.typing import FloatScalar, Params

EVALUATION_FRAMES = 81
"""Frames of the held-out clips, and the most that a training clip may have."""
_MAX_OFFSET = 960  # clips start at a random frame of the first minute
_ENCODED_TOGETHER = 8


@dataclasses.dataclass(frozen=True)
class VAETraining:
  """How the VAE is trained.

  Attributes:
    steps: optimiser steps.
    batch_size: clips of the first length in a batch; of longer clips proportionally fewer.
    clip_frames: lengths of the clips, taken in turn.
    muon_learning_rate: peak learning rate of the convolution kernels.
    adam_learning_rate: peak learning rate of everything else.
    l1_weight: weight of the mean absolute error beside the mean squared error.
    kl_weight: weight of the KL divergence per latent element.
    latent_noise: largest noise before decoding, in standard deviations of the latent.
    freeze_encoder: whether the decoder alone is trained.
    most_objects: 1 for clips of one object that goes on as it began; 2 for clips of one or two, to which things happen.
    seed: decides initialisation and data.
  """

  steps: int
  batch_size: int
  clip_frames: tuple[int, ...]
  muon_learning_rate: float
  adam_learning_rate: float
  l1_weight: float
  kl_weight: float
  latent_noise: float
  freeze_encoder: bool
  most_objects: int
  seed: int


def render_clips(key: PRNGKeyArray, count: int, frames: int, split: str) -> Float32[Array, "count T 64 64 3"]:
  """Clips in [-1, 1], each from a random offset."""
  scene_key, offset_key = jax.random.split(key)
  scenes = shapes.sample_scenes(scene_key, count, split)
  offsets = jax.random.randint(offset_key, (count,), 0, _MAX_OFFSET)
  clips = jax.vmap(shapes.render)(scenes, offsets[:, None] + jnp.arange(frames)[None, :])
  return 2.0 * clips - 1.0


def draw_clips(states: world.FrameStates, count: int) -> Float32[Array, "count T 64 64 3"]:
  """`count` clips in [-1, 1] of the states of all their frames, one clip after the other."""
  frames = 2.0 * world.draw(states) - 1.0
  return frames.reshape(count, -1, *frames.shape[1:])


def loss_terms(
  codec: VideoCodec, clips: Float32[Array, "n T height width 3"], key: PRNGKeyArray, training: VAETraining
) -> dict[str, FloatScalar]:
  """`mse`, `l1` and `kl` of clips [n, T, height, width, 3] in [-1, 1], float32 scalars."""
  frames, (mean, logvar) = _reconstruct_with_noise(codec, clips, key, training)
  return {
    "mse": jnp.square(frames - clips).mean(),
    "l1": jnp.abs(frames - clips).mean(),
    "kl": 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean(),
  }


def _reconstruct_with_noise(codec: VideoCodec, clips: jax.Array, key: jax.Array, training: VAETraining):
  """Unclipped reconstructions from sampled, perturbed latents, and the moments they were sampled from."""
  posterior_key, noise_key, level_key = jax.random.split(key, 3)
  moments = jax.vmap(codec.encoder.moments)(clips)
  if training.freeze_encoder:
    # Without a gradient neither Muon nor Adam moves a weight: there is no weight decay.
    moments = jax.lax.stop_gradient(moments)
  mean = moments.mean
  latents = mean + jnp.exp(0.5 * moments.logvar) * jax.random.normal(posterior_key, mean.shape)
  spread = jax.lax.stop_gradient(mean.std(axis=(0, 1, 3, 4), keepdims=True))
  level = jax.random.uniform(level_key, (mean.shape[0], 1, 1, 1, 1), maxval=training.latent_noise)
  latents = latents + level * spread * jax.random.normal(noise_key, mean.shape)
  *_, rows, columns = mean.shape
  state = codec.decoder.init_state(rows, columns)
  frames, _ = jax.vmap(lambda z: codec.decoder.raw_step(z, state, first=True))(latents)
  return frames, moments


def make_optimizer(training: VAETraining) -> optax.GradientTransformation:
  """Muon on convolution kernels, Adam on the rest; short warm-up, cosine to zero."""

  def schedule(peak: float) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, training.steps // 10), training.steps)

  def dimensions(params):
    matrix = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda p: matrix(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim >= 3 else None, params)

  return optax.contrib.muon(
    schedule(training.muon_learning_rate),
    adam_learning_rate=schedule(training.adam_learning_rate),
    muon_weight_dimension_numbers=dimensions,
  )


def make_update(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, training: VAETraining) -> Callable:
  """The training step, ((params, optimizer state), step) to the next and the loss terms; jitted for every length."""

  @functools.partial(jax.jit, static_argnames=("count", "frames"), donate_argnums=(0,))
  def train_step(carry, step: jax.Array, count: int, frames: int, states: world.FrameStates | None):
    params, optimizer_state = carry
    data_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), step))
    clips = render_clips(data_key, count, frames, "train") if states is None else draw_clips(states, count)

    def loss(params):
      terms = loss_terms(nnx.merge(graphdef, params), clips, noise_key, training)
      return terms["mse"] + training.l1_weight * terms["l1"] + training.kl_weight * terms["kl"], terms

    gradients, terms = jax.grad(loss, has_aux=True)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return (optax.apply_updates(params, updates), optimizer_state), terms

  def update(carry, step: jax.Array):
    frames = training.clip_frames[int(step) % len(training.clip_frames)]
    count = max(1, training.batch_size * training.clip_frames[0] // frames)
    states = None
    if training.most_objects > 1:
      states = world_clips.short_clips(np.random.default_rng((training.seed, int(step))), count, frames, "train")
    carry, terms = train_step(carry, step, count, frames, states)
    return carry, terms | {"psnr": -10.0 * jnp.log10(terms["mse"] / 4.0)}

  return update


def latent_statistics(
  params: Params, graphdef: nnx.GraphDef, clips: Float32[Array, "n T height width 3"]
) -> tuple[Float32[Array, " C"], Float32[Array, " C"]]:
  """Mean and standard deviation, [C] each, of the latents of `clips`."""
  latents = jax.lax.map(nnx.merge(graphdef, params).encoder.encode, clips, batch_size=_ENCODED_TOGETHER)
  return latents.mean(axis=(0, 1, 3, 4)), latents.std(axis=(0, 1, 3, 4))


def with_unit_latents(
  params: Params, graphdef: nnx.GraphDef, mean: Float32[Array, " C"], std: Float32[Array, " C"]
) -> Params:
  """Weights whose latent is `(latent - mean) / std`; reconstructions do not change.

  Args:
    params: weights of a codec whose configured latent statistics are 0 and 1.
    graphdef: its graph definition.
    mean: `[C]` mean of its latents.
    std: `[C]` standard deviation of its latents.
  """
  codec = nnx.merge(graphdef, params)
  scale, channels = jnp.concatenate([1.0 / std, jnp.ones_like(std)]), mean.shape[0]
  # The second half is the log of the variance: a scale of the latent is a shift there.
  shift = jnp.concatenate([-mean / std, -2.0 * jnp.log(std)])
  quant, post_quant = codec.encoder.quant, codec.decoder.post_quant
  quant.kernel[...] = quant.kernel[...] * scale.reshape(1, 2 * channels)
  quant.bias[...] = quant.bias[...] * scale + shift
  post_quant.bias[...] = post_quant.bias[...] + mean @ post_quant.kernel[...]
  post_quant.kernel[...] = post_quant.kernel[...] * std.reshape(channels, 1)
  return cast(Params, nnx.state(codec, nnx.Param))


def evaluate(
  params: Params, graphdef: nnx.GraphDef, clips: Float32[Array, "n T height width 3"]
) -> tuple[dict[str, float], Float32[Array, "n T height width 3"]]:
  """PSNR in dB (of the mean error, and per clip on average and at worst), and the frames in [-1, 1]."""
  codec = nnx.merge(graphdef, params)
  through = lambda clip: codec.decoder.decode(codec.encoder.encode(clip))
  frames = jax.lax.map(through, clips, batch_size=_ENCODED_TOGETHER)
  errors = jnp.square(0.5 * (frames - clips)).mean(axis=(1, 2, 3, 4))
  return {
    "psnr": float(-10.0 * jnp.log10(errors.mean())),
    "psnr_clip_mean": float(-10.0 * jnp.log10(errors).mean()),
    "psnr_clip_min": float(-10.0 * jnp.log10(errors.max())),
  }, frames


def reconstruction_sheet(
  clips: Float32[Array, "n T height width 3"], frames: Float32[Array, "n T height width 3"]
) -> UInt8[np.ndarray, "rows columns 3"]:
  """Picture [height, width, 3] uint8 of six clips: the original above its reconstruction, every tenth frame."""
  pairs = np.stack([np.asarray(clips[:6, ::10]), np.asarray(frames[:6, ::10])], axis=1)
  clip, version, time_step, height, width, colors = pairs.shape
  sheet = pairs.transpose(0, 1, 3, 2, 4, 5).reshape(clip * version * height, time_step * width, colors)
  return (255 * np.clip(sheet * 0.5 + 0.5, 0, 1)).astype(np.uint8)
