"""Trains the tiny causal video VAE on the shapes world.

  python -m experiments.train.vae --flagfile=experiments/flagfiles/train_vae.flags --run_dir=runs/vae_stage1

The shipped codec has three stages; the second goes on with smaller steps, less noise and a smaller KL term, the third
improves the decoder without changing the latents, so it can follow the training of a diffusion model:

  python -m experiments.train.vae --flagfile=experiments/flagfiles/train_vae_refine.flags --run_dir=runs/vae \
    --init_from=runs/vae_stage1/params
  python -m experiments.train.vae --flagfile=experiments/flagfiles/train_vae_decoder.flags --run_dir=runs/vae_decoder \
    --init_from=runs/vae/params

Clips are rendered on the fly. The latent is made easy for a diffusion model: a small KL term, and noise of up
to a tenth of the latent's standard deviation before decoding, so that the decoder forgives the errors of a
sampler. After the last step the latent's mean and standard deviation are folded into the two pointwise layers
around it, so that the saved model's latents have mean 0 and standard deviation 1 in every channel.

Written to `run_dir`: `checkpoints/` (to resume), `params/` (the final weights),
`metrics.json`, `latent_statistics.json` (before folding), `loss.csv`, `loss.png`, `reconstructions.png`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from etils import epath
from flax import nnx

from streamt1_jax.cli import common
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.io import video
from streamt1_jax.io.checkpoint import load_params, save_params
from streamt1_jax.training import loop

FLAGS = flags.FLAGS
common.define_integer("steps", 2000, "Optimiser steps.", 1)
common.define_integer(
  "batch_size", 4, "Clips of the first length in a batch; longer clips come in proportionally fewer.", 1
)
flags.DEFINE_multi_integer("clip_frames", [17, 33], "Lengths of the clips, taken in turn.")
common.define_float("muon_learning_rate", 0.05, "Peak learning rate of the convolution kernels (Muon).", 0.0)
common.define_float("adam_learning_rate", 2e-3, "Peak learning rate of everything else (Adam).", 0.0)
common.define_float("l1_weight", 0.05, "Weight of the mean absolute error beside the mean squared error.", 0.0)
common.define_float("kl_weight", 2e-5, "Weight of the KL divergence per latent element.", 0.0)
common.define_float("latent_noise", 0.1, "Largest noise before decoding, in standard deviations of the latent.", 0.0)
common.define_path("init_from", None, "Parameters to begin with: `params` of an earlier run, or a codec/ of a model.")
flags.DEFINE_bool("freeze_encoder", False, "Train the decoder alone; the latents stay as they are.")

MAX_OFFSET = 960
"""Clips start at a random frame of the first minute."""
EVALUATION_FRAMES = 81


def render_clips(key: jax.Array, count: int, frames: int, split: str) -> jax.Array:
  """`[count, frames, 64, 64, 3]` in [-1, 1], each from a random offset."""
  scene_key, offset_key = jax.random.split(key)
  scenes = shapes.sample_scenes(scene_key, count, split)
  offsets = jax.random.randint(offset_key, (count,), 0, MAX_OFFSET)
  clips = jax.vmap(shapes.render)(scenes, offsets[:, None] + jnp.arange(frames)[None, :])
  return 2.0 * clips - 1.0


def reconstruct_with_noise(codec: VideoCodec, clips: jax.Array, key: jax.Array, latent_noise: float):
  """Unclipped reconstructions from sampled, perturbed latents, and the moments they were sampled from."""
  posterior_key, noise_key, level_key = jax.random.split(key, 3)
  moments = jax.vmap(codec.encoder.moments)(clips)
  if FLAGS.freeze_encoder:
    # Without a gradient neither Muon nor Adam moves a weight: there is no weight decay.
    moments = jax.lax.stop_gradient(moments)
  mean = moments.mean
  latents = mean + jnp.exp(0.5 * moments.logvar) * jax.random.normal(posterior_key, mean.shape)
  spread = jax.lax.stop_gradient(mean.std(axis=(0, 1, 3, 4), keepdims=True))
  level = jax.random.uniform(level_key, (mean.shape[0], 1, 1, 1, 1), maxval=latent_noise)
  latents = latents + level * spread * jax.random.normal(noise_key, mean.shape)
  state = codec.decoder.init_state(*mean.shape[3:])
  frames, _ = jax.vmap(lambda z: codec.decoder.raw_step(z, state, first=True))(latents)
  return frames, moments


def loss_terms(codec: VideoCodec, clips: jax.Array, key: jax.Array, latent_noise: float) -> dict[str, jax.Array]:
  frames, (mean, logvar) = reconstruct_with_noise(codec, clips, key, latent_noise)
  return {
    "mse": jnp.square(frames - clips).mean(),
    "l1": jnp.abs(frames - clips).mean(),
    "kl": 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean(),
  }


def make_optimizer(steps: int) -> optax.GradientTransformation:
  """Muon on convolution kernels, Adam on the rest; short warm-up, cosine to zero."""

  def schedule(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 10), steps)

  def dimensions(params):
    matrix = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda p: matrix(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim >= 3 else None, params)

  return optax.contrib.muon(
    schedule(FLAGS.muon_learning_rate),
    adam_learning_rate=schedule(FLAGS.adam_learning_rate),
    muon_weight_dimension_numbers=dimensions,
  )


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer", "count", "frames"), donate_argnums=(0,))
def train_step(carry, step: jax.Array, graphdef, optimizer, count: int, frames: int):
  """One update of `carry = (params, optimizer state)`; also returns the loss terms."""
  params, optimizer_state = carry
  data_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(FLAGS.seed), step))
  clips = render_clips(data_key, count, frames, "train")

  def loss(params):
    terms = loss_terms(nnx.merge(graphdef, params), clips, noise_key, FLAGS.latent_noise)
    return terms["mse"] + FLAGS.l1_weight * terms["l1"] + FLAGS.kl_weight * terms["kl"], terms

  gradients, terms = jax.grad(loss, has_aux=True)(params)
  updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
  return (optax.apply_updates(params, updates), optimizer_state), terms


def train(graphdef, params, run_dir: epath.Path):
  """Runs the remaining steps and returns the trained parameters."""
  optimizer = make_optimizer(FLAGS.steps)

  def update(carry, step):
    # The lengths of the clips take turns; each has its own executable.
    frames = FLAGS.clip_frames[int(step) % len(FLAGS.clip_frames)]
    count = max(1, FLAGS.batch_size * FLAGS.clip_frames[0] // frames)
    carry, terms = train_step(carry, step, graphdef, optimizer, count, frames)
    return carry, terms | {"psnr": -10.0 * jnp.log10(terms["mse"] / 4.0)}

  params, _ = loop.run_steps((params, optimizer.init(params)), update, FLAGS.steps, run_dir)
  return params


def fold_statistics(codec: VideoCodec, mean: jax.Array, std: jax.Array) -> None:
  """Rescales the latent of `codec` in place to `(latent - mean) / std`; reconstructions do not change.

  Args:
    codec: a codec whose configured latent statistics are 0 and 1.
    mean: `[C]` mean of its latents.
    std: `[C]` standard deviation of its latents.
  """
  scale, channels = jnp.concatenate([1.0 / std, jnp.ones_like(std)]), mean.shape[0]
  # The second half is the log of the variance: a scale of the latent is a shift there.
  shift = jnp.concatenate([-mean / std, -2.0 * jnp.log(std)])
  quant, post_quant = codec.encoder.quant, codec.decoder.post_quant
  quant.kernel[...] = quant.kernel[...] * scale.reshape(1, 2 * channels)
  quant.bias[...] = quant.bias[...] * scale + shift
  post_quant.bias[...] = post_quant.bias[...] + mean @ post_quant.kernel[...]
  post_quant.kernel[...] = post_quant.kernel[...] * std.reshape(channels, 1)


def latent_statistics(graphdef, params, clips: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Per-channel mean and standard deviation, `[C]` each, of the latents of `clips`."""
  latents = jax.lax.map(nnx.merge(graphdef, params).encoder.encode, clips, batch_size=8)
  return latents.mean(axis=(0, 1, 3, 4)), latents.std(axis=(0, 1, 3, 4))


