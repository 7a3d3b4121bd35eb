"""Trains the tiny causal DiT and its text encoder on the shapes world, by teacher forcing at the four sampling
timesteps.

  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
  python -m experiments.train.dit --flagfile=experiments/flagfiles/train_dit.flags --codec_dir=runs/vae/params
  --run_dir=runs/dit

The first line gives XLA huge pages; without it page faults make a step take 1.3 times as long.

Every batch has whole clips, many second and many first chunks (`streamt1_jax.training.batches`), each with the velocity
loss |v - (x - x0) / sigma|^2 of flow matching. Captions leave out size and speed now and then. Linear readers of the
captions' embeddings, which are thrown away in the end, must name the colours of object and background
(`streamt1_jax.training.caption_readers`). Muon trains the backbone's blocks and Adam the rest; what is kept is the
exponential moving average.

Written to `run_dir`: `checkpoints/` (to resume), `params/{backbone,text}` (final averages), `loss.jsonl` (the flags,
then a row every few steps), `loss.png`, `latents.npz` (the encoded clips, made once), `rollouts.npy` (those that the
model made).
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from etils import epath

from streamt1_jax import shipped
from streamt1_jax.cli import command, flag_types, training_flags
from streamt1_jax.config import ConfigError, ModelConfig, require
from streamt1_jax.io.checkpoint import TOKENIZER_FILE, load_params, save_params
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.training import batches, caption_readers, dataset, dit, loop, rollouts, trainer
from streamt1_jax.training.batches import BatchConfig
from streamt1_jax.training.codec import load_codec
from streamt1_jax.training.dataset import DatasetSize
from streamt1_jax.training.dit import PARTS, DiTTraining
from streamt1_jax.training.world_clips import ClipShares


def define_flags(values: flags.FlagValues) -> None:
  """Those of all trainings, and the fields of `DiTTraining` and `BatchConfig`."""
  training_flags.define(values)
  flag_types.define_path(values, "codec_dir", None, "Trained codec parameters.", required=True)
  flag_types.define_path(values, "tokenizer", None, "Sentencepiece model; the small model's by default.")
  flag_types.define_path(values, "init_from", None, "Folder with parameters to go on from.")
  parts = "Parts read from --init_from; others are fresh."
  flags.DEFINE_multi_enum("init_parts", list(PARTS), list(PARTS), parts, flag_values=values)
  _define_batches(values)
  _define_dataset(values)
  integer, number = flag_types.define_integer, flag_types.define_float
  integer(values, "steps", 6000, "Optimiser steps.", 1)
  number(values, "first_weight", 1.0, "Weight of the first chunks' loss beside the other chunks' losses.", 0.0)
  number(values, "naming_weight", 0.0, "Weight of the readers' loss.", 0.0)
  neighbours = "How much the text encoder's heads begin with looking at the next words."
  number(values, "neighbour_bias", 0.0, neighbours)
  number(values, "muon_learning_rate", 0.01, "Peak learning rate of the blocks' matrices (Muon).", 0.0)
  number(values, "adam_learning_rate", 1.5e-3, "Peak learning rate of everything else (Adam).", 0.0)
  decay = "Share of the run, at its end, over which the learning rate falls to zero."
  number(values, "decay_fraction", 0.45, decay, 0.0, 1.0)
  number(values, "ema_decay", 0.999, "Decay of the weights' moving average.", 0.0, 1.0)
  on_text = "Muon on the text encoder, too: its unscaled attention saturates."
  flag_types.define_switch(values, "muon_on_text", False, on_text)


def _define_batches(values: flags.FlagValues) -> None:
  integer, number = flag_types.define_integer, flag_types.define_float
  integer(values, "clips", 4, "Whole clips in a batch.", 1)
  integer(values, "second_clips", 8, "Clips of a batch whose second chunks are drawn.", 1)
  integer(values, "second_copies", 2, "Noisy copies of each of them.", 1)
  integer(values, "first_scenes", 8, "Scenes of a batch whose first chunks are drawn.", 1)
  integer(values, "first_copies", 8, "First chunks of each of them.", 1)
  number(values, "context_noise", 0.1, "Largest noise added to clean context, in standard deviations.", 0.0)
  omitted = "How often a caption leaves out the size, and how often the speed."
  number(values, "omit_probability", 0.2, omitted, 0.0, 1.0)
  number(values, "ambiguous_weight", 1.0, "Weight of scenes of blue or green over dark blue or green.", 0.0)
  older = "How often a chunk sees an older chunk besides sink and window."
  number(values, "extra_context_probability", 0.3, older, 0.0, 1.0)
  added = "How often a chunk sees sinks as a search adds them, from a long past."
  number(values, "added_sinks_probability", 0.0, added, 0.0, 1.0)
  rolled = "How often the past of a whole clip is one of --rollouts."
  number(values, "rollout_probability", 0.0, rolled, 0.0, 1.0)
  often = "How often first chunks train at each of the four timesteps."
  flags.DEFINE_multi_float("step_weights", [0.35, 0.35, 0.2, 0.1], often, flag_values=values)


def _define_dataset(values: flags.FlagValues) -> None:
  integer, number = flag_types.define_integer, flag_types.define_float
  integer(values, "whole_clips", 1500, "Encoded whole clips, each of another scene.", 1)
  rolled = "Whole clips that the model of --init_from continues by itself, before the first step."
  integer(values, "rollouts", 0, rolled, 0)
  integer(values, "scenes", 1500, "Scenes whose first chunks are encoded.", 1)
  integer(values, "starts", 4, "Start positions of each of them.", 2, 16)
  number(values, "two_objects", 0.65, "How often a clip has two objects.", 0.0, 1.0)
  number(values, "early", 0.25, "How often the caption of a whole clip changes early.", 0.0, 1.0)
  number(values, "late", 0.25, "How often the first chunk of a whole clip is of an older caption.", 0.0, 1.0)
  number(values, "still", 0.2, "How often a whole clip that does not change begins with a still picture.", 0.0, 1.0)
  number(values, "far", 0.3, "How often the first chunk of another such clip is from long ago.", 0.0, 1.0)
  crossing = "How often a whole clip is one in which an object passes in front of the other."
  number(values, "crossing", 0.0, crossing, 0.0, 1.0)
  number(values, "anywhere", 0.5, "How often the objects of a whole clip start off the coarse grid.", 0.0, 1.0)


def batch_config(values: flags.FlagValues, model: ModelConfig) -> BatchConfig:
  """The batches of the flags. Raises ConfigError unless the weights are finite, not negative, and not all 0."""
  given = training_flags.fields_of(values, BatchConfig)
  weights, timesteps = tuple(values.step_weights), len(model.schedule.denoising_steps)
  if len(weights) != timesteps or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
    raise ConfigError(f"--step_weights must be {timesteps} numbers of at least 0, not all 0, got {weights}")
  given["step_weights"] = weights
  return BatchConfig(**given)


def _require_rollouts_possible(values: flags.FlagValues) -> None:
  rollouts, probability, clips = values.rollouts, values.rollout_probability, values.whole_clips
  require(
    (rollouts > 0) == (probability > 0), f"--rollouts={rollouts} and --rollout_probability={probability}: give both"
  )
  require(rollouts <= clips, f"--rollouts={rollouts} must be at most --whole_clips={clips}")
  is_whole = values.init_from is not None and set(values.init_parts) == set(PARTS)
  require(rollouts == 0 or is_whole, f"--rollouts={rollouts} needs a model: give --init_from, and all of --init_parts")


def run(values: flags.FlagValues) -> None:
  """Trains and stores the averages."""
  model = training_flags.trainable_preset(values.preset)
  batch = batch_config(values, model)
  training = DiTTraining(**training_flags.fields_of(values, DiTTraining))
  shares = ClipShares(**training_flags.fields_of(values, ClipShares))
  require(shares.crossing == 0 or shares.two_objects > 0, f"--crossing={shares.crossing} needs --two_objects above 0")
  _require_rollouts_possible(values)
  sizes: dict[str, Any] = {name: values[name].value for name in ("whole_clips", "scenes", "starts", "seed")}
  size = DatasetSize(shares=shares, **sizes)
  tokenizer = Tokenizer(values.tokenizer or shipped.checkpoint() / TOKENIZER_FILE, model.required_text.max_len)
  for flag in ("codec_dir", "init_from"):
    given = values[flag].value
    if given is not None:
      training_flags.require_folder(flag, given)
  encode = load_codec(values.codec_dir, model).encoder.encode
  this = training_flags.start_run(values)
  graphdefs, params = dit.init_modules(model, training.seed, values.neighbour_bias)
  if values.init_from is not None:
    stored = epath.Path(values.init_from)
    params |= {name: load_params(stored / name, params[name], jnp.float32) for name in values.init_parts}
  print({name: trainer.count_parameters(part) for name, part in params.items()}, flush=True)
  cache = this.folder / "latents.npz"
  data = dataset.read_or_encode(encode, model, tokenizer, size, cache)
  follows = batches.second_follows(data)
  require(bool(follows.any()), f"--late={shares.late}, --far={shares.far}: no clip has a second chunk to be learned")
  if values.rollouts:
    make = lambda: rollouts.make_rollouts(params, graphdefs, data, model, values.rollouts, training.seed)
    data = data._replace(made=jnp.asarray(rollouts.read_or_make(make, this.folder / "rollouts.npy")))
  optimizer = dit.make_optimizer(training)
  params["readers"] = caption_readers.init_readers(model.required_text.dim)
  read = caption_readers.tokens_read(tokenizer)
  update = dit.make_update(graphdefs, optimizer, data, training, model, batch, read)
  trained = loop.run_steps(trainer.begin(params, optimizer), update, training.steps, this)
  for name in graphdefs:
    save_params(this.folder / "params" / name, trained.average[name])
  names = ["later", "second", "naming", *(f"first_{step}" for step in range(len(values.step_weights)))]
  loop.plot_curve(this, names, "tiny causal DiT", ylabel="velocity error", yscale="log")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
