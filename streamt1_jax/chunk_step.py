"""One chunk of the search: evict, draw, denoise, score, prune, commit. A pure function from state to state.

  memory ── evict & route ── memory'                                      every beam
  noise  ── fuse with fresh noise ── denoise, memory' read only ── x0     every candidate
  x0     ── decode ── image reward, video reward ── hybrid score          every candidate
  top-k over all candidates ── gather beams ── clean pass ── commit       winners only

Functions are written for one beam or one candidate; `chunk_step` vmaps them. The memory is shared by a beam's candidates.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from streamt1_jax import memory_sinking, noise_propagation, reward_pruning
from streamt1_jax.backbone import attention
from streamt1_jax.backbone.dit import TextMemory
from streamt1_jax.backbone.rope import RotaryTables, rotary_tables
from streamt1_jax.backbone.schedule import DenoisingSchedule, denoising_schedule
from streamt1_jax.codec.base import Codec
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.noise_propagation import DrawNoise
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, ImageReward, VideoReward
from streamt1_jax.state import Beam, CandidateTrace, ChunkTrace, Condition, SearchState, beam_axes
from streamt1_jax.typing import Latents, Params

_VIEW_AXES = attention.MemoryView(k=1, v=1, count=0, trip_count=None)


@dataclasses.dataclass(frozen=True)
class Models:
  """The static half of everything a chunk step calls; the arrays are in `params` under the same names.

  Attributes:
    config: sizes.
    backbone: graph definition of the causal DiT.
    codec: decoder.
    image_reward: scores a chunk.
    video_reward: scores the sliding window.
    draw_noise: seed to noise.
  """

  config: ModelConfig
  backbone: nnx.GraphDef
  codec: Codec
  image_reward: ImageReward
  video_reward: VideoReward
  draw_noise: DrawNoise

  @functools.cached_property
  def schedule(self) -> DenoisingSchedule:
    return denoising_schedule(self.config.schedule, self.config.backbone.freq_dim)

  @functools.cached_property
  def rotary(self) -> RotaryTables:
    c, patch = self.config, self.config.backbone.patch_size
    return rotary_tables(c.backbone.head_dim, c.backbone.max_frames, c.latent_height // patch, c.latent_width // patch)


class Winner(NamedTuple):
  """What a surviving candidate brings into its beam: latents, noise and seed, scores, flags, frames and decoder state."""

  latents: jax.Array
  noise: jax.Array
  seed: jax.Array
  short: jax.Array
  long: jax.Array
  flags: reward_pruning.Flags
  frames: jax.Array | None
  codec: Any


def past_capacity(models: Models, search: SearchConfig) -> int:
  """Past frames kept for the video reward."""
  return (search.sliding_window - 1) * models.codec.num_frames(models.config.chunk_frames, first=False)


def init_state(models: Models, params: Params, search: SearchConfig, seed: int) -> SearchState:
  """State before the first chunk: `top_k` equal, empty beams. The memory takes the backbone's dtype."""
  model, codec = models.config, models.codec
  dtype = jax.tree.leaves(params["backbone"])[0].dtype

  def empty_beam() -> Beam:
    window = (search.sliding_window, *model.latent_shape)
    return Beam(
      memory=memory_sinking.empty_memory(model, search, dtype),
      noise=jnp.zeros(model.latent_shape),
      seed=jnp.int32(0),
      history=reward_pruning.empty_history(search),
      past=jnp.zeros((past_capacity(models, search), *codec.frame_shape()), codec.frame_dtype()),
      codec=codec.init_state(params["codec"]),
      latents=jnp.zeros(window) if search.reward_decode == "scratch" else None,
    )

  axes = beam_axes(jax.eval_shape(empty_beam))
  beams = jax.vmap(empty_beam, out_axes=axes, axis_size=search.top_k)()
  return SearchState(jnp.int32(0), jnp.asarray(seed, jnp.int32), jnp.int32(0), beams)


def velocity(
  models: Models,
  params: Params,
  latents: Latents,
  features: jax.Array,
  first_frame: jax.Array,
  text: TextMemory,
  memory: attention.MemoryView,
):
  """Velocity of one chunk at one timestep, and the keys and values it would commit; `features` is [freq_dim]."""
  features = jnp.broadcast_to(features[None], (latents.shape[0], *features.shape))
  attend = lambda q, k, v, layer: attention.attend_with_memory(q, k, v, memory, layer)
  return nnx.merge(models.backbone, params["backbone"])(latents, features, first_frame, text, attend)


