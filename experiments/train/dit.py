"""Trains the tiny causal DiT and its text encoder on the shapes world, by teacher forcing at the four sampling
timesteps.

  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
  python -m experiments.train.dit --flagfile=experiments/flagfiles/train_dit.flags --codec_dir=runs/vae/params
  --run_dir=runs/dit

The first line gives XLA huge pages; without it a step takes 1.3 times as long, for page faults.

Every batch has whole clips and many first chunks (`streamt1_jax.training.batches`), each with the velocity loss
|v - (x - x0) / sigma|^2 of flow matching. Captions leave out size and speed now and then. Beside that, linear readers
of the captions' embeddings, which are thrown away in the end, must name the colours of object and background
(`streamt1_jax.training.caption_readers`). Muon on the backbone's blocks, Adam on the rest, exponential moving average.

Written to `run_dir`: `checkpoints/` (to resume), `params/{backbone,text}` (final averages), `loss.csv`, `loss.png`,
`latents.npz` (the encoded clips, made once).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from etils import epath
from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.backbone.schedule import denoising_schedule
from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.io.checkpoint import load_params, save_params
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.text.umt5 import UMT5Encoder
from streamt1_jax.training import batches, caption_readers, loop
from streamt1_jax.training.batches import BatchConfig, Dataset
from streamt1_jax.training.teacher_forcing import chunk_velocity, clip_velocity

FLAGS = flags.FLAGS
common.define_path("codec_dir", None, "Trained codec parameters.", required=True)
common.define_path("tokenizer", "checkpoints/tiny/tokenizer.model", "Sentencepiece model.")
common.define_path("init_from", None, "Folder with parameters to go on from.")
_PARTS = ["backbone", "text"]
flags.DEFINE_multi_enum("init_parts", _PARTS, _PARTS, "Parts read from --init_from; others are fresh.")
common.define_integer("steps", 6000, "Optimiser steps.", 1)
common.define_integer("clips", 4, "Whole clips in a batch.", 1)
common.define_integer("first_scenes", 8, "Scenes of a batch whose first chunks are drawn.", 1)
common.define_integer("first_copies", 8, "First chunks of each of them.", 1)
common.define_integer("starts_per_scene", 3, "Encoded whole clips per scene, each from another start.", 1, 16)
common.define_float("first_weight", 1.0, "Weight of the first chunks' loss beside the clips' loss.", 0.0)
common.define_float("naming_weight", 0.0, "Weight of the readers' loss.", 0.0)
common.define_float("neighbour_bias", 0.0, "How much the text encoder's heads begin with looking at the next words.")
common.define_float("context_noise", 0.1, "Largest noise added to clean context, in standard deviations.", 0.0)
common.define_float(
  "omit_probability", 0.2, "How often a caption leaves out the size, and likewise the speed.", 0.0, 1.0
)
common.define_float("ambiguous_weight", 1.0, "Weight of scenes of blue or green over dark blue or green.", 0.0)
common.define_float(
  "extra_context_probability", 0.3, "How often a chunk sees an older chunk besides sink and window.", 0.0, 1.0
)
common.define_float(
  "added_sinks_probability", 0.0, "How often a chunk sees sinks as a search adds them, from a long past.", 0.0, 1.0
)
common.define_float("muon_learning_rate", 0.01, "Peak learning rate of the blocks' matrices (Muon).", 0.0)
common.define_float("adam_learning_rate", 1.5e-3, "Peak learning rate of everything else (Adam).", 0.0)
common.define_float(
  "decay_fraction", 0.45, "Share of the run, at its end, over which the learning rate falls to zero.", 0.0, 1.0
)
common.define_float("ema_decay", 0.999, "Decay of the weights' moving average.", 0.0, 1.0)
flags.DEFINE_bool("muon_on_text", False, "Muon on the text encoder, too: its unscaled attention saturates.")
flags.DEFINE_multi_float(
  "step_weights", [0.35, 0.35, 0.2, 0.1], "How often first chunks train at each of the four timesteps."
)


def build_dataset(model: ModelConfig, codec, tokenizer: Tokenizer, cache: epath.Path) -> Dataset:
  """Encodes the training scenes, or reads them from `cache`."""
  if not cache.exists():
    latents = batches.encode_dataset(model, codec, FLAGS.starts_per_scene, FLAGS.seed)
    partial = cache.with_name(f".{cache.name}.partial")
    with partial.open("wb") as file:
      np.savez(file, **latents)
    partial.replace(cache)
  with cache.open("rb") as file:
    return batches.make_dataset(np.load(file), tokenizer)


def batch_config(model: ModelConfig) -> BatchConfig:
  names = (field.name for field in dataclasses.fields(BatchConfig))
  values = {name: getattr(FLAGS, name) for name in names}
  weights, timesteps = tuple(values["step_weights"]), len(model.schedule.denoising_steps)
  if len(weights) != timesteps or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
    raise ConfigError(f"--step_weights must be {timesteps} numbers of at least 0, not all 0, got {weights}")
  return BatchConfig(**values | {"step_weights": weights})


def loss_terms(
  backbone: CausalWanDiT,
  text: UMT5Encoder,
  readers: caption_readers.Readers,
  data: Dataset,
  key: jax.Array,
  model: ModelConfig,
  config: BatchConfig,
  tokens_read: dict[str, list[int]],
) -> dict[str, jax.Array]:
  """Mean squared velocity errors of one batch: of later chunks, of first chunks and of those at each timestep; and the
  readers' loss."""
  schedule = denoising_schedule(model.schedule, model.backbone.freq_dim)
  sigmas, features = jnp.asarray(schedule.sigmas, jnp.float32), jnp.asarray(schedule.features)
  clip_key, first_key = jax.random.split(key)

  encode = jax.vmap(lambda ids: text(ids, ids > 0) * (ids > 0)[:, None])
  text_memory = jax.vmap(backbone.text_memory)

  batch = batches.draw_clips(clip_key, data, model, config, sigmas)
  inputs = batch.noisy, batch.clean, features[batch.step], jnp.asarray(schedule.context_features), batch.first_frame
  seen = batch.visible, batch.valid, batch.moved
  flow = clip_velocity(backbone, *inputs, text_memory(encode(batch.tokens)), *seen)
  # The first chunks of whole clips are not coupled to their noise, so they would teach ghosts: leave them out.
  later = jnp.square(flow - batch.target)[:, 1:].mean()

  batch = batches.draw_first_chunks(first_key, data, config, sigmas)
  embeddings = encode(batch.tokens)
  flow = chunk_velocity(backbone, batch.noisy, features[batch.step], text_memory(embeddings))
  error = jnp.square(flow - batch.target).mean(axis=(2, 3, 4, 5))
  by_step = {f"first_{s}": _mean_where(error, batch.step == s) for s in range(len(sigmas))}
  naming = caption_readers.naming_loss(readers, tokens_read, embeddings, batch.tokens, batch.attributes)
  return {"later": later, "first": error.mean(), "naming": naming, **by_step}


