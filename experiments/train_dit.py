"""Trains the tiny causal DiT and its text encoder on the shapes world, by teacher forcing at the four sampling
timesteps.

  python -m experiments.train_dit --flagfile=experiments/flagfiles/train_dit.flags --codec_dir=runs/vae/params
  --run_dir=runs/dit

Every batch has two parts, each with the velocity loss |v - (noise - x0)|^2 of flow matching:

* whole clips of 7 chunks, each chunk noisy at one of the four timesteps, with the clean chunks it will see when
streaming
  (first sink, window, now and then an older chunk in the place of an appended sink), and with frame positions up to the
  longest video, so that long rollouts meet no position they were not trained on;
* many first chunks alone, which are the hard part: nothing in the context says what to draw. Their noise at sigma = 1
is
  coupled to the clip (`streamt1_jax.data.noise_coupling`).

Captions leave out size and speed now and then. Muon on the blocks' matrices, Adam on the rest, exponential moving
average.

Written to `run_dir`: `checkpoints/` (to resume), `params/{backbone,text}` (final averages), `loss.csv`, `loss.png`,
`metrics.json`, `latents.npz` (the encoded clips, made once).
"""

import csv
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags
from etils import epath
from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.backbone.schedule import DenoisingSchedule, denoising_schedule
from streamt1_jax.backbone.teacher_forcing import chunk_velocity, clip_velocity
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ModelConfig, preset
from streamt1_jax.data import noise_coupling, shapes
from streamt1_jax.io.checkpoint import save_params
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.text.umt5 import UMT5Encoder

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "Where everything is written; an interrupted run resumes from it.", required=True)
flags.DEFINE_string("codec_dir", None, "Trained codec parameters.", required=True)
flags.DEFINE_string("tokenizer", "checkpoints/tiny/tokenizer.model", "Sentencepiece model.")
flags.DEFINE_string("preset", "tiny", "Model preset.")
flags.DEFINE_multi_integer("stage_steps", [400, 1300], "Optimiser steps of every stage.")
flags.DEFINE_multi_integer("clips", [4, 3], "Whole clips in a batch, per stage.")
flags.DEFINE_multi_integer("first_chunks", [64, 32], "First chunks in a batch, per stage.")
flags.DEFINE_integer("starts_per_scene", 3, "Encoded whole clips per scene, each from another start.")
flags.DEFINE_float("first_weight", 1.0, "Weight of the first chunks' loss beside the clips' loss.")
flags.DEFINE_float("context_noise", 0.1, "Largest noise added to clean context, in standard deviations.")
flags.DEFINE_float("omit_probability", 0.2, "How often a caption leaves out the size, and likewise the speed.")
flags.DEFINE_float("extra_context_probability", 0.3, "How often a chunk sees an older chunk besides sink and window.")
flags.DEFINE_float("muon_learning_rate", 0.01, "Peak learning rate of the blocks' matrices (Muon).")
flags.DEFINE_float("adam_learning_rate", 1.5e-3, "Peak learning rate of everything else (Adam).")
flags.DEFINE_float("decay_fraction", 0.45, "Share of the run, at its end, over which the learning rate falls to zero.")
flags.DEFINE_float("ema_decay", 0.998, "Decay of the weights' moving average.")
flags.DEFINE_multi_float(
  "sigma_weights", [0.4, 0.3, 0.2, 0.1], "How often first chunks train at each of the four timesteps."
)
flags.DEFINE_integer("checkpoint_every", 200, "Steps between checkpoints.")
flags.DEFINE_integer("log_every", 20, "Steps between rows of the loss curve.")
flags.DEFINE_integer("seed", 0, "Seed of initialisation and data.")

CHUNKS = 7
WINDOW = 2
"""Past chunks in the attention window, besides the sink."""


class Dataset(NamedTuple):
  """Encoded training clips; M scenes of the split "train".

  Attributes:
    attributes: [M, 6] int32 attribute indices, in the order of `shapes.Attributes`.
    clips: [M, starts_per_scene, 7, F, C, H, W] float32 latents of whole clips.
    first: [M, 16, F, C, H, W] float32 latents of first chunks from every start position.
    tokens: [M, 4, X] int32 captions: complete, without size, without speed, without both.
  """

  attributes: jax.Array
  clips: jax.Array
  first: jax.Array
  tokens: jax.Array


