"""What the search asks of a policy: which candidates survive a chunk.

  scores [K, B] ── select ── survivors [K], and the policy's own carry ── the next chunk

How many beams and candidates there are, what noise they start from and what is remembered are settings of the search
(`SearchConfig`). The policy alone says who survives.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray

from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.typing import IntLike, IntScalar

# A policy's keys fold in this and the chunk's index. So whatever folds smaller numbers into the seed draws apart.
_DOMAIN = 1 << 20


class Scores(NamedTuple):
  """Scores of all candidates of a chunk.

  Attributes:
    short: short-term score.
    long: long-term score.
    hybrid: the two combined.
    usable: latents and scores are all finite, and the search lets it survive (`SearchConfig.settle_within`). Others
      must not survive.
  """

  short: Float32[Array, "K B"]
  long: Float32[Array, "K B"]
  hybrid: Float32[Array, "K B"]
  usable: Bool[Array, "K B"]


class Choice(NamedTuple):
  """What a policy decides.

  Attributes:
    survivor: surviving candidates n = parent * B + i, one per beam of the next chunk.
    score: what they survived with.
    carry: the policy's carry for the next chunk, already in the order of the survivors.
    log_weight: of all candidates, before any of them is chosen; None for a policy that weighs nothing.
  """

  survivor: Int32[Array, " K"]
  score: Float32[Array, " K"]
  carry: Any
  log_weight: Float32[Array, "K B"] | None = None


@runtime_checkable
class Policy(Protocol):
  """Who survives. A frozen dataclass that holds nothing but its own parameters: it is static under `jit`.

  `select` is traced: it must not branch in Python on values. On several devices every one of them sees all candidates.
  """

  def init(self, search: SearchConfig) -> Any:
    """The carry before the first chunk: arrays that lead with [K], or None for a policy that remembers nothing."""
    ...

  def select(
    self, carry: Any, scores: Scores, key: PRNGKeyArray, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    """Chooses K of the K * B candidates. A search with `settle_within` asks twice, with the same carry and key.

    Args:
      carry: what the beams that were drawn from carry, [K, ...].
      scores: of all candidates.
      key: PRNG key of this selection.
      chunk_index: counted from 0.
      num_chunks: chunks of the whole video.

    Returns:
      The choice. If no candidate at all is usable it means nothing, and the search stops with an error. Otherwise all
      survivors must be usable candidates.
    """
    ...


@runtime_checkable
class NamesWinner(Protocol):
  """A policy that may name the video that is shown."""

  @property
  def names_winner(self) -> bool:
    """Whether it is the one whose `Choice.score` after the last chunk is best, and not the best whole video."""
    ...


@runtime_checkable
class SwitchedPolicy(Protocol):
  """A policy whose carry does not stay as it is when the prompt changes."""

  def switched(self, carry: Any) -> Any:
    """The carry under the new prompt, for a carry between two chunks: what compares with the scores to come."""
    ...


class Event(NamedTuple):
  """The moment at which a policy looks at candidates that are not finished. Static.

  Attributes:
    start: candidates per beam until then; from then on there are `SearchConfig.beam_size`.
    step: after which denoising step, counted from 0.
    latent_frames: latent frames of a chunk that are decoded for a preview.
    frames: decoded frames that the image reward sees of them.
  """

  start: int
  step: int
  latent_frames: int
  frames: int


@runtime_checkable
class InsidePolicy(Policy, Protocol):
  """A policy that also decides inside of denoising, among the candidates of each beam.

  They share a memory, so that no memory moves.
  """

  def event(self, search: SearchConfig) -> Event | None:
    """When; None for a search in which it has nothing to decide. Raises ConfigError for one that it does not fit."""
    ...

  def inside(
    self, search: SearchConfig, preview: Float32[Array, " w"], usable: Bool[Array, " w"]
  ) -> Int32[Array, " B"]:
    """Which candidates of one beam go on.

    Args:
      search: the search.
      preview: what the image reward gives the previews of w = `Event.start` candidates.
      usable: latents and score are finite. Others must not go on.

    Returns:
      Their places. They keep their seeds and all their noise.
    """
    ...


def require_choice(choice: Choice, policy: Policy, search: SearchConfig) -> Choice:
  """`choice`. Raises ConfigError unless it has one survivor, an integer, and one score for each beam of the search."""
  survivor, score = choice.survivor, choice.score
  shape = (search.top_k,)
  if survivor.shape != shape or score.shape != shape or not jnp.issubdtype(survivor.dtype, jnp.integer):
    raise ConfigError(
      f"policy {type(policy).__name__} must choose integers of shape {shape}, with scores of that shape; its survivors "
      f"are {survivor.dtype}{list(survivor.shape)}, its scores {list(score.shape)}"
    )
  return choice


def selection_key(base_seed: IntLike, chunk_index: IntLike, event: IntLike = 0) -> PRNGKeyArray:
  """PRNG key of a policy: a function of seed, chunk and event alone, so a resumed search draws the same.

  Event 0 is the selection at the end of a chunk.
  """
  key = jax.random.fold_in(jax.random.key(base_seed), _DOMAIN + chunk_index)
  return jax.random.fold_in(key, event)
