"""What the search asks of a policy: which candidates survive a chunk.

  scores [K, B] ── select ── survivors [K], and the policy's own carry ── the next chunk

How many beams and candidates there are, what noise they start from and what is remembered are settings of the search
(`SearchConfig`). The policy alone says who survives.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

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
    usable: latents and scores are all finite. Others must not survive.
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
  """

  survivor: Int32[Array, " K"]
  score: Float32[Array, " K"]
  carry: Any


@runtime_checkable
class Policy(Protocol):
  """Who survives. A frozen dataclass that holds nothing but its own parameters: it is static under `jit`.

  `select` is traced: it must not branch in Python on values. On several devices every one of them sees all candidates.
  """

  def init(self, search: SearchConfig) -> Any:
    """The carry before the first chunk: arrays that lead with [K], or None for a policy that remembers nothing."""
    ...

  def select(self, carry: Any, scores: Scores, key: jax.Array, chunk_index: IntScalar, num_chunks: IntScalar) -> Choice:
    """Chooses K of the K * B candidates.

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


def selection_key(base_seed: IntLike, chunk_index: IntLike, event: IntLike = 0) -> jax.Array:
  """PRNG key of a policy: a function of seed, chunk and event alone, so a resumed search draws the same.

  Event 0 is the selection at the end of a chunk.
  """
  key = jax.random.fold_in(jax.random.key(base_seed), _DOMAIN + chunk_index)
  return jax.random.fold_in(key, event)