def evaluate(graphdef, params, clips: jax.Array) -> tuple[dict[str, float], jax.Array]:
  """PSNR in dB (of the mean error, and per clip on average and at worst), and the frames in [-1, 1]."""
  codec = nnx.merge(graphdef, params)
  frames = jax.lax.map(lambda clip: codec.decoder.decode(codec.encoder.encode(clip)), clips, batch_size=8)
  errors = jnp.square(0.5 * (frames - clips)).mean(axis=(1, 2, 3, 4))
  return {
    "psnr": float(-10.0 * jnp.log10(errors.mean())),
    "psnr_clip_mean": float(-10.0 * jnp.log10(errors).mean()),
    "psnr_clip_min": float(-10.0 * jnp.log10(errors.max())),
  }, frames


def plot_reconstructions(run_dir: epath.Path, clips: jax.Array, frames: jax.Array) -> None:
  """Six clips: the original above its reconstruction, every tenth frame."""
  pairs = np.stack([np.asarray(clips[:6, ::10]), np.asarray(frames[:6, ::10])], axis=1)
  clip, version, time_step, height, width, colors = pairs.shape
  sheet = pairs.transpose(0, 1, 3, 2, 4, 5).reshape(clip * version * height, time_step * width, colors)
  video.write_png(run_dir / "reconstructions.png", np.uint8(255 * np.clip(sheet * 0.5 + 0.5, 0, 1)))