def _mean_where(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def make_optimizer() -> optax.GradientTransformation:
  """Muon on the matrices of the backbone's blocks, Adam on the rest; warm-up, constant, cosine to zero."""
  parts = _PARTS if FLAGS.muon_on_text else ["backbone"]

  def schedule(peak: float) -> optax.Schedule:
    decay = int(FLAGS.steps * FLAGS.decay_fraction)
    warmup = min(100, FLAGS.steps // 10)
    pieces = [
      optax.linear_schedule(0.0, peak, warmup),
      optax.constant_schedule(peak),
      optax.cosine_decay_schedule(peak, decay),
    ]
    return optax.join_schedules(pieces, [warmup, max(warmup, FLAGS.steps - decay)])

  def dimensions(params):
    matrix = optax.contrib.MuonDimensionNumbers(1, 2)
    keys = lambda path: [getattr(step, "key", None) for step in path]
    is_block_matrix = lambda path: path[0] in parts and "blocks" in path and path[-1] == "kernel"
    return jax.tree_util.tree_map_with_path(lambda path, _: matrix if is_block_matrix(keys(path)) else None, params)

  muon = optax.contrib.muon(
    schedule(FLAGS.muon_learning_rate),
    adam_learning_rate=schedule(FLAGS.adam_learning_rate),
    muon_weight_dimension_numbers=dimensions,
    consistent_rms=0.2,
  )
  return optax.chain(optax.clip_by_global_norm(1.0), muon)


class Trainer(NamedTuple):
  """What a training step changes; parameters are {"backbone", "text", "readers"} nested dicts."""

  params: dict
  average: dict
  optimizer: optax.OptState


def make_update(
  graphdefs: dict,
  optimizer: optax.GradientTransformation,
  model: ModelConfig,
  config: BatchConfig,
  data: Dataset,
  tokens_read: dict[str, list[int]],
):
  """The jitted training step, (trainer, step) to (trainer, loss terms)."""

  def loss(params, data, key):
    backbone, text = (nnx.merge(graphdefs[name], params[name]) for name in ("backbone", "text"))
    terms = loss_terms(backbone, text, params["readers"], data, key, model, config, tokens_read)
    weighted = FLAGS.first_weight * terms["first"] + FLAGS.naming_weight * terms["naming"]
    return terms["later"] + weighted, terms

  @functools.partial(jax.jit, donate_argnums=(0,))
  def train_step(trainer: Trainer, step: jax.Array, data: Dataset):
    key = jax.random.fold_in(jax.random.key(FLAGS.seed), step)
    gradients, terms = jax.grad(loss, has_aux=True)(trainer.params, data, key)
    updates, state = optimizer.update(gradients, trainer.optimizer, trainer.params)
    params = optax.apply_updates(trainer.params, updates)
    decay = jnp.minimum(FLAGS.ema_decay, (1.0 + step) / (10.0 + step))
    average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, trainer.average, params)
    return Trainer(params, average, state), terms

  return functools.partial(train_step, data=data)


def init_modules(model: ModelConfig) -> tuple[dict, dict]:
  """Graph definitions and parameters of backbone and text encoder, fresh or of `--init_from`."""
  modules = {
    "backbone": CausalWanDiT(model, nnx.Rngs(FLAGS.seed)),
    "text": UMT5Encoder(model.text, nnx.Rngs(FLAGS.seed + 1)),
  }
  # The published initialisation: a head of zeros predicts zero velocity at first.
  modules["backbone"].head.kernel[...] *= 0.0
  caption_readers.look_at_neighbours(modules["text"], FLAGS.neighbour_bias)
  split = {name: nnx.split(module, nnx.Param) for name, module in modules.items()}
  params = {name: nnx.to_pure_dict(p) for name, (_, p) in split.items()}
  if FLAGS.init_from:
    folder = common.find_folder(FLAGS.init_from)
    params |= {name: load_params(folder / name, params[name], jnp.float32) for name in FLAGS.init_parts}
  return {name: g for name, (g, _) in split.items()}, params


def main() -> None:
  model = common.trainable_preset(FLAGS.preset)
  batch = batch_config(model)
  run_dir = loop.start_run()
  graphdefs, params = init_modules(model)
  print({name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}, flush=True)
  tokenizer = Tokenizer(FLAGS.tokenizer, model.text.max_len)
  codec = common.load_codec(model, FLAGS.codec_dir)
  data = build_dataset(model, codec.encoder.encode, tokenizer, run_dir / "latents.npz")
  optimizer = make_optimizer()
  params["readers"] = caption_readers.init_readers(model.text.dim)
  trainer = Trainer(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
  update = make_update(graphdefs, optimizer, model, batch, data, caption_readers.tokens_read(tokenizer))
  trainer = loop.run_steps(trainer, update, FLAGS.steps, run_dir)
  for name in graphdefs:
    save_params(run_dir / "params" / name, trainer.average[name])
  names = ["later", "naming", *(f"first_{step}" for step in range(len(FLAGS.step_weights)))]
  loop.plot_curve(run_dir, names, "tiny causal DiT", ylabel="velocity error", yscale="log")


if __name__ == "__main__":
  common.run(main)
