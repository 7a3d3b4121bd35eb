"""Batches for training the tiny causal DiT on encoded clips of the shapes world.

A batch has two parts:

  whole clips    7 chunks, each noisy at one of the four timesteps, with the clean chunks it will see when streaming
                 (first sink, window, now and then an older chunk), and with frame positions up to the longest video, so
                 that the model knows every position of a long rollout. A search adds sinks, which may be long
                 past: chunks of the clip whose keys are moved to older frames stand for them
  first chunks   the hard part: nothing in the context says what to draw. At the first two timesteps the noisy input
                 chooses the clip (`noise_coupling`); several noisy copies of a scene share its caption's keys

Everything is drawn inside `jit`, from one key per step, so a resumed run sees the batches it would have seen.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from streamt1_jax.config import ModelConfig
from streamt1_jax.data import shapes
from streamt1_jax.training import noise_coupling
from streamt1_jax.training.dataset import CHUNKS, Dataset

WINDOW = 2
"""Past chunks in the attention window, besides the sink."""
COUPLED_STEPS = 2
"""Timesteps whose noisy input chooses the clip. Noise added afresh at sigma = .9375 hides which of the start positions
the step before had drawn (their latents are about two standard deviations of the noise apart); at .8333 it does not."""
LONGEST_VIDEO = 120
"""Latent frames; clips are trained at positions up to it."""
ADDED_SINKS = 4
"""Most sinks that a search adds to the first: 15 latent frames of `SearchConfig.max_sink_frames` are five chunks."""
PERIOD = 16
"""Chunks after which the world repeats: it does after 64 frames, 16 latent frames, so after 16 chunks of any size."""


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """What is drawn for one optimiser step.

  Attributes:
    clips: whole clips, each of another scene.
    first_scenes: scenes whose first chunks are drawn.
    first_copies: first chunks of each of them.
    step_weights: how often first chunks train at each of the timesteps.
    context_noise: largest noise added to clean context, in standard deviations of the latent.
    omit_probability: how often a caption leaves out the size, and how often the speed.
    ambiguous_weight: how often a scene is drawn whose object and background both have colours that either may have ("a
      blue circle ... dark green"), where any other scene counts 1. Which is which is said by the order of words alone.
    extra_context_probability: how often a chunk sees an older chunk besides sink and window.
    added_sinks_probability: how often a chunk whose window is full sees 1 to 4 sinks from anywhere in a long past.
  """

  clips: int
  first_scenes: int
  first_copies: int
  step_weights: tuple[float, ...]
  context_noise: float
  omit_probability: float
  ambiguous_weight: float
  extra_context_probability: float
  added_sinks_probability: float


class ClipBatch(NamedTuple):
  """Whole clips; G clips of N chunks.

  Attributes:
    clean: chunks as context, slightly noisy.
    noisy: inputs.
    target: their velocities.
    step: index of each chunk's timestep.
    first_frame: absolute index of each chunk's first latent frame.
    visible: chunks that each chunk sees besides itself.
    valid: which entries of `visible` count.
    moved: latent frames by which the keys of a visible chunk move; None where all stay.
    tokens: captions.
  """

  clean: Float32[Array, "G N F C H W"]
  noisy: Float32[Array, "G N F C H W"]
  target: Float32[Array, "G N F C H W"]
  step: Int32[Array, "G N"]
  first_frame: Int32[Array, "G N"]
  visible: Int32[Array, "G N V"]
  valid: Bool[Array, "G N V"]
  moved: Int32[Array, "G N V"] | None
  tokens: Int32[Array, "G X"]


class FirstChunkBatch(NamedTuple):
  """First chunks; G scenes, R chunks each.

  Attributes:
    noisy: inputs.
    target: their velocities.
    step: index of each chunk's timestep.
    tokens: captions.
    attributes: attribute indices.
  """

  noisy: Float32[Array, "G R F C H W"]
  target: Float32[Array, "G R F C H W"]
  step: Int32[Array, "G R"]
  tokens: Int32[Array, "G X"]
  attributes: Int32[Array, "G 6"]


def draw_clips(key: jax.Array, data: Dataset, model: ModelConfig, config: BatchConfig, sigmas: jax.Array) -> ClipBatch:
  """Whole clips; `sigmas` [S] are the noise levels of the timesteps."""
  keys = iter(jax.random.split(key, 9))
  scene = _draw_scenes(next(keys), data.attributes, config.ambiguous_weight, config.clips)
  start = jax.random.randint(next(keys), (config.clips,), 0, data.clips.shape[1])
  clean = data.clips[scene, start]
  tokens, _, _ = _draw_captions(next(keys), data.tokens[scene], config.omit_probability)
  step = jax.random.randint(next(keys), clean.shape[:2], 0, sigmas.shape[0])
  noise = jax.random.normal(next(keys), clean.shape)
  level = jax.random.uniform(next(keys), (config.clips, 1, 1, 1, 1, 1), maxval=config.context_noise)
  for_every_clip = lambda draw, key, *rest: jax.vmap(draw)(jax.random.split(key, config.clips), *rest)
  visible, valid = for_every_clip(lambda key: draw_visible(key, config.extra_context_probability), next(keys))
  clean_in_context = clean + level * jax.random.normal(next(keys), clean.shape)
  first_frame = for_every_clip(lambda key: draw_first_frames(key, model), next(keys))
  moved = None
  if config.added_sinks_probability > 0:
    # Not one of the nine, so that all else is drawn as without added sinks.
    draw = lambda key, first_frame: draw_added_sinks(key, first_frame, model, config.added_sinks_probability)
    added = for_every_clip(draw, jax.random.split(key, 10)[9], first_frame)
    moved = jnp.concatenate([jnp.zeros_like(visible), added[1]], axis=2)
    visible, valid = (jnp.concatenate(pair, axis=2) for pair in ((visible, added[0]), (valid, added[2])))
  return ClipBatch(
    clean=clean_in_context,
    noisy=_mix(clean, noise, sigmas[step]),
    target=noise - clean,
    step=step,
    first_frame=first_frame,
    visible=visible,
    valid=valid,
    moved=moved,
    tokens=tokens,
  )


def draw_first_chunks(key: jax.Array, data: Dataset, config: BatchConfig, sigmas: jax.Array) -> FirstChunkBatch:
  """First chunks; `sigmas` [S] are the noise levels of the timesteps.

  At the coupled timesteps the input is made of any clip of the scene, as when the step before drew another one than
  the new noise will choose; the velocity is the one that leads to the clip that the input chooses.
  """
  keys = iter(jax.random.split(key, 6))
  shape = (config.first_scenes, config.first_copies)
  scene = _draw_scenes(next(keys), data.attributes, config.ambiguous_weight, config.first_scenes)
  tokens, omit_size, omit_speed = _draw_captions(next(keys), data.tokens[scene], config.omit_probability)
  step = jax.random.choice(next(keys), sigmas.shape[0], shape, p=jnp.asarray(config.step_weights))
  start = jax.random.randint(next(keys), shape, 0, data.first.shape[1])
  before = data.first[scene[:, None], start]
  noise = jax.random.normal(next(keys), before.shape)
  plain = _mix(before, noise, sigmas[step])
  shown = dict(zip(shapes.Attributes._fields, data.attributes[scene].T, strict=True))
  couple = jax.vmap(jax.vmap(noise_coupling.couple, in_axes=(0, None, None, None, None)))
  coupled = couple(plain, shown["size"], shown["speed"], omit_size, omit_speed)
  is_coupled = step < COUPLED_STEPS
  noisy = jnp.where(_like_chunks(is_coupled), coupled, plain)
  chosen = jax.vmap(jax.vmap(noise_coupling.start_index))(noisy)
  clean = data.first[scene[:, None], jnp.where(is_coupled, chosen, start)]
  return FirstChunkBatch(noisy, (noisy - clean) / _like_chunks(sigmas[step]), step, tokens, data.attributes[scene])


def draw_first_frames(key: jax.Array, model: ModelConfig) -> jax.Array:
  """[7] first latent frame of every chunk. Half of the clips continue much later than their first chunk.

  A delay of one or two periods is the true continuation; other delays teach the model not to rely on the sink for
  motion.
  """
  kind_key, delay_key = jax.random.split(key)
  longest = LONGEST_VIDEO // model.chunk_frames - CHUNKS
  anywhere = jax.random.randint(delay_key, (), 0, longest + 1) * model.chunk_frames
  period = PERIOD * model.chunk_frames
  delays = jnp.stack([jnp.int32(0), jnp.int32(period), jnp.int32(2 * period), anywhere])
  delay = delays[jax.random.choice(kind_key, 4, p=jnp.array([0.5, 0.15, 0.1, 0.25]))]
  chunk = jnp.arange(CHUNKS)
  return chunk * model.chunk_frames + jnp.where(chunk > 0, delay, 0)


def draw_visible(key: jax.Array, extra_probability: float) -> tuple[jax.Array, jax.Array]:
  """What each chunk sees besides itself: sink, window, sometimes an older one; [7, 4] indices and validity."""
  older_key, use_key = jax.random.split(key)
  chunk = jnp.arange(CHUNKS)
  oldest_window = chunk - WINDOW
  older = jnp.floor(1 + jax.random.uniform(older_key, (CHUNKS,)) * (oldest_window - 1)).astype(jnp.int32)
  use = jax.random.bernoulli(use_key, extra_probability, (CHUNKS,))
  visible = jnp.stack([jnp.zeros_like(chunk), chunk - 2, chunk - 1, older], axis=1)
  valid = jnp.stack([chunk > 0, chunk > 2, chunk > 1, use & (oldest_window > 1)], axis=1)
  return jnp.clip(visible, 0, CHUNKS - 1), valid


def draw_added_sinks(
  key: jax.Array, first_frame: jax.Array, model: ModelConfig, probability: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sinks that a search has added, from anywhere between the first sink and the window.

  Where the clip has an earlier chunk that shows what was there (the world repeats), it is that one. Elsewhere it is any
  earlier one of the clip: a sink shows what the object looks like, not where it goes next, and in a generated video its
  place is only nearly right. A later one would reach the chunks after it through the keys of their windows.

  Args:
    key: random key.
    first_frame: [7] int32 first latent frame of every chunk.
    model: sizes.
    probability: how often a chunk with a full window sees any.

  Returns:
    Chunks of the clip [7, 4] int32, latent frames by which each of them is moved [7, 4] int32, and validity [7, 4].
  """
  use_key, number_key, place_key, other_key = jax.random.split(key, 4)
  chunk = jnp.arange(CHUNKS)
  # Places are counted in chunks: 0 is the first sink, and the window begins WINDOW before the current one.
  possible = first_frame // model.chunk_frames - WINDOW - 1
  places = jnp.arange(1, LONGEST_VIDEO // model.chunk_frames)
  rank = jax.random.uniform(place_key, (CHUNKS, len(places)))
  place = 1 + jax.lax.top_k(jnp.where(places[None] <= possible[:, None], rank, -1.0), ADDED_SINKS)[1]
  number = jax.random.randint(number_key, (CHUNKS,), 1, ADDED_SINKS + 1)
  number = jnp.where(jax.random.bernoulli(use_key, probability, (CHUNKS,)), jnp.minimum(number, possible), 0)
  earlier = jax.random.randint(other_key, place.shape, 1, jnp.maximum(chunk, 2)[:, None])
  # Where the chunk itself is, less a number of periods, is what the clip has at `same`.
  same = (place - possible[:, None] - WINDOW - 1 + chunk[:, None]) % PERIOD
  source = jnp.where((same > 0) & (same < chunk[:, None]), same, earlier)
  valid = (jnp.arange(ADDED_SINKS)[None] < number[:, None]) & (chunk > WINDOW)[:, None]
  return source, place * model.chunk_frames - first_frame[source], valid


def _draw_scenes(key: jax.Array, attributes: jax.Array, ambiguous_weight: float, n: int) -> jax.Array:
  """[n] rows of `attributes` [M, 6]; see `BatchConfig.ambiguous_weight`."""
  color, background = (attributes[:, shapes.Attributes._fields.index(name)] for name in ("color", "background"))
  color_words = jnp.asarray([[name in background for background in shapes.BACKGROUNDS] for name in shapes.COLORS])
  ambiguous = color_words.any(axis=1)[color] & color_words.any(axis=0)[background]
  weights = jnp.where(ambiguous, ambiguous_weight, 1.0)
  return jax.random.choice(key, attributes.shape[0], (n,), p=weights / weights.sum())


def _draw_captions(key: jax.Array, tokens: jax.Array, probability: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One of each scene's four captions: ids [n, X] from tokens [n, 4, X], and whether size and speed are omitted [n]."""
  omit = jax.random.bernoulli(key, probability, (2, tokens.shape[0]))
  which = omit[0].astype(jnp.int32) + 2 * omit[1].astype(jnp.int32)
  return jax.vmap(lambda t, i: t[i])(tokens, which), omit[0], omit[1]


def _mix(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
  """(1 - sigma) clean + sigma noise, of chunks [G, N, F, C, H, W] and noise levels [G, N]."""
  sigma = _like_chunks(sigma)
  return (1.0 - sigma) * clean + sigma * noise


def _like_chunks(x: jax.Array) -> jax.Array:
  """[G, N] to [G, N, 1, 1, 1, 1]."""
  return x.reshape(*x.shape, 1, 1, 1, 1)
