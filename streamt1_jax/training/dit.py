"""The training of the tiny causal DiT and its text encoder: losses, optimiser, one step.

  batches ──┬─ whole clips ─── velocities of later chunks ──────────────── later
            ├─ second chunks ─ velocities ──────────────────────────────── second
            └─ first chunks ─┬ velocities, by timestep ─────────────────── first
                             └ embeddings of the captions ── readers ───── naming

Parameters are {"backbone", "text", "readers"}, nested dicts.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.backbone.schedule import denoising_schedule
from streamt1_jax.config import ModelConfig
from streamt1_jax.text.umt5 import UMT5Encoder
from streamt1_jax.training import batches, caption_readers, trainer
from streamt1_jax.training.batches import BatchConfig, ClipBatch
from streamt1_jax.training.dataset import Dataset
from streamt1_jax.training.teacher_forcing import chunk_velocity, clip_velocity
from streamt1_jax.training.trainer import Trainer
from streamt1_jax.typing import FloatScalar, IntScalar, Params

PARTS = ("backbone", "text")
"""What is trained and kept."""


@dataclasses.dataclass(frozen=True)
class DiTTraining:
  """How the DiT is trained.

  Attributes:
    steps: optimiser steps.
    first_weight: weight of the first chunks' loss beside the losses of second and later chunks.
    naming_weight: weight of the readers' loss.
    muon_learning_rate: peak learning rate of the blocks' matrices.
    adam_learning_rate: peak learning rate of everything else.
    decay_fraction: share of the run, at its end, over which the learning rate falls to zero.
    ema_decay: decay of the weights' moving average.
    muon_on_text: whether Muon is used on the text encoder too.
    seed: decides initialisation and data.
  """

  steps: int
  first_weight: float
  naming_weight: float
  muon_learning_rate: float
  adam_learning_rate: float
  decay_fraction: float
  ema_decay: float
  muon_on_text: bool
  seed: int


def init_modules(model: ModelConfig, seed: int, neighbour_bias: float) -> tuple[dict[str, nnx.GraphDef], Params]:
  """Graph definitions and fresh parameters of backbone and text encoder.

  Args:
    model: sizes.
    seed: draws the weights.
    neighbour_bias: how much the text encoder's heads begin with looking at the next words.
  """
  modules = {
    "backbone": CausalWanDiT(model, nnx.Rngs(seed)),
    "text": UMT5Encoder(model.required_text, nnx.Rngs(seed + 1)),
  }
  # The published initialisation: a head of zeros predicts zero velocity at first.
  modules["backbone"].head.kernel[...] *= 0.0
  caption_readers.look_at_neighbours(modules["text"], neighbour_bias)
  split = {name: nnx.split(module, nnx.Param) for name, module in modules.items()}
  params = {name: nnx.to_pure_dict(params) for name, (_, params) in split.items()}
  return {name: graphdef for name, (graphdef, _) in split.items()}, params


def loss_terms(
  backbone: CausalWanDiT,
  text: UMT5Encoder,
  readers: caption_readers.Readers,
  data: Dataset,
  key: PRNGKeyArray,
  model: ModelConfig,
  config: BatchConfig,
  tokens_read: dict[str, list[int]],
) -> dict[str, FloatScalar]:
  """Losses of one batch, float32 scalars by name.

  Returns:
    `later`, `second` and `first`, mean squared velocity errors of those chunks; `naming`, the readers' loss;
    `first_0` to `first_3`, as `first` at each timestep, NaN where the batch has none of that timestep.
  """
  schedule = denoising_schedule(model.schedule, model.backbone.freq_dim)
  sigmas, features = jnp.asarray(schedule.sigmas, jnp.float32), jnp.asarray(schedule.features)
  clip_key, second_key, first_key = jax.random.split(key, 3)

  encode = jax.vmap(lambda ids: text(ids, ids > 0) * (ids > 0)[:, None])
  text_memory = jax.vmap(backbone.text_memory)

  def clip_error(batch: ClipBatch) -> jax.Array:
    inputs = batch.noisy, batch.clean, features[batch.step], jnp.asarray(schedule.context_features)
    prompts = text_memory(encode(batch.tokens.reshape(-1, batch.tokens.shape[-1])))
    by_clip = jax.tree.map(lambda x: x.reshape(-1, batch.tokens.shape[1], *x.shape[1:]), prompts)
    return jnp.square(clip_velocity(backbone, *inputs, by_clip, batch.seen) - batch.target).mean()

  later = clip_error(batches.draw_clips(clip_key, data, model, config, sigmas))
  second = clip_error(batches.draw_second_chunks(second_key, data, model, config, sigmas))

  batch = batches.draw_first_chunks(first_key, data, config, sigmas)
  embeddings = encode(batch.tokens)
  flow = chunk_velocity(backbone, batch.noisy, features[batch.step], text_memory(embeddings))
  error = jnp.square(flow - batch.target).mean(axis=(2, 3, 4, 5))
  by_step = {f"first_{s}": error.mean(where=batch.valid & (batch.step == s)) for s in range(len(sigmas))}
  first = error.mean(where=batch.valid)
  naming = caption_readers.naming_loss(readers, tokens_read, embeddings, batch.tokens, batch.colors, batch.background)
  return {"later": later, "second": second, "first": first, "naming": naming, **by_step}


def make_optimizer(training: DiTTraining) -> optax.GradientTransformation:
  """Muon on the matrices of the backbone's blocks, Adam on the rest; warm-up, constant, cosine to zero."""
  parts = PARTS if training.muon_on_text else ("backbone",)

  def schedule(peak: float) -> optax.Schedule:
    decay = max(1, int(training.steps * training.decay_fraction))
    warmup = min(100, training.steps // 10)
    pieces = [
      optax.linear_schedule(0.0, peak, warmup),
      optax.constant_schedule(peak),
      optax.cosine_decay_schedule(peak, decay),
    ]
    return optax.join_schedules(pieces, [warmup, max(warmup, training.steps - decay)])

  def dimensions(params):
    matrix = optax.contrib.MuonDimensionNumbers(1, 2)
    keys = lambda path: [getattr(step, "key", None) for step in path]
    is_block_matrix = lambda path: path[0] in parts and "blocks" in path and path[-1] == "kernel"
    return jax.tree_util.tree_map_with_path(lambda path, _: matrix if is_block_matrix(keys(path)) else None, params)

  muon = optax.contrib.muon(
    schedule(training.muon_learning_rate),
    adam_learning_rate=schedule(training.adam_learning_rate),
    muon_weight_dimension_numbers=dimensions,
    consistent_rms=0.2,
  )
  return optax.chain(optax.clip_by_global_norm(1.0), muon)


def make_update(
  graphdefs: dict[str, nnx.GraphDef],
  optimizer: optax.GradientTransformation,
  data: Dataset,
  training: DiTTraining,
  model: ModelConfig,
  config: BatchConfig,
  tokens_read: dict[str, list[int]],
) -> Callable[[Trainer, IntScalar], tuple[Trainer, dict[str, FloatScalar]]]:
  """The jitted training step, (trainer, step) to (trainer, loss terms)."""

  def loss(params, data, key):
    backbone, text = (nnx.merge(graphdefs[name], params[name]) for name in PARTS)
    terms = loss_terms(backbone, text, params["readers"], data, key, model, config, tokens_read)
    chunks = terms["later"] + terms["second"] + training.first_weight * terms["first"]
    return chunks + training.naming_weight * terms["naming"], terms

  @functools.partial(jax.jit, donate_argnums=(0,))
  def train_step(state: Trainer, step: jax.Array, data: Dataset):
    key = jax.random.fold_in(jax.random.key(training.seed), step)
    gradients, terms = jax.grad(loss, has_aux=True)(state.params, data, key)
    return trainer.improved(state, gradients, optimizer, step, training.ema_decay), terms

  return functools.partial(train_step, data=data)
