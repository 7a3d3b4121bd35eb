"""Trains the tiny causal video VAE on the shapes world.

  python -m experiments.train_vae --flagfile=experiments/flagfiles/train_vae.flags --run_dir=runs/vae

Expected: 28.2 dB on 64 held-out clips of 81 frames (28.7 dB as the mean over clips), still rising, after 2000
steps of 0.6 s: 20 to 25 minutes on two CPU cores that other jobs use as well. Afterwards the decoder can be
improved without changing the latents that a diffusion model has learned:

  python -m experiments.train_vae --flagfile=experiments/flagfiles/train_vae.flags --run_dir=runs/vae_decoder \
    --init_from=runs/vae/params --freeze_encoder --muon_learning_rate=0.02

Clips are rendered on the fly. The latent is made easy for a diffusion model: a small KL term, and noise of up
to a tenth of the latent's standard deviation before decoding, so that the decoder forgives the errors of a
sampler. After the last step the latent's mean and standard deviation are folded into the two pointwise layers
around it, so that the saved model's latents have mean 0 and standard deviation 1 in every channel.

Written to `run_dir`: `checkpoints/` (to resume; the last is kept), `params/` (the final weights),
`metrics.json`, `latent_statistics.json` (before folding), `loss.csv`, `loss.png`, `reconstructions.png`.
"""

import csv
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags
from etils import epath
from flax import nnx

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import preset
from streamt1_jax.data import shapes

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "Where everything is written; an interrupted run resumes from it.", required=True)
flags.DEFINE_string("preset", "tiny", "Model preset whose codec is trained.")
flags.DEFINE_integer("steps", 2000, "Optimiser steps.")
flags.DEFINE_integer(
  "batch_size", 4, "Clips of the first length in a batch; longer clips come in proportionally fewer."
)
flags.DEFINE_multi_integer("clip_frames", [17, 33], "Lengths of the clips, taken in turn.")
flags.DEFINE_float("muon_learning_rate", 0.05, "Peak learning rate of the convolution kernels (Muon).")
flags.DEFINE_float("adam_learning_rate", 2e-3, "Peak learning rate of everything else (Adam).")
flags.DEFINE_float("l1_weight", 0.05, "Weight of the mean absolute error beside the mean squared error.")
flags.DEFINE_float("kl_weight", 2e-5, "Weight of the KL divergence per latent element.")
flags.DEFINE_float("latent_noise", 0.1, "Largest noise before decoding, in standard deviations of the latent.")
flags.DEFINE_string("init_from", None, "Parameters to begin with: the `params` folder of an earlier run.")
flags.DEFINE_bool("freeze_encoder", False, "Train the decoder alone; the latents stay as they are.")
flags.DEFINE_integer("checkpoint_every", 250, "Steps between checkpoints.")
flags.DEFINE_integer("log_every", 25, "Steps between rows of the loss curve.")
flags.DEFINE_integer("seed", 0, "Seed of initialisation and data.")

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
  carry = (params, optimizer.init(params))
  options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=FLAGS.checkpoint_every)
  with ocp.CheckpointManager((run_dir / "checkpoints").resolve(), options=options) as checkpoints:
    start = checkpoints.latest_step() or 0
    if start:
      carry = checkpoints.restore(start, args=ocp.args.StandardRestore(carry))
      print(f"resumed at step {start}", flush=True)
    began = time.time()
    for step in range(start, FLAGS.steps):
      frames = FLAGS.clip_frames[step % len(FLAGS.clip_frames)]
      count = max(1, FLAGS.batch_size * FLAGS.clip_frames[0] // frames)
      carry, terms = train_step(carry, jnp.asarray(step), graphdef, optimizer, count, frames)
      if (step + 1) % FLAGS.log_every == 0:
        log_row(run_dir, step + 1, terms, (time.time() - began) / (step + 1 - start))
      checkpoints.save(step + 1, args=ocp.args.StandardSave(carry), force=step + 1 == FLAGS.steps)
  return carry[0]


def log_row(run_dir: epath.Path, step: int, terms: dict[str, jax.Array], seconds_per_step: float) -> None:
  row = {"step": step, **{name: float(value) for name, value in terms.items()}}
  row["psnr"] = -10.0 * np.log10(row["mse"] / 4.0)
  print(
    "  ".join(f"{name} {value:.5g}" for name, value in row.items()),
    f" {seconds_per_step:.3f} s/step",
    flush=True,
  )
  path = run_dir / "loss.csv"
  is_new = not path.exists()
  with path.open("a") as file:
    writer = csv.DictWriter(file, row)
    if is_new:
      writer.writeheader()
    writer.writerow(row)


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


def plot_curve(run_dir: epath.Path) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  with (run_dir / "loss.csv").open() as file:
    # A resumed run repeats the steps after its checkpoint; the later row of a step counts.
    psnr = {int(row["step"]): float(row["psnr"]) for row in csv.DictReader(file)}
  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  axes.plot(list(psnr), list(psnr.values()))
  axes.set(xlabel="step", ylabel="training PSNR (dB), noisy latents", title="tiny video VAE")
  figure.savefig(run_dir / "loss.png", dpi=120)


def plot_reconstructions(run_dir: epath.Path, clips: jax.Array, frames: jax.Array) -> None:
  """Six clips: the original above its reconstruction, every tenth frame."""
  from PIL import Image

  pairs = np.stack([np.asarray(clips[:6, ::10]), np.asarray(frames[:6, ::10])], axis=1)
  clip, version, time_step, height, width, colors = pairs.shape
  sheet = pairs.transpose(0, 1, 3, 2, 4, 5).reshape(clip * version * height, time_step * width, colors)
  Image.fromarray(np.uint8(255 * np.clip(sheet * 0.5 + 0.5, 0, 1))).save(run_dir / "reconstructions.png")


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
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((run_dir / "params").resolve(), nnx.to_pure_dict(params), force=True)
  (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
  plot_curve(run_dir)
  plot_reconstructions(run_dir, clips, frames)
  print(f"held-out: {metrics}", flush=True)


def load(directory: str, params):
  """The parameters that an earlier run wrote, in the structure of `params`."""
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(epath.Path(directory).resolve(), nnx.to_pure_dict(params))
  nnx.replace_by_pure_dict(params, restored)
  return params


def main(_) -> None:
  run_dir = epath.Path(FLAGS.run_dir)
  run_dir.mkdir(parents=True, exist_ok=True)
  (run_dir / "flags.txt").write_text(FLAGS.flags_into_string())
  codec = VideoCodec(preset(FLAGS.preset).codec, rngs=nnx.Rngs(FLAGS.seed))
  graphdef, params = nnx.split(codec, nnx.Param)
  if FLAGS.init_from:
    params = load(FLAGS.init_from, params)
  print(f"{sum(leaf.size for leaf in jax.tree.leaves(params))} parameters", flush=True)
  finish(graphdef, train(graphdef, params, run_dir), run_dir)


if __name__ == "__main__":
  app.run(main)
