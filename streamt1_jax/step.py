"""The parts of a chunk's search, as pure functions of a state: what `chunk_step` puts together.

Functions are written for one beam or one candidate and vmapped. A beam's candidates share its memory.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped

from streamt1_jax import noise_propagation, reward_pruning
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.generator import Eviction, Models
from streamt1_jax.parallel.sharding import BY_BEAM, by_shards, constrain
from streamt1_jax.policies import (
  Choice,
  Event,
  InsidePolicy,
  Scores,
  candidates_drawn,
  inside_event,
  require_choice,
  search_policy,
  selection_key,
)
from streamt1_jax.rewards import window_codecs
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, require_score
from streamt1_jax.rewards.selection import spread
from streamt1_jax.state import PREVIEW_WIDTH, Beam, Condition, InsideTrace, SearchState
from streamt1_jax.typing import Decoded, FloatScalar, IntLike, IntScalar, Latents, SearchParams


class Proposal(NamedTuple):
  """What candidates are made from, [K, B] of each.

  Attributes:
    seed: what its noise was drawn from.
    noise: the noise that denoising starts from.
    renoise: the noise for what happens between two denoising steps.
  """

  seed: IntScalar
  noise: Latents
  renoise: Float32[Array, "between F C H W"]


class Candidates(NamedTuple):
  """What exploring a chunk found: [K, B] of each, or [K] once only the survivors are left.

  Attributes:
    seed: what its noise was drawn from.
    noise: the noise that denoising started from.
    latents: the chunk.
    scores: what they are ranked by.
    flags: what becomes of the chunk when it leaves the window.
    frames: decoded frames, or None if only winners are decoded for good.
    codec: decoder state after them; None with `frames`.
  """

  seed: IntScalar
  noise: Latents
  latents: Latents
  scores: Scores
  flags: reward_pruning.Flags
  frames: Decoded | None
  codec: Any


class Explored(NamedTuple):
  """What `Step.explore` finds.

  Attributes:
    candidates: [K, B] of each.
    x0: all their predictions.
    inside: what the policy decided inside of denoising; None if it decided nothing.
  """

  candidates: Candidates
  x0: Float32[Array, "K B S F C H W"]
  inside: InsideTrace | None


def denoise(
  params: SearchParams,
  models: Models,
  noise: Latents,
  renoise: Float32[Array, "between F C H W"],
  text: Any,
  view: Any,
  image: Float32[Array, "C H W"] | None = None,
  *,
  begin: int = 0,
  end: int | None = None,
) -> tuple[Latents, Float32[Array, "steps F C H W"]]:
  """Denoises one candidate: the generator predicts x0, the sampler makes the next step's input of it, S times.

  Args:
    params: weights of all models.
    models: static.
    noise: starting noise, or the input of step `begin`.
    renoise: noise for every step but the last.
    text: the prompt, as the generator reads it.
    view: what the generator can see of its memory.
    image: the chunk's first latent frame, if that is given.
    begin: static, the first of the steps to be done.
    end: static, the step after the last of them; by default all are done.

  Returns:
    The input of step `end`, and the x0 prediction of every step that was done; that of the last of all steps is the
    chunk.
  """
  generator, sigmas = models.generator, models.generator.sigmas
  renoise = jnp.concatenate([renoise, jnp.zeros_like(noise)[None]])
  as_float = lambda x: jnp.asarray(x, jnp.float32)

  def step(x, inputs):
    index, sigma, next_sigma, fresh = inputs
    x0 = generator.denoise(params["backbone"], x, index, text, view, models.execution, image)
    return models.sampler(x, x0, fresh, sigma, next_sigma), x0

  levels = as_float(sigmas), as_float(np.append(sigmas[1:], 0.0))
  done = jax.tree.map(lambda x: x[begin:end], (jnp.arange(len(sigmas)), *levels, renoise))
  return jax.lax.scan(step, noise, done)


def _append_latents(
  latents: Float32[Array, "window F C H W"], chunk: Latents, chunk_index: IntScalar
) -> Float32[Array, "window F C H W"]:
  """Adds a chunk to the left-aligned window [W, F, C, H, W]; when it is full the oldest chunk leaves."""
  window = latents.shape[0]
  latents = jnp.where(chunk_index < window, latents, jnp.roll(latents, -1, axis=0))
  return jax.lax.dynamic_update_index_in_dim(latents, chunk, jnp.minimum(chunk_index, window - 1), 0)


def _append_frames(
  past: Shaped[Array, "P ..."] | None, num_past: IntLike, chunk: Decoded
) -> Shaped[Array, "P ..."] | None:
  """Adds a chunk's frames behind the valid ones of the left-aligned window [P, ...]; the surplus leaves in front."""
  if past is None:
    return None
  joined = jnp.concatenate([past, jnp.zeros_like(chunk)])
  joined = jax.lax.dynamic_update_slice_in_dim(joined, chunk, num_past, 0)
  surplus = jnp.maximum(num_past + chunk.shape[0] - past.shape[0], 0)
  return jax.lax.dynamic_slice_in_dim(joined, surplus, past.shape[0])