def denoise(models: Models, params: Params, noise, renoise, first_frame, text: TextMemory, memory) -> jax.Array:
  """Denoises one candidate: `x0 = x - sigma v`, then `x = (1 - sigma') x0 + sigma' n` with fresh n, S times.

  Args:
    noise: [F, C, H, W] starting noise.
    renoise: [S - 1, F, C, H, W] noise added back after every step but the last.
    first_frame: int32 scalar, absolute index of the chunk's first latent frame.
    text: the prompt's keys and values.
    memory: what the chunk can see.

  Returns:
    [S, F, C, H, W] float32, the x0 prediction of every step; the last one is the chunk.
  """
  s = models.schedule
  renoise = jnp.concatenate([renoise, jnp.zeros_like(noise)[None]])
  as_float = lambda x: jnp.asarray(x, jnp.float32)

  def step(x, inputs):
    features, sigma, next_sigma, fresh = inputs
    flow, _ = velocity(models, params, x, features, first_frame, text, memory)
    x0 = x - sigma * flow
    return (1.0 - next_sigma) * x0 + next_sigma * fresh, x0

  _, x0 = jax.lax.scan(step, noise, (s.features, as_float(s.sigmas), as_float(s.next_sigmas), renoise))
  return x0


def _scores(models: Models, params, condition: Condition, chunk, window: FrameWindow, info: CandidateInfo):
  """Image and video score of one candidate, float32 scalars."""
  short = models.image_reward(params["image_reward"], condition.image_reward, chunk, info)
  long = models.video_reward(params["video_reward"], condition.video_reward, window, info)
  return short.astype(jnp.float32), long.astype(jnp.float32)


def _append_latents(latents: jax.Array, chunk: Latents, chunk_index: jax.Array) -> jax.Array:
  """Adds a chunk to the left-aligned window [W, F, C, H, W]; when it is full the oldest chunk leaves."""
  window = latents.shape[0]
  latents = jnp.where(chunk_index < window, latents, jnp.roll(latents, -1, axis=0))
  return jax.lax.dynamic_update_index_in_dim(latents, chunk, jnp.minimum(chunk_index, window - 1), 0)


def _scores_from_scratch(models: Models, params, condition, latents, chunk, chunk_index, info):
  """Scores of one candidate whose chunk and window are decoded anew, each as a video of its own."""
  decode = lambda z: models.codec.decode(params["codec"], z, models.codec.init_state(params["codec"]), first=True)[0]
  frames = decode(chunk)
  window = _append_latents(latents, chunk, chunk_index)
  chunks = jnp.minimum(chunk_index + 1, window.shape[0])
  valid = models.codec.num_frames(chunks * models.config.chunk_frames, first=True)
  decoded = decode(window.reshape(-1, *window.shape[2:]))
  num_past = valid - frames.shape[0]
  newest = jax.lax.dynamic_slice_in_dim(decoded, num_past, frames.shape[0])
  return _scores(models, params, condition, frames, FrameWindow(decoded, num_past, newest), info)


def _append_frames(past: jax.Array, num_past: jax.Array, chunk: jax.Array) -> jax.Array:
  """Adds a chunk's frames behind the valid ones of the left-aligned window [P, ...]; what does not fit leaves in front."""
  joined = jnp.concatenate([past, jnp.zeros_like(chunk)])
  joined = jax.lax.dynamic_update_slice_in_dim(joined, chunk, num_past, 0)
  surplus = jnp.maximum(num_past + chunk.shape[0] - past.shape[0], 0)
  return jax.lax.dynamic_slice_in_dim(joined, surplus, past.shape[0])


def _evict(models: Models, search: SearchConfig, beam: Beam):
  memory, eviction = memory_sinking.evict(beam.memory, models.rotary, models.config, search)
  return beam._replace(memory=memory), eviction


def _commit(models, params, search, condition, chunk_index, num_past, beam: Beam, winner: Winner, memory_view) -> Beam:
  """Clean pass of one winner at the context timestep, and everything its beam remembers of it."""
  first_frame = chunk_index * models.config.chunk_frames
  _, chunk = velocity(
    models, params, winner.latents, models.schedule.context_features, first_frame, condition.text, memory_view
  )
  return Beam(
    memory=memory_sinking.commit(beam.memory, chunk, winner.flags, first_frame, models.config),
    noise=winner.noise,
    seed=winner.seed,
    history=reward_pruning.extend_history(beam.history, winner.short, winner.long),
    past=_append_frames(beam.past, num_past, winner.frames),
    codec=winner.codec,
    latents=None if beam.latents is None else _append_latents(beam.latents, winner.latents, chunk_index),
  )


def _views(beams: Beam) -> attention.MemoryView:
  """The beams' memories as attention reads them; the trip count is common to all, so that the slot loop stays unbatched."""
  return memory_sinking.view(beams.memory, beams.memory.count.max())


def _gather_beams(beams: Beam, parents: jax.Array) -> Beam:
  """The beams at `parents` [K]; the only place where memories are copied."""
  axes = beam_axes(beams)
  pick = lambda axis, part: jax.tree.map(lambda leaf: jnp.take(leaf, parents, axis=axis), part)
  return jax.tree.map(pick, axes, beams, is_leaf=lambda x: isinstance(x, int))


