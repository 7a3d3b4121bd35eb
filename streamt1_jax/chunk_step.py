"""One chunk of the search: evict, draw, denoise, score, prune, commit. A pure function from state to state.

  memory ── evict & route ── memory'                                      every beam
  noise  ── fuse with fresh noise ── denoise, memory' read only ── x0     every candidate
  x0     ── decode ── image reward, video reward ── hybrid score          every candidate
  top-k over all candidates ── gather beams ── clean pass ── commit       winners only

Functions are written for one beam or one candidate; `chunk_step` vmaps them. A beam's candidates share its memory.
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
from streamt1_jax.backbone.schedule import DenoisingSchedule, denoising_schedule
from streamt1_jax.codec.base import Codec
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.nn.rotary import RotaryTables, rotary_tables
from streamt1_jax.noise_propagation import DrawNoise
from streamt1_jax.parallel.sharding import by_shards, constrain, with_shardings
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, ImageReward, VideoReward
from streamt1_jax.state import Beam, CandidateTrace, ChunkTrace, Condition, SearchState
from streamt1_jax.typing import Latents, Params


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
    execution: on which devices, and how.
  """

  config: ModelConfig
  backbone: nnx.GraphDef
  codec: Codec
  image_reward: ImageReward
  video_reward: VideoReward
  draw_noise: DrawNoise
  execution: Execution = Execution()

  @functools.cached_property
  def schedule(self) -> DenoisingSchedule:
    return denoising_schedule(self.config.schedule, self.config.backbone.freq_dim)

  @functools.cached_property
  def rotary(self) -> RotaryTables:
    c, patch = self.config, self.config.backbone.patch_size
    return rotary_tables(c.backbone.head_dim, c.backbone.max_frames, c.latent_height // patch, c.latent_width // patch)


class Winner(NamedTuple):
  """What a surviving candidate brings into its beam."""

  latents: jax.Array
  noise: jax.Array
  seed: jax.Array
  short: jax.Array
  long: jax.Array
  flags: reward_pruning.Flags
  frames: jax.Array | None
  codec: Any


def past_capacity(models: Models, search: SearchConfig) -> int:
  """Past frames kept for the video reward: a full window is as long as a video of so many chunks by itself."""
  latent_frames = (search.sliding_window - 1) * models.config.chunk_frames
  return models.codec.num_frames(latent_frames, first=True) if latent_frames else 0


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

  beams = jax.vmap(empty_beam, axis_size=search.top_k)()
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
  run = models.execution
  attend = lambda q, k, v, layer: attention.attend_with_memory(q, k, v, memory, layer, run.attention, run.mesh)
  backbone = nnx.merge(models.backbone, params["backbone"])
  return backbone(latents, features, first_frame, text, attend, run.placement)


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


def _append_latents(latents: jax.Array, chunk: Latents, chunk_index: jax.Array) -> jax.Array:
  """Adds a chunk to the left-aligned window [W, F, C, H, W]; when it is full the oldest chunk leaves."""
  window = latents.shape[0]
  latents = jnp.where(chunk_index < window, latents, jnp.roll(latents, -1, axis=0))
  return jax.lax.dynamic_update_index_in_dim(latents, chunk, jnp.minimum(chunk_index, window - 1), 0)


def _append_frames(past: jax.Array, num_past: jax.Array, chunk: jax.Array) -> jax.Array:
  """Adds a chunk's frames behind the valid ones of the left-aligned window [P, ...]; the surplus leaves in front."""
  joined = jnp.concatenate([past, jnp.zeros_like(chunk)])
  joined = jax.lax.dynamic_update_slice_in_dim(joined, chunk, num_past, 0)
  surplus = jnp.maximum(num_past + chunk.shape[0] - past.shape[0], 0)
  return jax.lax.dynamic_slice_in_dim(joined, surplus, past.shape[0])


def _gather_beams(beams: Beam, parents: jax.Array) -> Beam:
  """The beams at `parents` [K]; the only place where memories move, block by block and within their own space."""
  if parents.shape[0] == 1:
    return beams
  # "clip", since the default mode checks every index against the size and selects over whole memories.
  take = lambda x: jnp.take(x, parents, axis=0, mode="clip")

  def move(layer, cache):
    moved = take(jax.lax.dynamic_index_in_dim(cache, layer, 1))
    return jax.lax.dynamic_update_slice_in_dim(cache, moved, layer, 1)

  memory = beams.memory
  caches = memory.k, memory.v, memory.accumulator
  caches = jax.lax.fori_loop(0, memory.k.shape[1], lambda i, caches: jax.tree.map(lambda c: move(i, c), caches), caches)
  rest = jax.tree.map(take, beams._replace(memory=memory._replace(k=None, v=None, accumulator=None)))
  return rest._replace(memory=rest.memory._replace(k=caches[0], v=caches[1], accumulator=caches[2]))


@dataclasses.dataclass(frozen=True)
class _Step:
  """What is common to all beams and candidates of one chunk; every method is written for one of them."""

  models: Models
  search: SearchConfig
  params: Params
  condition: Condition
  chunk_index: jax.Array
  num_past: jax.Array | int
  first: bool

  @property
  def first_frame(self) -> jax.Array:
    return self.chunk_index * self.models.config.chunk_frames

  def evict(self, beams: Beam) -> tuple[Beam, memory_sinking.Eviction]:
    """Makes room in the memory of every beam [K], and tells what left it."""
    evict = jax.vmap(lambda memory: memory_sinking.evict(memory, self.models.rotary, self.models.config, self.search))
    evict = by_shards(evict, self.models.execution.mesh, ["memory"], ["memory", "per_beam"])
    memory, eviction = evict(beams.memory)
    return beams._replace(memory=memory), eviction

  def sample(self, seed: jax.Array, parent_noise: jax.Array, view: attention.MemoryView) -> tuple[jax.Array, jax.Array]:
    """Fused noise [F, C, H, W] and every x0 [S, F, C, H, W] of one candidate."""
    draws = self.models.draw_noise(seed)
    sigma = self.search.noise_sigma
    noise = draws.fresh if self.first else noise_propagation.fuse_noise(parent_noise, draws.fresh, sigma)
    text = self.condition.text
    return noise, denoise(self.models, self.params, noise, draws.renoise, self.first_frame, text, view)

  def decode(self, latents: Latents, codec: Any) -> tuple[jax.Array, Any]:
    """Frames and decoder state of a stream that goes on with `latents`."""
    return self.models.codec.decode(self.params["codec"], latents, codec, first=self.first)

  def decode_from_scratch(self, latents: jax.Array) -> jax.Array:
    codec, params = self.models.codec, self.params["codec"]
    return codec.decode(params, latents, codec.init_state(params), first=True)[0]

  def scores(self, chunk: jax.Array, window: FrameWindow, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Image and video score of candidate `index`, float32 scalars."""
    models, params, info = self.models, self.params, CandidateInfo(self.chunk_index, index)
    short = models.image_reward(params["image_reward"], self.condition.image_reward, chunk, info)
    long = models.video_reward(params["video_reward"], self.condition.video_reward, window, info)
    return short.astype(jnp.float32), long.astype(jnp.float32)

  def judge_streamed(self, candidate: tuple[Latents, jax.Array], beam: Beam):
    """Scores, frames and decoder state of one candidate; its window is made of frames that are decoded already."""
    latents, index = candidate
    frames, codec = self.decode(latents, beam.codec)
    scores = self.scores(frames, FrameWindow(beam.past, self.num_past, frames), index)
    return *scores, *((None, None) if self.models.execution.decoding == "twice" else (frames, codec))

  def judge_from_scratch(self, candidate: tuple[Latents, jax.Array], beam: Beam):
    """Scores of one candidate whose chunk and window are decoded anew, each as a video of its own."""
    latents, index = candidate
    frames = self.decode_from_scratch(latents)
    window = _append_latents(beam.latents, latents, self.chunk_index)
    chunks = jnp.minimum(self.chunk_index + 1, window.shape[0])
    valid = self.models.codec.num_frames(chunks * self.models.config.chunk_frames, first=True)
    decoded = self.decode_from_scratch(window.reshape(-1, *window.shape[2:]))
    num_past = valid - frames.shape[0]
    newest = jax.lax.dynamic_slice_in_dim(decoded, num_past, frames.shape[0])
    return *self.scores(frames, FrameWindow(decoded, num_past, newest), index), None, None

  def judge(self, beams: Beam, latents: jax.Array):
    """Scores all candidates `latents [K, B, F, C, H, W]`.

    Returns:
      Image scores and video scores [K, B]; frames and decoder states [K, B, ...] of the continued streams, both None
      where only winners are decoded for good.
    """
    index = jnp.arange(self.search.num_candidates).reshape(latents.shape[:2])
    judge = self.judge_streamed if self.search.reward_decode == "streamed" else self.judge_from_scratch
    return self.models.execution.map_candidates(judge)((latents, index), beams._replace(memory=None))

  def flags(self, short: jax.Array, long: jax.Array, history: reward_pruning.ScoreHistory) -> reward_pruning.Flags:
    return reward_pruning.route_flags(short, long, history, self.search)

  def commit(self, beams: Beam, winners: Winner) -> Beam:
    """Clean pass of the winners [K] at the context timestep, and everything their beams remember of them."""
    features, text = self.models.schedule.context_features, self.condition.text

    def clean_pass(latents, view):
      return velocity(self.models, self.params, latents, features, self.first_frame, text, view)[1]

    def remember(memory, chunk, flags, first_frame):
      commit = lambda *beam: memory_sinking.commit(*beam, first_frame, self.models.config)
      return (jax.vmap(commit)(memory, chunk, flags),)

    chunks = jax.vmap(clean_pass)(winners.latents, memory_sinking.view(beams.memory))
    names = ["memory", "chunk_memory", "per_beam", "shared"]
    remember = by_shards(remember, self.models.execution.mesh, names, ["memory"])
    (memory,) = remember(beams.memory, chunks, winners.flags, self.first_frame)
    append_latents = jax.vmap(_append_latents, in_axes=(0, 0, None))
    return Beam(
      memory=memory,
      noise=winners.noise,
      seed=winners.seed,
      history=jax.vmap(reward_pruning.extend_history)(beams.history, winners.short, winners.long),
      past=jax.vmap(_append_frames, in_axes=(0, None, 0))(beams.past, self.num_past, winners.frames),
      codec=winners.codec,
      latents=None if beams.latents is None else append_latents(beams.latents, winners.latents, self.chunk_index),
    )


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
  # Static for the first chunk: rewards then compile for a window without a past alone.
  num_past = 0 if first else state.num_past
  step = _Step(models, search, params, condition, state.chunk_index, num_past, first)
  with jax.named_scope("evict"):
    beams, eviction = step.evict(state.beams)

  seed = noise_propagation.candidate_seeds(
    state.base_seed,
    beams.seed,
    state.chunk_index,
    beam_size=search.beam_size,
    first_candidate=search.first_candidate,
  )
  mesh = models.execution.mesh
  seed = constrain(mesh, seed, "beam", "candidate")
  sample = jax.vmap(jax.vmap(step.sample, in_axes=(0, None, None)))
  with jax.named_scope("denoise"):
    noise, x0 = constrain(mesh, sample(seed, beams.noise, memory_sinking.view(beams.memory)), "beam", "candidate")
  latents = x0[:, :, -1]

  with jax.named_scope("judge"):
    short, long, frames, codec = step.judge(beams, latents)
  # Every device ranks all candidates. Left to itself the partitioner gathers their scores and slices them once more,
  # and the compiler for TPUs (libtpu 0.0.42.1) dies of that where beams and siblings are divided and nothing else is.
  finite = jnp.isfinite(latents).all(axis=(2, 3, 4, 5))
  short, long, finite, history = constrain(mesh, (short, long, finite, beams.history))
  weight = reward_pruning.fusion_weight(state.chunk_index, condition.num_chunks, search.fusion_cap)
  hybrid = reward_pruning.hybrid_score(short, long, weight)
  flags = jax.vmap(jax.vmap(step.flags, in_axes=(0, 0, None)))(short, long, history)
  usable = finite & jnp.isfinite(short) & jnp.isfinite(long)
  survivor, score = reward_pruning.prune(hybrid.reshape(-1), usable.reshape(-1), search.top_k)

  candidates = Winner(latents, noise, seed, short, long, flags, frames, codec)
  with jax.named_scope("prune"):
    winners = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[survivor], candidates)
    winners = constrain(mesh, winners, "beam")
    beams = _gather_beams(beams, survivor // search.beam_size)
  if winners.frames is None:
    decoded, codec = models.execution.map_beams(step.decode)(winners.latents, beams.codec)
    winners = winners._replace(frames=decoded, codec=codec)
  with jax.named_scope("commit"):
    beams = step.commit(beams, winners)

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
  state = SearchState(state.chunk_index + 1, state.base_seed, num_past, beams)
  # The trace is what a host reads: every device has all of it.
  return with_shardings(mesh, "state", state), constrain(mesh, trace)