def small_pictures(frames: Decoded) -> Decoded:
  """Pictures at most `PREVIEW_WIDTH` wide, averaged over squares of whole pixels; latent frames as they are."""
  if frames.dtype != jnp.uint8 or frames.shape[-2] <= PREVIEW_WIDTH:
    return frames
  side = -(-frames.shape[-2] // PREVIEW_WIDTH)
  rows, columns = frames.shape[-3] // side, frames.shape[-2] // side
  squares = frames[..., : rows * side, : columns * side, :].reshape(*frames.shape[:-3], rows, side, columns, side, -1)
  return jnp.round(squares.mean(axis=(-4, -2), dtype=jnp.float32)).astype(jnp.uint8)


@contextlib.contextmanager
def _named(chunk: Decoded) -> Iterator[None]:
  """Adds the size of the frames to what a reward says that refuses them."""
  try:
    yield
  except ConfigError as error:
    size = "x".join(map(str, chunk.shape[:3]))
    raise ConfigError(f"reward: a chunk of {size} cannot be judged: {error}") from error


@dataclasses.dataclass(frozen=True)
class Step:
  """The six parts of a chunk's search; the fields are what they have in common.

  Attributes:
    params: weights of all models.
    state: state before the chunk.
    condition: the prompt.
    models: static.
    search: static.
    first: static; whether this is the video's first chunk.
    place: of the first candidate that it explores, among those of its beam.
  """

  params: SearchParams
  state: SearchState
  condition: Condition
  models: Models
  search: SearchConfig
  first: bool
  place: IntLike = 0

  @property
  def chunk_index(self) -> IntScalar:
    return self.state.chunk_index

  @property
  def num_past(self) -> IntLike:
    """Valid past frames. Static for the first chunk: rewards then compile for a window without a past alone."""
    return 0 if self.first else self.state.num_past

  def open(self) -> tuple[Beam, Eviction]:
    """Makes room in the memory of every beam [K], and tells what left it."""
    generator = self.models.generator
    make_room = jax.vmap(lambda memory: generator.open(memory, self.search))
    layout = generator.memory_layout
    make_room = by_shards(make_room, self.models.execution.mesh, [layout], [layout, BY_BEAM])
    memory, eviction = make_room(self.state.beams.memory)
    return self.state.beams._replace(memory=memory), eviction

  @property
  def carry(self) -> Any:
    """What the policy remembers of every beam; all devices have all of it."""
    return self.laid_out(self.state.policy)

  @property
  def event(self) -> Event | None:
    """When the policy decides inside of denoising."""
    return inside_event(self.search)

  def seeds(self, beams: Beam) -> Int32[Array, "K w"]:
    """The seeds of a chunk's candidates: `beam_size` of each beam, or what the policy's event begins with."""
    return noise_propagation.candidate_seeds(
      self.state.base_seed,
      beams.seed,
      self.chunk_index,
      self.state.begin,
      beam_size=candidates_drawn(self.search),
      first_candidate=self.search.first_candidate,
    )

  def explore(self, beams: Beam, seed: Int32[Array, "K w"]) -> Explored:
    """Candidates of opened beams, drawn with these seeds."""
    with jax.named_scope("propose"):
      proposal = self.propose(beams, seed)
    with jax.named_scope("denoise"):
      if self.event is None:
        x0, inside = self.denoise(beams, proposal.noise, proposal.renoise)[1], None
      else:
        proposal, x0, inside = self._denoise_some(beams, proposal, self.event)
    with jax.named_scope("judge"):
      candidates = self.judge(beams, proposal, x0[:, :, -1])
    return Explored(candidates, x0, inside)

  def propose(self, beams: Beam, seed: Int32[Array, "K w"]) -> Proposal:
    """Draws what the candidates with these seeds are made from."""

    def draw(seed: IntScalar, parent_noise: Latents) -> Proposal:
      draws, sigma = self.models.draw_noise(seed), self.search.noise_sigma
      noise = draws.fresh
      if not self.first:
        fused = noise_propagation.fuse_noise(parent_noise, draws.fresh, sigma)
        noise = jnp.where(self.chunk_index == self.state.begin, draws.fresh, fused)
      return Proposal(seed, noise, draws.renoise)

    draw = jax.vmap(jax.vmap(draw, in_axes=(0, None)))
    return self.laid_out(draw(self.laid_out(seed, "beam", "candidate"), beams.noise), "beam", "candidate")

  def denoise(
    self,
    beams: Beam,
    x: Float32[Array, "K w F C H W"],
    renoise: Float32[Array, "K w between F C H W"],
    *,
    begin: int = 0,
    end: int | None = None,
  ) -> tuple[Float32[Array, "K w F C H W"], Float32[Array, "K w steps F C H W"]]:
    """The input of step `end`, and every x0 of the steps from `begin` on, whose input is `x`; all steps by default."""

    def one(x: Latents, renoise: jax.Array, view: Any) -> tuple[jax.Array, jax.Array]:
      image = self.condition.image if self.first else None
      text = self.condition.text
      return denoise(self.params, self.models, x, renoise, text, view, image, begin=begin, end=end)

    run = jax.vmap(jax.vmap(one, in_axes=(0, 0, None)))
    return self.laid_out(run(x, renoise, self._view(beams)), "beam", "candidate")

  def _denoise_some(
    self, beams: Beam, proposal: Proposal, event: Event
  ) -> tuple[Proposal, Float32[Array, "K B S F C H W"], InsideTrace]:
    """Denoises what was proposed until the event, and those that the policy keeps to the end: what is left of it."""
    policy, after = search_policy(self.search), event.step + 1
    assert isinstance(policy, InsidePolicy)
    x, early = self.denoise(beams, proposal.noise, proposal.renoise, end=after)
    with jax.named_scope("preview"):
      x0 = early[:, :, -1]
      preview = self.preview(beams, x0, event)
      usable = jnp.isfinite(x0).all(axis=(2, 3, 4, 5)) & jnp.isfinite(preview)
      # As in `judge`: every device ranks all candidates.
      preview, usable = self.laid_out((preview, usable))
      ancestor = jax.vmap(lambda preview, usable: policy.inside(self.search, preview, usable))(preview, usable)
    take = jax.vmap(lambda x, index: x[index])
    kept = jax.tree.map(lambda x: take(x, ancestor), (proposal, x, early))
    kept, x, early = self.laid_out(kept, "beam", "candidate")
    _, late = self.denoise(beams, x, kept.renoise, begin=after)
    return kept, jnp.concatenate([early, late], axis=2), InsideTrace(proposal.seed, preview, usable, ancestor)

  def preview(self, beams: Beam, x0: Float32[Array, "K w F C H W"], event: Event) -> Float32[Array, "K w"]:
    """What the image reward gives the first frames of predictions. Decoder states go on from none of them."""

    def one(candidate: tuple[Latents, jax.Array], beam: Beam) -> FloatScalar:
      latents, index = candidate
      frames = self.decode(latents[: event.latent_frames], beam.codec)[0]
      shown = frames[spread(frames.shape[0], event.frames)]
      with _named(shown):
        return self._short(shown, index)

    index = jnp.arange(x0.shape[0] * x0.shape[1]).reshape(x0.shape[:2])
    return self.models.execution.map_candidates(one)((x0, index), beams._replace(memory=None))

  def judge(self, beams: Beam, proposal: Proposal, latents: Float32[Array, "K B F C H W"]) -> Candidates:
    """Decodes and scores the latents of what was proposed."""
    short, long, frames, codec = self._score(beams, latents)
    finite = jnp.isfinite(latents).all(axis=(2, 3, 4, 5))
    # Every device ranks all candidates. Left to itself the partitioner gathers their scores and slices them once more,
    # and the compiler for TPUs (libtpu 0.0.42.1) crashes on that where nothing but beams and siblings is divided.
    short, long, finite, history = self.laid_out((short, long, finite, beams.history))
    weight = reward_pruning.fusion_weight(self.chunk_index, self.condition.num_chunks, self.search.fusion_cap)
    hybrid = reward_pruning.hybrid_score(short, long, weight)
    usable = finite & jnp.isfinite(short) & jnp.isfinite(long)
    route = lambda short, long, history: reward_pruning.route_flags(short, long, history, self.search)
    flags = jax.vmap(jax.vmap(route, in_axes=(0, 0, None)))(short, long, history)
    scores = Scores(short, long, hybrid, usable)
    return Candidates(proposal.seed, proposal.noise, latents, scores, flags, frames, codec)

  def select(self, scores: Scores) -> Choice:
    """Asks the policy. Raises ConfigError if the choice does not fit the search."""
    policy, key = search_policy(self.search), selection_key(self.state.base_seed, self.chunk_index)

    def ask(scores: Scores) -> Choice:
      choice = policy.select(self.carry, scores, key, self.chunk_index, self.condition.num_chunks)
      return require_choice(choice, policy, self.search)

    choice, lineage = ask(scores), self.laid_out(self.state.beams.lineage)
    if lineage is None:
      return choice
    # Once more, among those alone that descend from the best survivor's chunk of `settle_within` chunks ago.
    best = choice.survivor[jnp.argmax(choice.score)] // self.search.beam_size
    agrees = lineage[:, 0] == lineage[best, 0]
    settled = ask(scores._replace(usable=scores.usable & agrees[:, None]))
    return settled._replace(log_weight=choice.log_weight)

  def close(self, beams: Beam, candidates: Candidates, survivor: Int32[Array, " K"]) -> tuple[Beam, Candidates]:
    """The beams that the survivors begin the next chunk with, and the survivors."""
    with jax.named_scope("prune"):
      winners = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[survivor], candidates)
      beams = self._gather(beams, survivor // self.search.beam_size)
      if beams.lineage is not None:
        beams = beams._replace(lineage=jnp.concatenate([beams.lineage[:, 1:], survivor[:, None]], axis=1))
      winners = self.laid_out(winners, "beam")
    return self.keep(beams, winners)

  def keep(self, beams: Beam, winners: Candidates) -> tuple[Beam, Candidates]:
    """What each beam [K] is once its winner is in it, and the winners, decoded."""
    if winners.frames is None:
      frames, codec = self.models.execution.map_beams(self.decode)(winners.latents, beams.codec)
      winners = winners._replace(frames=frames, codec=codec)
    with jax.named_scope("commit"):
      return self.commit(beams, winners), winners

  def previews(self, candidates: Candidates) -> Decoded | None:
    """The frames of candidates that traces hold, [K, B, P, ...]: see `ChunkTrace.previews`."""
    count, frames = self.models.execution.preview_frames, candidates.frames
    return None if frames is None or not count else small_pictures(frames[:, :, spread(frames.shape[2], count)])

  def past_after(self, beams: Beam, num_frames: int) -> IntScalar:
    """Valid past frames of the beams after the chunk, of `num_frames` frames."""
    capacity = 0 if beams.past is None else beams.past.shape[1]
    return jnp.minimum(self.state.num_past + num_frames, capacity)

  def laid_out(self, tree: Any, *axes: str) -> Any:
    """The arrays, divided among the devices by these axes; without any every device has all of them."""
    return constrain(self.models.execution.mesh, tree, *axes)

  def _view(self, beams: Beam) -> Any:
    view = lambda memory: self.models.generator.view(memory, self.chunk_index, self.search)
    return jax.vmap(view)(beams.memory)

  def decode(self, latents: Latents, codec: Any) -> tuple[Decoded, Any]:
    """Frames and decoder state of a stream that goes on with `latents`."""
    return self.models.codec.decode(self.params["codec"], latents, codec, first=self.first)

  def _decode_from_scratch(self, latents: Latents) -> Decoded:
    codec, params = self.models.codec, self.params["codec"]
    return codec.decode(params, latents, codec.init_state(params), first=True)[0]

  def _score(self, beams: Beam, latents: Float32[Array, "K B F C H W"]):
    """Scores all candidates `latents [K, B, F, C, H, W]`.

    Returns:
      Short-term and long-term scores [K, B]; frames and decoder states [K, B, ...] of the continued streams, both None
      if only winners are decoded for good.
    """
    if not self.search.judges:
      nothing = jnp.zeros(latents.shape[:2])
      return nothing, nothing, None, None
    parents, places = (jnp.arange(size) for size in latents.shape[:2])
    index = self.search.beam_size * parents[:, None] + (self.place + places)[None]
    score = self._score_streamed if self.search.reward_decode == "streamed" else self._score_from_scratch
    return self.models.execution.map_candidates(score)((latents, index), beams._replace(memory=None))

  def _score_streamed(self, candidate: tuple[Latents, jax.Array], beam: Beam):
    """Scores, frames and decoder state of one candidate; its window is made of frames that are decoded already."""
    latents, index = candidate
    frames, codec = self.decode(latents, beam.codec)
    past = frames[:0] if beam.past is None else beam.past
    scores = self._rewards(frames, FrameWindow(past, self.num_past, frames), index)
    return *scores, *((None, None) if self.models.execution.decoding == "twice" else (frames, codec))

  def _score_from_scratch(self, candidate: tuple[Latents, jax.Array], beam: Beam):
    """Scores of one candidate whose chunk and window are decoded anew, each as a video of its own."""
    assert beam.latents is not None
    latents, index = candidate
    frames = self._decode_from_scratch(latents)
    window = _append_latents(beam.latents, latents, self.chunk_index)
    chunks = jnp.minimum(self.chunk_index + 1, window.shape[0])
    valid = self.models.codec.num_frames(chunks * latents.shape[0], first=True)
    decoded = self._decode_from_scratch(window.reshape(-1, *window.shape[2:]))
    num_past = valid - frames.shape[0]
    newest = jax.lax.dynamic_slice_in_dim(decoded, num_past, frames.shape[0])
    return *self._rewards(frames, FrameWindow(decoded, num_past, newest), index), None, None

  def _rewards(self, chunk: Decoded, window: FrameWindow, index: IntScalar) -> tuple[FloatScalar, FloatScalar]:
    """Short-term and long-term score of candidate `index`."""
    models, params, info = self.models, self.params, CandidateInfo(self.chunk_index, index)
    with _named(chunk):
      window = window_codecs.find(self.search.reward_codec).window(window)
      short = self._short(chunk, index)
      long = models.video_reward(params["video_reward"], self.condition.video_reward, window, info)
    return short, require_score(long, "video reward")

  def _short(self, chunk: Decoded, index: IntScalar) -> FloatScalar:
    """Short-term score of frames of candidate `index`."""
    info = CandidateInfo(self.chunk_index, index)
    short = self.models.image_reward(self.params["image_reward"], self.condition.image_reward, chunk, info)
    return require_score(short, "image reward")

  def _gather(self, beams: Beam, parents: Int32[Array, " K"]) -> Beam:
    """The beams at `parents`; the only time that beams move."""
    if parents.shape[0] == 1:
      return beams
    # "clip", because the default mode checks every index against the size and selects over whole arrays.
    rest = jax.tree.map(lambda x: jnp.take(x, parents, axis=0, mode="clip"), beams._replace(memory=None))
    return rest._replace(memory=self.models.generator.gather(beams.memory, parents))

  def commit(self, beams: Beam, winners: Candidates) -> Beam:
    """Clean pass of the winners [K], and everything that their beams remember of them."""
    assert winners.frames is not None
    generator, execution, text = self.models.generator, self.models.execution, self.condition.text

    def clean_pass(latents, view):
      return generator.clean_pass(self.params["backbone"], latents, text, view, execution)

    def remember(memory, chunk, flags, chunk_index):
      return (jax.vmap(generator.commit, in_axes=(0, 0, 0, None))(memory, chunk, flags, chunk_index),)

    chunks = jax.vmap(clean_pass)(winners.latents, self._view(beams))
    layouts = [generator.memory_layout, generator.chunk_layout, BY_BEAM, "shared"]
    (memory,) = by_shards(remember, execution.mesh, layouts, layouts[:1])(
      beams.memory, chunks, winners.flags, self.chunk_index
    )
    append_latents = jax.vmap(_append_latents, in_axes=(0, 0, None))
    scores = winners.scores
    return Beam(
      memory=memory,
      noise=winners.noise,
      seed=winners.seed,
      history=jax.vmap(reward_pruning.extend_history)(beams.history, scores.short, scores.long),
      past=jax.vmap(_append_frames, in_axes=(0, None, 0))(beams.past, self.num_past, winners.frames),
      codec=winners.codec,
      latents=None if beams.latents is None else append_latents(beams.latents, winners.latents, self.chunk_index),
      lineage=beams.lineage,
    )
