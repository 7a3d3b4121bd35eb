"""Everything that changes during a search, as one frozen PyTree; how it begins; and what a chunk leaves behind."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from streamt1_jax import reward_pruning
from streamt1_jax.config import SearchConfig
from streamt1_jax.generator import Eviction, Models
from streamt1_jax.policies import search_policy
from streamt1_jax.reward_pruning import Flags, ScoreHistory
from streamt1_jax.typing import HostArray, IntLike, IntScalar, Latents, SearchParams

PREVIEW_WIDTH = 160
"""Pixels of a row of a preview, at most."""


class Beam(NamedTuple):
  """One lineage.

  Attributes:
    memory: what the generator remembers.
    noise: the fused noise the last chunk started from.
    seed: the seed of that chunk.
    history: scores so far.
    past: decoded frames of the sliding window, oldest first, left-aligned; None if the window has no past, because
      orbax saves no empty array, or if rewards do not read it: nothing is judged, or what is decoded from scratch.
    codec: decoder state.
    latents: latents of the sliding window's chunks, oldest first, left-aligned; None unless rewards judge what is
      decoded from scratch.
    lineage: its last `settle_within` chunks, oldest first, each by a number that two survivors of a chunk share
      only if they are the same candidate; None for a search without that limit.
  """

  memory: Any
  noise: Latents
  seed: IntScalar
  history: ScoreHistory
  past: Shaped[Array, "P ..."] | None
  codec: Any
  latents: Float32[Array, "window F C H W"] | None
  lineage: Int32[Array, " recent"] | None = None


class SearchState(NamedTuple):
  """State of a search between two chunks. Its size does not depend on the video's length.

  Attributes:
    chunk_index: the chunk to be generated next.
    base_seed: seed of the video.
    begin: the first chunk that is made, which has no parent noise; those before it were given.
    num_past: valid frames in every beam's `past`.
    beams: all beams, [K, ...] each.
    policy: the policy's carry, arrays [K, ...]; None for a policy without one.
    spare: rounds that earlier chunks did not draw; None for a search without a budget of rounds.
  """

  chunk_index: IntScalar
  base_seed: IntScalar
  begin: IntScalar
  num_past: IntScalar
  beams: Beam
  policy: Any
  spare: IntScalar | None = None


class Condition(NamedTuple):
  """What a video is made for; computed once per prompt and shared by all candidates.

  Attributes:
    text: what the generator reads of the prompt.
    image_reward: what the image reward made of the prompt.
    video_reward: what the video reward made of the prompt.
    num_chunks: chunks of the whole video.
    image: latent frame that the video begins with, or None; only a model that was trained for it takes one.
  """

  text: Any
  image_reward: Any
  video_reward: Any
  num_chunks: IntScalar
  image: Float32[Array, "C H W"] | None = None


class CandidateTrace(NamedTuple):
  """Per candidate.

  Attributes:
    seed: what its noise was drawn from.
    short: short-term score.
    long: long-term score.
    hybrid: what the candidates are ranked by.
    usable: latents and scores are all finite.
    flags: how the chunk would be routed if it survived.
  """

  seed: Int32[Array, "K B"]
  short: Float32[Array, "K B"]
  long: Float32[Array, "K B"]
  hybrid: Float32[Array, "K B"]
  usable: Bool[Array, "K B"]
  flags: Flags


class InsideTrace(NamedTuple):
  """What a policy decided inside of denoising.

  Attributes:
    seed: of the w candidates that every beam began with.
    preview: what the image reward gave their previews.
    usable: latents and score were finite.
    ancestor: which of them went on, as the beam's candidates of the chunk.
  """

  seed: Int32[Array, "K w"]
  preview: Float32[Array, "K w"]
  usable: Bool[Array, "K w"]
  ancestor: Int32[Array, "K B"]


class ChunkTrace(NamedTuple):
  """What one chunk leaves behind.

  Attributes:
    candidates: scores of all candidates. In a chunk that is not judged every beam draws candidate 0 alone: scores are
      0, and the others are not usable.
    eviction: what left each parent's window before this chunk, [K] each.
    survivor: surviving candidates n = parent * B + i; best first, unless the policy has another order.
    score: what they survived with: by default their hybrid scores.
    latents: their chunks.
    frames: their decoded frames.
    steps: recorded intermediate arrays, or None: `noise` [K, B, F, C, H, W] fused, and `x0` [K, B, S, F, C, H, W]. In
      a chunk that is not judged B is 1.
    log_weight: of all candidates, before any of them was chosen; None unless the policy weighs them.
    inside: what the policy decided inside of denoising; None if it decided nothing.
    ahead: hybrid scores of the candidates, averaged with those of the chunks that follow them; None unless the search
      looks ahead.
    rounds: how many were drawn; None for a search without. Candidates of others are not usable, and score 0.
    previews: the frames of all candidates that `Execution.preview_frames` asks for, evenly spaced; pictures at most
      `PREVIEW_WIDTH` pixels wide. None if it asks for none, or if losers are not decoded or not kept.
  """

  candidates: CandidateTrace
  eviction: Eviction
  survivor: Int32[Array, " K"]
  score: Float32[Array, " K"]
  latents: Float32[Array, "K F C H W"]
  frames: Shaped[HostArray, "K Q ..."]
  steps: Any
  log_weight: Float32[Array, "K B"] | None = None
  inside: InsideTrace | None = None
  ahead: Float32[Array, "K B"] | None = None
  rounds: IntScalar | None = None
  previews: Shaped[HostArray, "K B P ..."] | None = None


def past_capacity(models: Models, search: SearchConfig, num_chunks: int | None = None) -> int:
  """Past frames kept for the video reward: as many as the sliding window has before its newest chunk.

  A full window is as long as a video of that many chunks by itself. It is no longer than the video, of `num_chunks`
  chunks or any length, and nothing is kept that no reward reads.
  """
  read = search.judges and search.reward_decode == "streamed"
  chunks = _window_chunks(search, num_chunks) - 1 if read else 0
  return models.codec.num_frames(chunks * models.generator.latent_shape[0], first=True) if chunks else 0


def _window_chunks(search: SearchConfig, num_chunks: int | None) -> int:
  return min(search.sliding_window, num_chunks or search.sliding_window)


def init_state(
  params: SearchParams, models: Models, search: SearchConfig, seed: IntLike, num_chunks: int | None = None
) -> SearchState:
  """State before the first chunk: `top_k` equal, empty beams.

  Args:
    params: weights of all models.
    models: static.
    search: static.
    seed: base seed, int32.
    num_chunks: static, chunks of the whole video. No window in the state is longer; by default all have full length,
      which serves a video of any length.
  """
  generator, codec = models.generator, models.codec
  window = (_window_chunks(search, num_chunks), *generator.latent_shape)
  past = past_capacity(models, search, num_chunks)

  def empty_beam() -> Beam:
    return Beam(
      memory=generator.init_memory(params["backbone"], search),
      noise=jnp.zeros(generator.latent_shape),
      seed=jnp.int32(0),
      history=reward_pruning.empty_history(search),
      past=jnp.zeros((past, *codec.frame_shape()), codec.frame_dtype()) if past else None,
      codec=codec.init_state(params["codec"]),
      latents=jnp.zeros(window) if search.judges and search.reward_decode == "scratch" else None,
      lineage=jnp.zeros(search.settle_within, jnp.int32) if search.settle_within else None,
    )

  beams = jax.vmap(empty_beam, axis_size=search.top_k)()
  carry = search_policy(search).init(search)
  spare = jnp.int32(0) if search.round_budget else None
  return SearchState(jnp.int32(0), jnp.asarray(seed, jnp.int32), jnp.int32(0), jnp.int32(0), beams, carry, spare)