def _draw(models: Models, search: SearchConfig, seed: jax.Array, parent_noise: jax.Array, *, first: bool):
  """A candidate's starting noise and its later draws."""
  draws = models.draw_noise(seed)
  noise = draws.fresh if first else noise_propagation.fuse_noise(parent_noise, draws.fresh, search.noise_sigma)
  return noise, draws.renoise


def chunk_step(
  params: Params,
  state: SearchState,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  *,
  first: bool,
  record: bool = False,
) -> tuple[SearchState, ChunkTrace]:
  """Generates and searches one chunk.

  Args:
    params: weights of all models, by the field names of `Models`.
    state: state before the chunk; may be donated.
    condition: the prompt.
    models: static.
    search: static.
    first: static; whether this is the video's first chunk (it has fewer pixel frames and no parent noise).
    record: static; whether the trace holds fused noise and every x0.

  Returns:
    State after the chunk, and its trace.
  """
  axes, per_beam = beam_axes(state.beams), functools.partial(jax.vmap, in_axes=0)
  chunk_index, size = state.chunk_index, search.beam_size
  first_frame = chunk_index * models.config.chunk_frames

  beams, eviction = jax.vmap(functools.partial(_evict, models, search), in_axes=(axes,), out_axes=(axes, 0))(state.beams)
  seed = noise_propagation.candidate_seeds(
    state.base_seed, beams.seed, chunk_index, beam_size=size, first_candidate=search.first_candidate
  )

  draw = functools.partial(_draw, models, search, first=first)
  noise, renoise = per_beam(jax.vmap(draw, in_axes=(0, None)))(seed, beams.noise)
  sample = lambda noise, renoise, view: denoise(models, params, noise, renoise, first_frame, condition.text, view)
  sample = jax.vmap(jax.vmap(sample, in_axes=(0, 0, None)), in_axes=(0, 0, _VIEW_AXES))
  x0 = sample(noise, renoise, _views(beams))
  latents = x0[:, :, -1]

  frames, codec, short, long = _judge(params, state._replace(beams=beams), condition, models, search, latents, first)
  weight = reward_pruning.fusion_weight(chunk_index, condition.num_chunks, search.fusion_cap)
  hybrid = reward_pruning.hybrid_score(short, long, weight)
  flag = lambda short, long, history: reward_pruning.route_flags(short, long, history, search)
  flags = per_beam(jax.vmap(flag, in_axes=(0, 0, None)))(short, long, beams.history)
  usable = jnp.isfinite(latents).all(axis=(2, 3, 4, 5)) & jnp.isfinite(short) & jnp.isfinite(long)

  survivor, score = reward_pruning.prune(hybrid.reshape(-1), usable.reshape(-1), search.top_k)
  candidates = Winner(latents, noise, seed, short, long, flags, frames, codec)
  winners = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[survivor], candidates)
  beams = _gather_beams(beams, survivor // size)
  if frames is None:
    decode = functools.partial(models.codec.decode, params["codec"], first=first)
    winners = winners._replace(**dict(zip(("frames", "codec"), jax.vmap(decode)(winners.latents, beams.codec))))

  finish = functools.partial(_commit, models, params, search, condition, chunk_index, state.num_past)
  finish = jax.vmap(finish, in_axes=(axes, 0, _VIEW_AXES), out_axes=axes)
  trace = ChunkTrace(
    candidates=CandidateTrace(seed, short, long, hybrid, usable, flags),
    eviction=eviction,
    survivor=survivor,
    score=score,
    latents=winners.latents,
    frames=winners.frames,
    steps={"noise": noise, "x0": x0} if record else None,
  )
  num_past = jnp.minimum(state.num_past + winners.frames.shape[1], past_capacity(models, search))
  return SearchState(chunk_index + 1, state.base_seed, num_past, finish(beams, winners, _views(beams))), trace


def _judge(params, state: SearchState, condition, models: Models, search: SearchConfig, latents, first: bool):
  """Decodes and scores all candidates `latents [K, B, F, C, H, W]`.

  Returns:
    Frames [K, B, Q, ...] and decoder states [K, B, ...] of the continued streams (both None when rewards decode from
    scratch: then only winners are decoded), image scores [K, B], video scores [K, B].
  """
  beams, size = state.beams, search.beam_size
  index = jnp.arange(search.num_candidates).reshape(search.top_k, size)
  if search.reward_decode == "scratch":

    def from_scratch(latents, index, window):
      info = CandidateInfo(state.chunk_index, index)
      return _scores_from_scratch(models, params, condition, window, latents, state.chunk_index, info)

    return None, None, *jax.vmap(jax.vmap(from_scratch, in_axes=(0, 0, None)))(latents, index, beams.latents)

  def streamed(latents, index, past, codec):
    frames, codec = models.codec.decode(params["codec"], latents, codec, first=first)
    window = FrameWindow(past, state.num_past, frames)
    return frames, codec, *_scores(models, params, condition, frames, window, CandidateInfo(state.chunk_index, index))

  return jax.vmap(jax.vmap(streamed, in_axes=(0, 0, None, None)))(latents, index, beams.past, beams.codec)
