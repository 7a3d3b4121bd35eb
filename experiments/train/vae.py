"""Trains the tiny causal video VAE on the shapes world.

  python -m experiments.train.vae --flagfile=experiments/flagfiles/train_vae.flags --run_dir=runs/vae_stage1

The codec has four stages. The second goes on with smaller steps, less noise and a smaller KL term. The third
improves the decoder and leaves the latents as they are, so it can follow the training of a diffusion model:

  python -m experiments.train.vae --flagfile=experiments/flagfiles/train_vae_refine.flags --run_dir=runs/vae \
    --init_from=runs/vae_stage1/params
  python -m experiments.train.vae --flagfile=experiments/flagfiles/train_vae_decoder.flags --run_dir=runs/vae_decoder \
    --init_from=runs/vae/params

The fourth, train_vae_world.flags, does the same with clips of one or two objects, to which things happen.

Clips are rendered on the fly. The latent is made easy for a diffusion model: there is a small KL term, and noise of up
to a tenth of the latent's standard deviation is added before decoding, so that the decoder forgives the errors of a
sampler. After the last step the latent's mean and standard deviation are folded into the two pointwise layers around
it: the saved model's latents have mean 0 and standard deviation 1 in every channel.

Written to `run_dir`: `checkpoints/` (to resume), `params/` (the final weights), `metrics.json`,
`latent_statistics.json` (before folding), `loss.jsonl` (the flags, then a row every few steps), `loss.png`,
`reconstructions.png`.
"""

import json
import sys
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
from absl import flags
from etils import epath
from flax import nnx

from streamt1_jax.cli import command, flag_types, training_flags
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ConfigError
from streamt1_jax.data import world
from streamt1_jax.io import video
from streamt1_jax.io.checkpoint import load_params, save_params
from streamt1_jax.training import loop, vae, world_clips
from streamt1_jax.training.trainer import count_parameters
from streamt1_jax.training.vae import EVALUATION_FRAMES, VAETraining
from streamt1_jax.typing import Params


def define_flags(values: flags.FlagValues) -> None:
  """Those of all trainings, and the fields of `VAETraining`."""
  training_flags.define(values)
  integer, number = flag_types.define_integer, flag_types.define_float
  integer(values, "steps", 2000, "Optimiser steps.", 1)
  clips = "Clips of the first length in a batch; longer clips come in proportionally fewer."
  integer(values, "batch_size", 4, clips, 1)
  lengths = "Lengths of the clips, taken in turn."
  flags.DEFINE_multi_integer("clip_frames", [17, 33], lengths, flag_values=values)
  number(values, "muon_learning_rate", 0.05, "Peak learning rate of the convolution kernels (Muon).", 0.0)
  number(values, "adam_learning_rate", 2e-3, "Peak learning rate of everything else (Adam).", 0.0)
  number(values, "l1_weight", 0.05, "Weight of the mean absolute error beside the mean squared error.", 0.0)
  number(values, "kl_weight", 2e-5, "Weight of the KL divergence per latent element.", 0.0)
  noise = "Largest noise before decoding, in standard deviations of the latent."
  number(values, "latent_noise", 0.1, noise, 0.0)
  begin = "Parameters to begin with: `params` of an earlier run, or a codec/ of a model."
  flag_types.define_path(values, "init_from", None, begin)
  freeze = "Train the decoder alone; the latents stay as they are."
  flag_types.define_switch(values, "freeze_encoder", False, freeze)
  objects = "1: clips of one object that goes on as it began. 2: of one or two, to which things happen."
  integer(values, "most_objects", 1, objects, 1, world.MOST_OBJECTS)


def read_training(values: flags.FlagValues, stride: int) -> VAETraining:
  """The training of the flags. Raises ConfigError unless every length is one frame and whole groups of `stride`."""
  for frames in values.clip_frames:
    if not 1 <= frames <= EVALUATION_FRAMES or (frames - 1) % stride:
      raise ConfigError(
        f"--clip_frames must be 1 and a multiple of {stride} more, at most {EVALUATION_FRAMES}, got {frames}"
      )
  given = training_flags.fields_of(values, VAETraining)
  given["clip_frames"] = tuple(values.clip_frames)
  return VAETraining(**given)


def evaluation_clips(key: jax.Array, count: int, split: str, training: VAETraining) -> jax.Array:
  """Clips of the longest length, of what the VAE was trained on."""
  if training.most_objects == 1:
    return vae.render_clips(key, count, EVALUATION_FRAMES, split)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  states = world_clips.short_clips(rng, count, EVALUATION_FRAMES, split)
  return jax.jit(vae.draw_clips, static_argnums=1)(states, count)


def finish(params: Params, graphdef: nnx.GraphDef, training: VAETraining, folder: epath.Path) -> None:
  """Gives the latents mean 0 and standard deviation 1, evaluates on held-out clips and writes the results."""
  train_key, test_key = jax.random.split(jax.random.key(training.seed + 1))
  if not training.freeze_encoder:
    mean, std = vae.latent_statistics(params, graphdef, evaluation_clips(train_key, 128, "train", training))
    statistics = {"mean": mean.tolist(), "std": std.tolist()}
    (folder / "latent_statistics.json").write_text(json.dumps(statistics, indent=2))
    params = vae.with_unit_latents(params, graphdef, mean, std)
  clips = evaluation_clips(test_key, 64, "test", training)
  metrics, frames = vae.evaluate(params, graphdef, clips)
  metrics["parameters"] = count_parameters(params)
  save_params(folder / "params", params)
  (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
  video.write_png(folder / "reconstructions.png", vae.reconstruction_sheet(clips, frames))
  print(f"held-out: {metrics}", flush=True)


def run(values: flags.FlagValues) -> None:
  """Trains and evaluates."""
  model = training_flags.trainable_preset(values.preset)
  training = read_training(values, model.required_codec.temporal_stride)
  if values.init_from is not None:
    training_flags.require_folder("init_from", values.init_from)
  graphdef, state = nnx.split(VideoCodec(model.required_codec, rngs=nnx.Rngs(training.seed)), nnx.Param)
  params = cast(Params, state)
  if values.init_from is not None:
    params = load_params(values.init_from, params)
  this = training_flags.start_run(values)
  print(f"{count_parameters(params)} parameters", flush=True)
  optimizer = vae.make_optimizer(training)
  update = vae.make_update(graphdef, optimizer, training)
  params, _ = loop.run_steps((params, optimizer.init(params)), update, training.steps, this)
  finish(params, graphdef, training, this.folder)
  loop.plot_curve(this, ["psnr"], "tiny video VAE", ylabel="training PSNR (dB), noisy latents")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
