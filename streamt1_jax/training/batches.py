"""Batches for training the tiny causal DiT on encoded clips of the shapes world.

A batch has three parts:

  whole clips    chunks, each noisy at one of the four timesteps, with the clean chunks it will see when streaming
                 (first sink, window, now and then an older chunk), and with the distances of the longest videos. Where
                 the caption changes, the past is what the recache of a search makes of it. A search adds sinks, which
                 may be long past: chunks of the clip that are moved to older frames stand for them
  second chunks  of many clips. They see a single past chunk, which is all that shows motion: the model takes longer to
                 learn them
  first chunks   the hard part: nothing in the context says what to draw. At the first two timesteps the noisy input
                 chooses the clip (`noise_coupling`); several noisy copies of a scene share its caption's keys

Everything is drawn inside `jit`, from one key per step, so a resumed run sees the batches it would have seen.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray, Shaped

from streamt1_jax.config import ModelConfig
from streamt1_jax.training import noise_coupling, world_clips
from streamt1_jax.training.dataset import CHUNKS, OMISSIONS, Dataset
from streamt1_jax.training.teacher_forcing import Seen
from streamt1_jax.typing import HostArray

WINDOW = 2
"""Past chunks in the attention window, besides the sink."""
ROWS = CHUNKS - 1
"""Noisy chunks of a clip; the first one is no part of them, or they come again where the caption changes."""
COUPLED_STEPS = 2
"""Timesteps whose noisy input chooses the clip. Noise added afresh at sigma = .9375 hides which of the start positions
the step before had drawn (their latents are about two standard deviations of the noise apart); at .8333 it does not."""
LONGEST_VIDEO = 120
"""Latent frames of a video of 30 seconds; clips are trained at all distances in it."""
LONGEST_DISTANCE = 1000
"""Latent frames; and now and then at distances up to it, as in a video of four minutes."""
PERIODS_LATER = (0.6, 0.15, 0.1, 0.15)
"""How often a clip goes on in the same period of the world, one later, two later, or any number."""
ADDED_SINKS = 4
"""Most sinks that a search adds to the first: 15 latent frames of `SearchConfig.max_sink_frames` are five chunks."""


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """What is drawn for one optimiser step.

  Attributes:
    clips: whole clips, each of another scene.
    second_clips: clips whose second chunks are drawn.
    second_copies: noisy copies of each of them.
    first_scenes: scenes whose first chunks are drawn.
    first_copies: first chunks of each of them.
    step_weights: how often first chunks train at each of the timesteps.
    context_noise: largest noise added to clean context, in standard deviations of the latent.
    omit_probability: how often a caption leaves out a size or a speed.
    ambiguous_weight: how often a scene is drawn whose object and background both have colours that either may have ("a
      blue circle ... dark green"), where any other scene counts 1. Which is which is said by the order of words alone.
    extra_context_probability: how often a chunk sees an older chunk besides sink and window.
    added_sinks_probability: how often a chunk whose window is full sees 1 to 4 sinks from anywhere in a long past.
    rollout_probability: how often the past of a whole clip is one that the model made.
  """

  clips: int
  second_clips: int
  second_copies: int
  first_scenes: int
  first_copies: int
  step_weights: tuple[float, ...]
  context_noise: float
  omit_probability: float
  ambiguous_weight: float
  extra_context_probability: float
  added_sinks_probability: float
  rollout_probability: float


class ClipKind(NamedTuple):
  """What a clip shows of its past; fields of `TrainingClip`, each with the axes of the clips.

  Attributes:
    switch: chunk with which the caption changes, or 0.
    late: whether the first chunk is of an older caption.
    gap: chunks left out behind the first one.
  """

  switch: Int32[Array, "*G"]
  late: Bool[Array, "*G"]
  gap: Int32[Array, "*G"]


class ClipBatch(NamedTuple):
  """Clips; G clips of N chunks, R noisy ones, with P captions each.

  Attributes:
    clean: chunks as context, slightly noisy.
    noisy: inputs.
    target: their velocities.
    step: index of each noisy chunk's timestep.
    place: which chunk of the clip each noisy one is.
    seen: what every chunk sees, clean ones first, then noisy ones.
    tokens: captions, as `seen.prompt` counts them. Those of a whole clip are of its end and of its first chunk.
  """

  clean: Float32[Array, "G N F C H W"]
  noisy: Float32[Array, "G R F C H W"]
  target: Float32[Array, "G R F C H W"]
  step: Int32[Array, "G R"]
  place: Int32[Array, "G R"]
  seen: Seen
  tokens: Int32[Array, "G P X"]


class FirstChunkBatch(NamedTuple):
  """First chunks; G scenes, R chunks each.

  Attributes:
    noisy: inputs.
    target: their velocities.
    step: index of each chunk's timestep.
    valid: whether the chunk counts.
    tokens: captions.
    colors: colours of both objects.
    background: background.
  """

  noisy: Float32[Array, "G R F C H W"]
  target: Float32[Array, "G R F C H W"]
  step: Int32[Array, "G R"]
  valid: Bool[Array, "G R"]
  tokens: Int32[Array, "G X"]
  colors: Int32[Array, "G 2"]
  background: Int32[Array, " G"]


def draw_clips(
  key: PRNGKeyArray, data: Dataset, model: ModelConfig, config: BatchConfig, sigmas: Float[Array, " S"]
) -> ClipBatch:
  """Whole clips; `sigmas` are the noise levels of the timesteps."""
  keys = iter(jax.random.split(key, 10))
  clip = jax.random.randint(next(keys), (config.clips,), 0, data.clips.shape[0])
  clip, past = _draw_pasts(next(keys), data, clip, config.rollout_probability)
  clean, kind = data.clips[clip].astype(jnp.float32), ClipKind(data.switch[clip], data.late[clip], data.gap[clip])
  tokens, _ = _draw_captions(next(keys), data.tokens[clip], config.omit_probability)
  for_every_clip = lambda draw, key, *rest: jax.vmap(draw)(jax.random.split(key, config.clips), *rest)
  place = for_every_clip(draw_places, next(keys), kind)
  step = jax.random.randint(next(keys), place.shape, 0, sigmas.shape[0])
  chosen = jax.vmap(lambda clip, place: clip[place])(clean, place)
  noise = jax.random.normal(next(keys), chosen.shape)
  in_context = _noisy_context(next(keys), next(keys), past, config)
  odds = config.extra_context_probability, config.added_sinks_probability
  draw = lambda key, kind, place: draw_seen(key, kind, place, model, *odds)
  return ClipBatch(
    clean=in_context,
    noisy=_mix(chosen, noise, sigmas[step]),
    target=noise - chosen,
    step=step,
    place=place,
    seen=for_every_clip(draw, next(keys), kind, place),
    tokens=jnp.stack([tokens, data.sink_tokens[clip]], axis=1),
  )


def second_follows(data: Dataset) -> Bool[HostArray, " N"]:
  """Clips in which the second chunk follows the first one, under the same caption."""
  return ~data.late & (data.switch != 1) & (data.gap == 0)


def draw_second_chunks(
  key: PRNGKeyArray, data: Dataset, model: ModelConfig, config: BatchConfig, sigmas: Float[Array, " S"]
) -> ClipBatch:
  """Second chunks, each with the first chunk of its clip; of clips in which they follow each other.

  Args:
    key: random key.
    data: the encoded clips.
    model: sizes.
    config: how many.
    sigmas: noise levels of the timesteps.
  """
  keys = iter(jax.random.split(key, 6))
  follows = second_follows(data)
  shape = (config.second_clips, config.second_copies)
  clip = jax.random.choice(next(keys), len(follows), shape[:1], p=follows / follows.sum())
  clean, second = (data.clips[clip, index : index + 1].astype(jnp.float32) for index in (0, 1))
  last, _ = _draw_captions(next(keys), data.tokens[clip], config.omit_probability)
  tokens = jnp.where((data.switch[clip] > 0)[:, None], data.sink_tokens[clip], last)
  step = jax.random.randint(next(keys), shape, 0, sigmas.shape[0])
  noise = jax.random.normal(next(keys), (*shape, *second.shape[2:]))
  rows = jnp.zeros((config.second_clips, 1 + config.second_copies), jnp.int32)
  is_noisy = jnp.arange(rows.shape[1]) > 0
  return ClipBatch(
    clean=_noisy_context(next(keys), next(keys), clean, config),
    noisy=_mix(second, noise, sigmas[step]),
    target=noise - second,
    step=step,
    place=jnp.ones(shape, jnp.int32),
    seen=Seen(
      chunks=rows[..., None],
      valid=jnp.broadcast_to(is_noisy[:, None], (*rows.shape, 1)),
      distance=jnp.broadcast_to(jnp.where(is_noisy, model.chunk_frames, 0)[:, None], (*rows.shape, 1)),
      prompt=rows,
    ),
    tokens=tokens[:, None],
  )


def draw_first_chunks(
  key: PRNGKeyArray, data: Dataset, config: BatchConfig, sigmas: Float[Array, " S"]
) -> FirstChunkBatch:
  """First chunks; `sigmas` are the noise levels of the timesteps.

  At the coupled timesteps the input is made of any clip of the scene, as when the step before drew another one than
  the new noise will choose; the velocity is the one that leads to the clip that the input chooses.
  """
  keys = iter(jax.random.split(key, 6))
  shape = (config.first_scenes, config.first_copies)
  weights = jnp.where(data.ambiguous, config.ambiguous_weight, 1.0)
  scene = jax.random.choice(next(keys), len(weights), shape[:1], p=weights / weights.sum())
  tokens, omitted = _draw_captions(next(keys), data.first_tokens[scene], config.omit_probability)
  step = jax.random.choice(next(keys), sigmas.shape[0], shape, p=jnp.asarray(config.step_weights))
  which = jax.random.randint(next(keys), (2, *shape), 0, data.first.shape[1])
  clean, before = (data.first[scene[:, None], w].astype(jnp.float32) for w in which)
  is_coupled = step < COUPLED_STEPS
  before = jnp.where(_like_chunks(is_coupled), before, clean)
  noise = jax.random.normal(next(keys), before.shape)
  roll = jax.vmap(jax.vmap(noise_coupling.rolled))
  rolled, matches = roll(noise, before, sigmas[step], data.first_start[scene[:, None], which[0]])
  plain = _mix(before, jnp.where(_like_chunks(is_coupled), rolled, noise), sigmas[step])
  couple = jax.vmap(jax.vmap(noise_coupling.couple, in_axes=(0, None, None)))
  noisy = jnp.where(_like_chunks(is_coupled), couple(plain, data.values[scene], omitted.reshape(-1, 2, 2)), plain)
  target = (noisy - clean) / _like_chunks(sigmas[step])
  valid = matches | ~is_coupled
  return FirstChunkBatch(noisy, target, step, valid, tokens, data.colors[scene], data.background[scene])


def first_learned(kind: ClipKind) -> Int32[Array, "*G"]:
  """The first chunk of a clip that is learned.

  It is the one with which the caption changes. Where the first chunk is from long ago, those after it have not enough
  of a past.
  """
  return jnp.maximum(kind.switch, jnp.where(kind.late | (kind.gap > 0), WINDOW + 1, 1))


def draw_places(key: PRNGKeyArray, kind: ClipKind) -> Int32[Array, " R"]:
  """Which chunks are noisy: all that have a past; or, where the caption changes, those from the change on.

  Then half of them are the first one, which alone must draw what changes.
  """
  first, row, switch = first_learned(kind), jnp.arange(ROWS), kind.switch
  turn = jax.random.randint(key, (), 0, CHUNKS)
  # Where there are fewer chunks than rows, some come again; which ones is drawn.
  all_in_turn = first + (row + jnp.where(first > 1, turn, 0)) % (CHUNKS - first)
  after = switch + 1 + (row + turn) % (CHUNKS - 1 - switch)
  return jnp.where(switch > 0, jnp.where(row < ROWS // 2, switch, after), all_in_turn)


def draw_seen(
  key: PRNGKeyArray,
  kind: ClipKind,
  place: Int32[Array, " R"],
  model: ModelConfig,
  extra_context_probability: float,
  added_sinks_probability: float,
) -> Seen:
  """What the chunks of a clip see, [N + R, V] clean ones and then noisy ones."""
  frame_key, visible_key, added_key = jax.random.split(key, 3)
  first_frame = draw_first_frames(frame_key, kind, model)
  chunks, valid = draw_visible(visible_key, extra_context_probability)
  moved = jnp.zeros_like(chunks)
  if added_sinks_probability > 0:
    added = draw_added_sinks(added_key, first_frame, model, added_sinks_probability)
    chunks, moved, valid = (jnp.concatenate(pair, axis=1) for pair in zip((chunks, moved, valid), added, strict=True))
  together, together_valid = recached(kind, chunks.shape[1])
  is_recached = together_valid.any(axis=1, keepdims=True)
  clean = (
    jnp.where(is_recached, together, chunks),
    jnp.where(is_recached, together_valid, valid),
    jnp.where(is_recached, 0, moved),
  )
  chunks, valid, moved = (jnp.concatenate([c, x[place]]) for c, x in zip(clean, (chunks, valid, moved), strict=True))
  own = jnp.concatenate([first_frame, first_frame[place]])
  distance = own[:, None] - first_frame[chunks] - moved
  # The sink from long ago was made under its own caption.
  prompt = jnp.zeros(len(own), jnp.int32).at[0].set(kind.late.astype(jnp.int32))
  return Seen(chunks, valid, distance, prompt)


def recached(kind: ClipKind, width: int) -> tuple[Int32[Array, "7 {width}"], Bool[Array, "7 {width}"]]:
  """What the chunks before a change of caption see when all of them are computed anew: all others.

  A sink from long ago is kept: it is not computed anew, and all others see it.

  Returns:
    The chunks and their validity; chunks after the change, and those of a clip without one, have none.
  """
  chunk = jnp.arange(CHUNKS)
  other = jnp.arange(world_clips.KEPT_CHUNKS + 1)
  before = (chunk < kind.switch) & ((chunk > 0) | ~kind.late)
  valid = before[:, None] & (other < kind.switch)[None] & (other[None] != chunk[:, None])
  pad = ((0, 0), (0, width - len(other)))
  return jnp.pad(jnp.broadcast_to(other, valid.shape), pad), jnp.pad(valid, pad)


def draw_first_frames(key: PRNGKeyArray, kind: ClipKind, model: ModelConfig) -> Int32[Array, "7"]:
  """The first latent frame of every chunk. Most clips continue much later than their first chunk.

  Under one caption it is later by the gap and some periods, so that the sink tells where objects must be: that is how a
  video finds an object again that it has lost. A sink of an older caption tells it no more, and may be any time away.
  Before a change of caption that comes early, nothing has left the window.
  """
  kind_key, delay_key = jax.random.split(key)
  period = world_clips.PERIOD * model.chunk_frames
  below = lambda limit: jax.random.randint(delay_key, (), 0, limit)
  anywhere = lambda frames: below(frames // model.chunk_frames - CHUNKS + 1) * model.chunk_frames
  older = jnp.stack([anywhere(LONGEST_VIDEO), anywhere(LONGEST_DISTANCE)])
  older = older[jax.random.choice(kind_key, 2, p=jnp.array([0.7, 0.3]))]
  periods = jnp.stack([0, 1, 2, below(LONGEST_DISTANCE // period - 1)])
  same = kind.gap * model.chunk_frames + period * jax.random.choice(kind_key, periods, p=jnp.array(PERIODS_LATER))
  delay = jnp.where(kind.late, older, jnp.where(kind.switch > 0, 0, same))
  chunk = jnp.arange(CHUNKS)
  return chunk * model.chunk_frames + jnp.where(chunk > 0, delay, 0)


def draw_visible(key: PRNGKeyArray, extra_probability: float) -> tuple[Int32[Array, "7 4"], Bool[Array, "7 4"]]:
  """What each chunk sees besides itself: sink, window, sometimes an older one; indices and validity."""
  older_key, use_key = jax.random.split(key)
  chunk = jnp.arange(CHUNKS)
  oldest_window = chunk - WINDOW
  older = jnp.floor(1 + jax.random.uniform(older_key, (CHUNKS,)) * (oldest_window - 1)).astype(jnp.int32)
  use = jax.random.bernoulli(use_key, extra_probability, (CHUNKS,))
  visible = jnp.stack([jnp.zeros_like(chunk), chunk - 2, chunk - 1, older], axis=1)
  valid = jnp.stack([chunk > 0, chunk > 2, chunk > 1, use & (oldest_window > 1)], axis=1)
  return jnp.clip(visible, 0, CHUNKS - 1), valid


def draw_added_sinks(
  key: PRNGKeyArray, first_frame: Int32[Array, "7"], model: ModelConfig, probability: float
) -> tuple[Int32[Array, "7 4"], Int32[Array, "7 4"], Bool[Array, "7 4"]]:
  """Sinks that a search has added, from anywhere between the first sink and the window.

  Where the clip has an earlier chunk that shows what was there (the world repeats), it is that one. Elsewhere it is any
  earlier one of the clip: a sink shows what the object looks like, not where it goes next, and in a generated video its
  place is only nearly right. A later one would reach the chunks after it through the keys of their windows.

  Args:
    key: random key.
    first_frame: first latent frame of every chunk.
    model: sizes.
    probability: how often a chunk with a full window sees any.

  Returns:
    Chunks of the clip, latent frames by which each of them is moved, and validity.
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
  same = (place - possible[:, None] - WINDOW - 1 + chunk[:, None]) % world_clips.PERIOD
  source = jnp.where((same > 0) & (same < chunk[:, None]), same, earlier)
  valid = (jnp.arange(ADDED_SINKS)[None] < number[:, None]) & (chunk > WINDOW)[:, None]
  return source, place * model.chunk_frames - first_frame[source], valid


def _draw_captions(
  key: jax.Array, tokens: Int32[Array, "G 16 X"], probability: float
) -> tuple[Int32[Array, "G X"], Bool[Array, "G 4"]]:
  """One of each scene's captions, and what it omits."""
  omit = jax.random.bernoulli(key, probability, (tokens.shape[0], 4))
  which = (omit[:, None] == jnp.asarray(OMISSIONS)[None]).all(axis=2).argmax(axis=1)
  return jax.vmap(lambda t, i: t[i])(tokens, which), omit


def _draw_pasts(
  key: jax.Array, data: Dataset, clip: Int32[Array, " G"], probability: float
) -> tuple[Int32[Array, " G"], Float32[Array, "G N F C H W"]]:
  """Some of the clips exchanged for ones that the model made; and their chunks as context."""
  if probability == 0:
    return clip, data.clips[clip].astype(jnp.float32)
  is_made = jax.random.bernoulli(key, probability, clip.shape)
  made = clip % data.made.shape[0]
  clip = jnp.where(is_made, made, clip)
  past = jnp.where(is_made.reshape(-1, 1, 1, 1, 1, 1), data.made[made], data.clips[clip])
  return clip, past.astype(jnp.float32)


def _noisy_context(
  level_key: jax.Array, key: jax.Array, clean: Float32[Array, "G N F C H W"], config: BatchConfig
) -> Float32[Array, "G N F C H W"]:
  """Chunks as context, with noise of a level drawn for every clip."""
  level = jax.random.uniform(level_key, (clean.shape[0], 1, 1, 1, 1, 1), maxval=config.context_noise)
  return clean + level * jax.random.normal(key, clean.shape)


def _mix(
  clean: Float32[Array, "G copies F C H W"], noise: Float32[Array, "G R F C H W"], sigma: Float[Array, "G R"]
) -> Float32[Array, "G R F C H W"]:
  """(1 - sigma) clean + sigma noise."""
  sigma = _like_chunks(sigma)
  return (1.0 - sigma) * clean + sigma * noise


def _like_chunks(x: Shaped[Array, "G R"]) -> Shaped[Array, "G R 1 1 1 1"]:
  return x.reshape(*x.shape, 1, 1, 1, 1)
