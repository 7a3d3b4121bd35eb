"""What the search asks of a reward: pure functions over frames that are already on the device, per candidate.

  caption ── LoadedReward.prompt (host) ── init (device) ── condition ──┐    once per video
  frames of a candidate ────────────────────────────────────────────── reward ── score

A reward is a frozen dataclass (static under `jit`), its weights come in `params`, and what depends on the prompt
alone is computed once per video. Each reward reads prompts in its own way, as tokens of its own tokenizer for example,
or not at all. The chunk step vmaps over candidates and beams; a beam's past frames stay unbatched.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.typing import Decoded, FloatScalar, Frames, HostArray, IntLike, IntScalar, Params


class FrameWindow(NamedTuple):
  """The sliding window of one candidate.

  Attributes:
    past: [P, H, W, 3] uint8 decoded frames of the lineage, oldest first, left-aligned; shared by all candidates of a
      beam.
    num_past: int32 scalar, valid frames in `past`; what follows them means nothing. A Python int where it is known when
      the reward is compiled: a reward may then compile for that length alone.
    chunk: [Q, H, W, 3] uint8, the candidate's own frames.
  """

  past: Shaped[HostArray, "P ..."]
  num_past: IntLike
  chunk: Shaped[HostArray, "Q ..."]

  @property
  def num_frames(self) -> IntLike:
    """Frames in the window; int32 scalar, or int if `num_past` is."""
    return self.num_past + self.chunk.shape[0]

  def take(self, indices: Int[HostArray, " N"]) -> Shaped[Array, "N ..."]:
    """Frames [N, H, W, 3] at window positions `indices` [N] in 0..num_frames - 1; copies nothing else."""
    own = jnp.take(self.chunk, indices - self.num_past, axis=0, mode="clip")
    if self.past.shape[0] == 0:
      return own
    earlier = jnp.take(self.past, indices, axis=0, mode="clip")
    is_past = (indices < self.num_past).reshape(-1, *(1,) * (own.ndim - 1))
    return jnp.where(is_past, earlier, own)


class CandidateInfo(NamedTuple):
  """Which candidate is judged.

  Attributes:
    chunk_index: int32 scalar.
    candidate_index: int32 scalar in 0..beam_size * top_k - 1, order of generation.
  """

  chunk_index: IntScalar | np.int32
  candidate_index: IntScalar | np.int32


@runtime_checkable
class JudgesChunk(Protocol):
  """What the search asks of an image reward: the short-term score of one candidate."""

  def __call__(self, params: Params, condition: Any, chunk: Decoded, info: CandidateInfo, /) -> FloatScalar:
    """Score of a chunk's frames, higher is better; `condition` is what the reward made of the prompt."""
    ...


@runtime_checkable
class JudgesWindow(Protocol):
  """What the search asks of a video reward: the long-term score of one candidate."""

  def __call__(self, params: Params, condition: Any, window: FrameWindow, info: CandidateInfo, /) -> FloatScalar:
    """Score of the window, higher is better; `condition` is what the reward made of the prompt."""
    ...


@runtime_checkable
class ImageReward(JudgesChunk, Protocol):
  """Short-term score: one candidate's chunk."""

  def init(self, params: Params, prompt_features: Any) -> Any:
    """Prompt-only work, once per video, on what its `LoadedReward.prompt` gave; every call gets it as `condition`."""
    ...


@runtime_checkable
class VideoReward(JudgesWindow, Protocol):
  """Long-term score: the sliding window that ends with one candidate's chunk."""

  def init(self, params: Params, prompt_features: Any) -> Any:
    """Prompt-only work, once per video, on what its `LoadedReward.prompt` gave; every call gets it as `condition`."""
    ...


class Promptless:
  """What a reward inherits that reads no prompt: its `condition` is empty."""

  def init(self, params: Params, prompt_features: Any) -> tuple[()]:
    return ()


PromptReader = Callable[[str], Any]
"""Turns a caption into the `prompt_features` of `init`, a tree of arrays; on the host.

Raises ConfigError for a caption that the reward cannot read.
"""


def read_nothing(caption: str) -> tuple[()]:
  """The `PromptReader` of a reward that reads no prompt."""
  return ()


def size_of(frames: Frames) -> tuple[int, int]:
  """Rows and columns of a frame."""
  _, height, width, _ = frames.shape
  return height, width


def require_frames(name: str, frames: Frames, least: int) -> None:
  """Raises ConfigError for frames with fewer than `least` pixels on a side."""
  height, width = size_of(frames)
  if min(height, width) < least:
    raise ConfigError(f"{name} needs frames of at least {least}x{least}, got {height}x{width}")


def require_score(score: Any, name: str) -> FloatScalar:
  """`score` in float32. Raises ConfigError, naming the reward, unless it is one number: several would broadcast."""
  if jnp.ndim(score):
    raise ConfigError(f"the {name} must give a candidate one score, got an array of shape {jnp.shape(score)}")
  return jnp.asarray(score, jnp.float32)


class LoadedReward(NamedTuple):
  """A reward ready to judge.

  Attributes:
    reward: an `ImageReward` or a `VideoReward`, as its spec's `kind` says.
    params: its weights.
    prompt: reads captions.
  """

  reward: Any
  params: Params
  prompt: PromptReader