class Batch(NamedTuple):
  """Leading axis: clips for the first five fields, first chunks for the others."""

  clean: jax.Array
  clip_noise: jax.Array
  clip_step: jax.Array
  clip_frame: jax.Array
  clip_tokens: jax.Array
  first: jax.Array
  first_noise: jax.Array
  first_step: jax.Array
  first_tokens: jax.Array


def encode_scenes(codec, attributes: np.ndarray, starts: np.ndarray, num_frames: int) -> np.ndarray:
  """Latents `[n, F', C, H, W]` of clips with `attributes [n, 6]` from `starts [n, 2]`, in slices that fit in memory."""

  @jax.jit
  def encode(attributes, starts):
    scene = lambda a, s: shapes.Scene(*(a[i] for i in range(6)), start=s)
    frames = jax.vmap(lambda a, s: shapes.render(scene(a, s), jnp.arange(num_frames)))(attributes, starts)
    return jax.vmap(codec)(2.0 * frames - 1.0)

  slice_size = max(1, 640 // num_frames)
  padded = -len(attributes) % slice_size
  pad = lambda x: np.concatenate([x, np.repeat(x[-1:], padded, axis=0)])
  pieces = zip(*(np.split(pad(x), len(pad(x)) // slice_size) for x in (attributes, starts)), strict=True)
  return np.concatenate([np.asarray(encode(a, s)) for a, s in pieces])[: len(attributes)]


def caption_tokens(tokenizer: Tokenizer, attributes: np.ndarray) -> np.ndarray:
  """[M, 4, X] int32: every caption complete, without size, without speed, without both."""
  omissions = ((False, False), (True, False), (False, True), (True, True))
  ids = lambda a: [tokenizer(shapes.caption(*map(int, a), *omit)).ids for omit in omissions]
  return np.stack([np.stack(ids(a)) for a in attributes])


def build_dataset(model: ModelConfig, codec, cache: epath.Path) -> Dataset:
  """Encodes the training scenes, or reads them from `cache`."""
  attributes = np.asarray(shapes.scenes_in("train"), np.int32)
  tokens = caption_tokens(Tokenizer(FLAGS.tokenizer, model.text.max_len), attributes)
  if not cache.exists():
    rng = np.random.default_rng(FLAGS.seed)
    count, starts = FLAGS.starts_per_scene, shapes.START_POSITIONS
    frames = 1 + model.codec.temporal_stride * (CHUNKS * model.chunk_frames - 1)
    first_frames = 1 + model.codec.temporal_stride * (model.chunk_frames - 1)
    chosen = np.concatenate([starts[rng.permutation(len(starts))[:count]] for _ in attributes])
    clips = encode_scenes(codec, np.repeat(attributes, count, axis=0), chosen, frames)
    every = np.tile(starts, (len(attributes), 1))
    first = encode_scenes(codec, np.repeat(attributes, len(starts), axis=0), every, first_frames)
    with cache.open("wb") as file:
      np.savez(file, clips=clips, first=first)
  arrays = np.load(cache)
  shape = model.latent_shape
  clips = arrays["clips"].reshape(len(attributes), -1, CHUNKS, *shape)
  first = arrays["first"].reshape(len(attributes), -1, *shape)
  return Dataset(*map(jnp.asarray, (attributes, clips, first, tokens)))


def draw_first_frames(key: jax.Array, model: ModelConfig) -> jax.Array:
  """[7] first latent frame of every chunk. Half of the clips continue much later than their first chunk.

  The world repeats every 16 latent frames, so a delay of 48 or 96 frames is the true continuation; other delays teach
  the model not to rely on the sink for motion.
  """
  kind_key, delay_key = jax.random.split(key)
  longest = 120 // model.chunk_frames - CHUNKS
  anywhere = jax.random.randint(delay_key, (), 0, longest + 1) * model.chunk_frames
  delays = jnp.stack([jnp.int32(0), jnp.int32(48), jnp.int32(96), anywhere])
  delay = delays[jax.random.choice(kind_key, 4, p=jnp.array([0.5, 0.15, 0.1, 0.25]))]
  chunk = jnp.arange(CHUNKS)
  return chunk * model.chunk_frames + jnp.where(chunk > 0, delay, 0)


def draw_visible(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What each chunk sees besides itself: sink, window, sometimes an older one; [7, 4] indices and validity."""
  older_key, use_key = jax.random.split(key)
  chunk = jnp.arange(CHUNKS)
  oldest_window = chunk - WINDOW
  older = jnp.floor(1 + jax.random.uniform(older_key, (CHUNKS,)) * (oldest_window - 1)).astype(jnp.int32)
  use = jax.random.bernoulli(use_key, FLAGS.extra_context_probability, (CHUNKS,))
  visible = jnp.stack([jnp.zeros_like(chunk), chunk - 2, chunk - 1, older], axis=1)
  valid = jnp.stack([chunk > 0, chunk > 2, chunk > 1, use & (oldest_window > 1)], axis=1)
  return jnp.clip(visible, 0, CHUNKS - 1), valid


def draw_captions(key: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One of each scene's four captions: ids [n, X] from tokens [n, 4, X], and whether size and speed are omitted [n]."""
  omit = jax.random.bernoulli(key, FLAGS.omit_probability, (2, tokens.shape[0]))
  which = omit[0].astype(jnp.int32) + 2 * omit[1].astype(jnp.int32)
  return jax.vmap(lambda t, i: t[i])(tokens, which), omit[0], omit[1]


def draw_batch(key: jax.Array, data: Dataset, model: ModelConfig, clips: int, first_chunks: int) -> Batch:
  """A batch of so many whole clips and so many first chunks."""
  keys = iter(jax.random.split(key, 12))
  num_scenes = data.attributes.shape[0]
  scene = jax.random.randint(next(keys), (clips,), 0, num_scenes)
  start = jax.random.randint(next(keys), (clips,), 0, data.clips.shape[1])
  clean = data.clips[scene, start]
  clip_tokens, _, _ = draw_captions(next(keys), data.tokens[scene])

  scene = jax.random.randint(next(keys), (first_chunks,), 0, num_scenes)
  first_tokens, omit_size, omit_speed = draw_captions(next(keys), data.tokens[scene])
  attributes = data.attributes[scene]
  noise = jax.random.normal(next(keys), (first_chunks, *model.latent_shape))
  noise = jax.vmap(noise_coupling.couple)(noise, attributes[:, 0], attributes[:, 3], omit_size, omit_speed)
  start = jax.vmap(noise_coupling.start_index)(noise)
  step = jax.random.choice(next(keys), len(FLAGS.sigma_weights), (first_chunks,), p=jnp.asarray(FLAGS.sigma_weights))
  # Only the first step sees the noise that chose the clip; later ones see noise drawn afresh, as the sampler's are.
  fresh = jax.random.normal(next(keys), noise.shape)
  return Batch(
    clean=clean,
    clip_noise=jax.random.normal(next(keys), clean.shape),
    clip_step=jax.random.randint(next(keys), clean.shape[:2], 0, len(FLAGS.sigma_weights)),
    clip_frame=jax.vmap(draw_first_frames, in_axes=(0, None))(jax.random.split(next(keys), clips), model),
    clip_tokens=clip_tokens,
    first=data.first[scene, start],
    first_noise=jnp.where((step == 0).reshape(-1, 1, 1, 1, 1), noise, fresh),
    first_step=step,
    first_tokens=first_tokens,
  )


def noisy_and_target(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(1 - sigma) x0 + sigma noise, and the velocity noise - x0; `sigma` has x0's leading axes."""
  sigma = sigma.reshape(*sigma.shape, *(1,) * (x0.ndim - sigma.ndim))
  return (1.0 - sigma) * x0 + sigma * noise, noise - x0


def loss_terms(backbone: CausalWanDiT, text: UMT5Encoder, batch: Batch, key, schedule: DenoisingSchedule):
  """Mean squared velocity errors: of later chunks, of first chunks at each timestep (weighted by their share)."""
  context_key, level_key, visible_key = jax.random.split(key, 3)
  sigmas, features = jnp.asarray(schedule.sigmas, jnp.float32), jnp.asarray(schedule.features)

  def text_memory(ids):
    embeddings = text(ids, ids > 0) * (ids > 0)[:, None]
    return backbone.text_memory(embeddings)

  level = jax.random.uniform(level_key, (batch.clean.shape[0], 1, 1, 1, 1, 1), maxval=FLAGS.context_noise)
  context = batch.clean + level * jax.random.normal(context_key, batch.clean.shape)
  noisy, target = noisy_and_target(batch.clean, batch.clip_noise, sigmas[batch.clip_step])
  context_features = jnp.asarray(schedule.context_features)

  def clip(noisy, context, step, frame, ids, key):
    visible, valid = draw_visible(key)
    memory = text_memory(ids)
    return clip_velocity(backbone, noisy, context, features[step], context_features, frame, memory, visible, valid)

  visible_keys = jax.random.split(visible_key, batch.clean.shape[0])
  flow = jax.vmap(clip)(noisy, context, batch.clip_step, batch.clip_frame, batch.clip_tokens, visible_keys)
  # The first chunks of whole clips are not coupled to their noise, so they would teach ghosts: leave them out.
  later = jnp.square(flow - target)[:, 1:].mean()

  noisy, target = noisy_and_target(batch.first, batch.first_noise, sigmas[batch.first_step])
  first = lambda noisy, step, ids: chunk_velocity(backbone, noisy, features[step], text_memory(ids))
  flow = jax.vmap(first)(noisy, batch.first_step, batch.first_tokens)
  error = jnp.square(flow - target).mean(axis=(1, 2, 3, 4))
  by_step = {f"first_{s}": _mean_where(error, batch.first_step == s) for s in range(len(sigmas))}
  return {"later": later, "first": error.mean(), **by_step}


def _mean_where(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def make_optimizer() -> optax.GradientTransformation:
  """Muon on the matrices of stacked blocks, Adam on the rest; warm-up, constant, cosine to zero."""

  def schedule(peak: float) -> optax.Schedule:
    decay = int(sum(FLAGS.stage_steps) * FLAGS.decay_fraction)
    warmup = min(100, sum(FLAGS.stage_steps) // 10)
    pieces = [
      optax.linear_schedule(0.0, peak, warmup),
      optax.constant_schedule(peak),
      optax.cosine_decay_schedule(peak, decay),
    ]
    return optax.join_schedules(pieces, [warmup, max(warmup, sum(FLAGS.stage_steps) - decay)])

  def dimensions(params):
    matrix = optax.contrib.MuonDimensionNumbers(1, 2)
    is_block_matrix = lambda path, p: (
      any(getattr(k, "key", None) == "blocks" for k in path) and path[-1].key == "kernel"
    )
    return jax.tree_util.tree_map_with_path(lambda path, p: matrix if is_block_matrix(path, p) else None, params)

  muon = optax.contrib.muon(
    schedule(FLAGS.muon_learning_rate),
    adam_learning_rate=schedule(FLAGS.adam_learning_rate),
    muon_weight_dimension_numbers=dimensions,
    consistent_rms=0.2,
  )
  return optax.chain(optax.clip_by_global_norm(1.0), muon)


class Trainer(NamedTuple):
  """What a training step changes; parameters are {"backbone", "text"} nested dicts."""

  params: dict
  average: dict
  optimizer: optax.OptState


def make_train_step(graphdefs: dict, optimizer, schedule: DenoisingSchedule, model: ModelConfig):
  def loss(params, batch, key):
    backbone, text = nnx.merge(graphdefs["backbone"], params["backbone"]), nnx.merge(graphdefs["text"], params["text"])
    terms = loss_terms(backbone, text, batch, key, schedule)
    return terms["later"] + FLAGS.first_weight * terms["first"], terms

  @functools.partial(jax.jit, donate_argnums=(0,), static_argnames=("clips", "first_chunks"))
  def train_step(trainer: Trainer, step: jax.Array, data: Dataset, *, clips: int, first_chunks: int):
    batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(FLAGS.seed), step))
    batch = draw_batch(batch_key, data, model, clips, first_chunks)
    gradients, terms = jax.grad(loss, has_aux=True)(trainer.params, batch, loss_key)
    updates, state = optimizer.update(gradients, trainer.optimizer, trainer.params)
    params = optax.apply_updates(trainer.params, updates)
    decay = jnp.minimum(FLAGS.ema_decay, (1.0 + step) / (10.0 + step))
    average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, trainer.average, params)
    return Trainer(params, average, state), terms

  return train_step


def load_encoder(model: ModelConfig, codec_dir: str):
  """Encoder of one clip, frames [T, height, width, 3] in [-1, 1] to latents, from what `train_vae` wrote."""
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: VideoCodec(model.codec, rngs=nnx.Rngs(0))), nnx.Param)
  with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore(epath.Path(codec_dir).resolve(), nnx.to_pure_dict(abstract))
  return nnx.merge(graphdef, params).encoder.encode


def init_modules(model: ModelConfig) -> tuple[dict, dict]:
  """Graph definitions and fresh parameters of backbone and text encoder."""
  modules = {
    "backbone": CausalWanDiT(model, nnx.Rngs(FLAGS.seed)),
    "text": UMT5Encoder(model.text, nnx.Rngs(FLAGS.seed + 1)),
  }
  # The published initialisation: a head of zeros predicts zero velocity at first.
  modules["backbone"].head.kernel[...] *= 0.0
  split = {name: nnx.split(module, nnx.Param) for name, module in modules.items()}
  return {name: g for name, (g, _) in split.items()}, {name: nnx.to_pure_dict(p) for name, (_, p) in split.items()}


def log_row(run_dir: epath.Path, step: int, terms: dict[str, jax.Array], seconds_per_step: float) -> None:
  row = {"step": step, **{name: round(float(value), 5) for name, value in terms.items()}}
  print("  ".join(f"{name} {value}" for name, value in row.items()), f" {seconds_per_step:.3f} s/step", flush=True)
  path = run_dir / "loss.csv"
  is_new = not path.exists()
  with path.open("a") as file:
    writer = csv.DictWriter(file, row)
    if is_new:
      writer.writeheader()
    writer.writerow(row)


def plot_curve(run_dir: epath.Path) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  with (run_dir / "loss.csv").open() as file:
    # A resumed run repeats the steps after its checkpoint; the later row of a step counts.
    rows = {int(row["step"]): row for row in csv.DictReader(file)}
  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  for name in ("later", "first_0", "first_1", "first_2", "first_3"):
    axes.plot(list(rows), [float(row[name]) for row in rows.values()], label=name)
  axes.set(xlabel="step", ylabel="velocity error", yscale="log", title="tiny causal DiT")
  axes.legend()
  figure.savefig(run_dir / "loss.png", dpi=120)


def train(trainer: Trainer, train_step, data: Dataset, run_dir: epath.Path) -> Trainer:
  """Runs the remaining steps."""
  options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=FLAGS.checkpoint_every)
  with ocp.CheckpointManager((run_dir / "checkpoints").resolve(), options=options) as checkpoints:
    start = checkpoints.latest_step() or 0
    if start:
      trainer = checkpoints.restore(start, args=ocp.args.StandardRestore(trainer))
      print(f"resumed at step {start}", flush=True)
    began = time.time()
    for step in range(start, sum(FLAGS.stage_steps)):
      stage = int(np.searchsorted(np.cumsum(FLAGS.stage_steps), step, side="right"))
      sizes = {"clips": FLAGS.clips[stage], "first_chunks": FLAGS.first_chunks[stage]}
      trainer, terms = train_step(trainer, jnp.asarray(step), data, **sizes)
      if (step + 1) % FLAGS.log_every == 0:
        log_row(run_dir, step + 1, terms, (time.time() - began) / (step + 1 - start))
      checkpoints.save(step + 1, args=ocp.args.StandardSave(trainer), force=step + 1 == sum(FLAGS.stage_steps))
  return trainer


def main(_) -> None:
  run_dir = epath.Path(FLAGS.run_dir)
  run_dir.mkdir(parents=True, exist_ok=True)
  (run_dir / "flags.txt").write_text(FLAGS.flags_into_string())
  model = preset(FLAGS.preset)
  graphdefs, params = init_modules(model)
  print({name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}, flush=True)
  data = build_dataset(model, load_encoder(model, FLAGS.codec_dir), run_dir / "latents.npz")
  optimizer = make_optimizer()
  trainer = Trainer(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
  schedule = denoising_schedule(model.schedule, model.backbone.freq_dim)
  trainer = train(trainer, make_train_step(graphdefs, optimizer, schedule, model), data, run_dir)
  for name, average in trainer.average.items():
    save_params(run_dir / "params" / name, average)
  plot_curve(run_dir)


if __name__ == "__main__":
  app.run(main)
