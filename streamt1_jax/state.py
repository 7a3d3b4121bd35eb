"""Everything that changes during a search, as one frozen PyTree, and what a chunk leaves behind."""

from typing import Any, NamedTuple

import jax

from streamt1_jax.backbone.dit import TextMemory
from streamt1_jax.memory_sinking import Eviction, Memory
from streamt1_jax.reward_pruning import Flags, ScoreHistory


class Beam(NamedTuple):
  """One lineage.

  Attributes:
    memory: attention memory.
    noise: [F, C, H, W] float32, the fused noise the last chunk started from.
    seed: int32 scalar, the seed of that chunk.
    history: scores so far.
    past: [P, ...] decoded frames of the sliding window, oldest first, left-aligned.
    codec: decoder state.
    latents: [W, F, C, H, W] latents of the sliding window's last W chunks, oldest first, left-aligned; None unless
      rewards decode from scratch.
  """

  memory: Memory
  noise: jax.Array
  seed: jax.Array
  history: ScoreHistory
  past: jax.Array
  codec: Any
  latents: jax.Array | None


class SearchState(NamedTuple):
  """State of a search between two chunks. Its size does not depend on the video's length.

  Attributes:
    chunk_index: int32 scalar, the chunk to be generated next.
    base_seed: int32 scalar.
    num_past: int32 scalar, valid frames in every beam's `past`.
    beams: all beams, [K, ...] each.
  """

  chunk_index: jax.Array
  base_seed: jax.Array
  num_past: jax.Array
  beams: Beam


class Condition(NamedTuple):
  """What a video is made for; computed once per prompt and shared by all candidates.

  Attributes:
    text: cross-attention keys and values of the prompt.
    image_reward: prompt-only part of the image reward.
    video_reward: prompt-only part of the video reward.
    num_chunks: int32 scalar, chunks of the whole video.
  """

  text: TextMemory
  image_reward: Any
  video_reward: Any
  num_chunks: jax.Array


class CandidateTrace(NamedTuple):
  """Per candidate, each [K, B].

  Attributes:
    seed: int32.
    short: float32 image score.
    long: float32 video score.
    hybrid: float32, what the candidates are ranked by.
    usable: bool, latents and scores are all finite.
    flags: how the chunk would be routed if it survived.
  """

  seed: jax.Array
  short: jax.Array
  long: jax.Array
  hybrid: jax.Array
  usable: jax.Array
  flags: Flags


class ChunkTrace(NamedTuple):
  """What one chunk leaves behind.

  Attributes:
    candidates: scores of all candidates.
    eviction: what left each parent's window before this chunk, [K] each.
    survivor: [K] int32, surviving candidates n = parent * B + i, best first.
    score: [K] float32, their hybrid scores.
    latents: [K, F, C, H, W] float32, their chunks.
    frames: [K, Q, ...] their decoded frames.
    steps: recorded intermediate arrays, or None: `noise` [K, B, F, C, H, W] fused, and `x0` [K, B, S, F, C, H, W].
  """

  candidates: CandidateTrace
  eviction: Eviction
  survivor: jax.Array
  score: jax.Array
  latents: jax.Array
  frames: jax.Array
  steps: Any