def normalize_latents(graphdef, params, key: jax.Array, run_dir: epath.Path):
  """Folds the latent statistics into the parameters and records them."""
  mean, std = latent_statistics(graphdef, params, render_clips(key, 128, EVALUATION_FRAMES, "train"))
  statistics = {"mean": mean.tolist(), "std": std.tolist()}
  (run_dir / "latent_statistics.json").write_text(json.dumps(statistics, indent=2))
  codec = nnx.merge(graphdef, params)
  fold_statistics(codec, mean, std)
  return nnx.state(codec, nnx.Param)


def finish(graphdef, params, run_dir: epath.Path) -> None:
  """Evaluates on held-out clips and writes the results."""
  train_key, test_key = jax.random.split(jax.random.key(FLAGS.seed + 1))
  if not FLAGS.freeze_encoder:
    params = normalize_latents(graphdef, params, train_key, run_dir)
  clips = render_clips(test_key, 64, EVALUATION_FRAMES, "test")
  metrics, frames = evaluate(graphdef, params, clips)
  metrics["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
  save_params(run_dir / "params", params)
  (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
  loop.plot_curve(run_dir, ["psnr"], "tiny video VAE", ylabel="training PSNR (dB), noisy latents")
  plot_reconstructions(run_dir, clips, frames)
  print(f"held-out: {metrics}", flush=True)


def check_clip_frames(stride: int) -> None:
  """Raises ConfigError unless every length is one frame and whole groups of `stride` frames."""
  for frames in FLAGS.clip_frames:
    if not 1 <= frames <= EVALUATION_FRAMES or (frames - 1) % stride:
      raise ConfigError(
        f"--clip_frames must be 1 and a multiple of {stride} more, at most {EVALUATION_FRAMES}, got {frames}"
      )


def main() -> None:
  model = common.trainable_preset(FLAGS.preset)
  check_clip_frames(model.codec.temporal_stride)
  run_dir = loop.start_run()
  codec = VideoCodec(model.codec, rngs=nnx.Rngs(FLAGS.seed))
  graphdef, params = nnx.split(codec, nnx.Param)
  if FLAGS.init_from:
    params = load_params(FLAGS.init_from, params)
  print(f"{sum(leaf.size for leaf in jax.tree.leaves(params))} parameters", flush=True)
  finish(graphdef, train(graphdef, params, run_dir), run_dir)


if __name__ == "__main__":
  common.run(main)
