"""Particles: sequential Monte Carlo whose weights are scores of the video so far, resampled between chunks.

  target    p(video) exp(score / alpha)
  weight    log w += (s_c - s_{c-1}) / alpha       s_c: the score of the video up to chunk c, s_{-1} = 0
  resample  where few beams hold all the weight, heavy ones are copied over light ones and all weights are equal again

The increments along a lineage add up to the score of its video, divided by alpha. What is resampled between chunks has
the same target as what is resampled inside of them as well (LatticeSMC, 2026; FK steering, arXiv 2501.06848).
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from streamt1_jax.config import LATER, ConfigError, SearchConfig, require
from streamt1_jax.config.base import require_choices
from streamt1_jax.policies import resampling
from streamt1_jax.policies.base import Choice, Scores
from streamt1_jax.reward_pruning import prune
from streamt1_jax.typing import IntScalar


class Weights(NamedTuple):
  """What particles carry.

  Attributes:
    log_weight: of every beam; not normalised.
    score: of the video so far.
  """

  log_weight: Float32[Array, " K"]
  score: Float32[Array, " K"]


@dataclasses.dataclass(frozen=True)
class Particles:
  """Sequential Monte Carlo over chunks.

  With one candidate per beam, beams are particles: they stay in their places until the effective sample size falls
  below `ess_threshold` of their number, and after the last chunk they keep their weights. With more candidates, the
  beams of the next chunk are drawn after every chunk, and after the last one the heaviest candidates stay.

  The target is met exactly with `noise_sigma=0`, because copies of a beam share their parent's noise, and without
  `settle_within`, which now and then keeps the heaviest lineage alone. An infinite `alpha` leaves every beam alone; a
  tiny one copies the best over all others.

  Attributes:
    alpha: temperature, in units of the score; `alpha_of` finds it.
    beta: weight that a chunk's score has before the last chunk, in [0, 1]: 0 weighs whole videos alone.
    ess_threshold: in [0, 1].
    score: the score of the video so far. "long" is the newest long-term score, which is that of the video as long as
      this fits into the sliding window; "sum" adds up hybrid scores, divided by the chunks of the whole video.
    returns: which video is shown. "argmax" is the one whose whole video scores best, as in any search; "draw" is one
      drawn by weight.
  """

  alpha: float
  beta: float = 1.0
  ess_threshold: float = 0.5
  score: Literal["long", "sum"] = "long"
  returns: Literal["argmax", "draw"] = dataclasses.field(default="argmax", metadata=LATER)

  def __post_init__(self):
    require(self.alpha > 0.0, f"alpha must be above 0, the scale of the score, got {self.alpha}")
    require(0.0 <= self.beta <= 1.0, f"beta must be in [0, 1], got {self.beta}")
    require(0.0 <= self.ess_threshold <= 1.0, f"ess_threshold must be in [0, 1], got {self.ess_threshold}")
    require_choices(self)

  @property
  def names_winner(self) -> bool:
    """Whether the last chunk's best `Choice.score` names the video that is shown."""
    return self.returns == "draw"

  def init(self, search: SearchConfig) -> Weights:
    """Raises ConfigError for a search without scores, and for one whose copies of a beam would never differ."""
    require(search.judges, "particles are weighed by scores: judges must be true")
    require(
      search.beam_size > 1 or search.first_candidate == "fresh",
      f"first_candidate must be 'fresh' for particles: copies of a beam would draw the same noise, got "
      f"{search.first_candidate!r}",
    )
    return Weights(jnp.zeros(search.top_k), jnp.zeros(search.top_k))

  def switched(self, carry: Weights) -> Weights:
    """Under a new prompt the "long" score begins anew: the video so far has got all the weight of its own."""
    if self.score == "sum":
      return carry
    left = (1.0 - self.beta) * carry.score
    return Weights(carry.log_weight + left / self.alpha, jnp.zeros_like(carry.score))

  def select(
    self, carry: Weights, scores: Scores, key: PRNGKeyArray, chunk_index: IntScalar, num_chunks: IntScalar
  ) -> Choice:
    beams, candidates = scores.usable.shape
    last = chunk_index == num_chunks - 1
    score = scores.long if self.score == "long" else carry.score[:, None] + scores.hybrid / num_chunks
    gained = jnp.where(last, score, self.beta * score) - self.beta * carry.score[:, None]
    usable = scores.usable.reshape(-1)
    log_weight = jnp.where(scores.usable, carry.log_weight[:, None] + gained / self.alpha, -jnp.inf)
    weight = log_weight.reshape(-1)
    draw, shown = jax.random.split(key)
    drawn = resampling.systematic(draw, weight, beams)
    if candidates == 1:
      few = resampling.effective_size(weight) < self.ess_threshold * beams
      resampled = ~last & (few | ~usable.all())
      stays, kept = _in_place(weight, usable)
    else:
      resampled = ~last
      stays, _ = prune(weight, usable, beams)
      kept = weight[stays]
    survivor = jnp.where(resampled, drawn, stays)
    after = jnp.where(resampled, 0.0, kept)
    # As a score where the draw is the best one (Gumbel).
    won = after + jax.random.gumbel(shown, after.shape) if self.names_winner else after
    return Choice(
      survivor,
      jnp.where(last, jnp.maximum(won, jnp.finfo(jnp.float32).min), weight[survivor]),
      Weights(after, score.reshape(-1)[survivor]),
      log_weight,
    )


def _in_place(
  weight: Float32[Array, " K"], usable: Bool[Array, " K"]
) -> tuple[Int32[Array, " K"], Float32[Array, " K"]]:
  """Every beam where it is, and its log weight. The heaviest stands in for one that is not usable, without weight."""
  stays = jnp.where(usable, jnp.arange(weight.size), jnp.argmax(weight)).astype(jnp.int32)
  return stays, jnp.where(usable, weight, -jnp.inf)


def alpha_of(plain_scores: Float[np.ndarray, "prompts videos"]) -> float:
  """A temperature for `Particles`: between the scores of a bad and a good plain video lies a factor 1000 of weight.

  The mean over prompts of (p90 - p10) / ln 1000 (LatticeSMC).

  Args:
    plain_scores: whole-video scores of plain videos of each prompt, from other prompts than those to be compared.

  Raises:
    ConfigError: fewer than two videos per prompt, a score that is not finite, or scores that are all the same.
  """
  scores = np.asarray(plain_scores, np.float64)
  if scores.ndim != 2 or scores.shape[0] < 1 or scores.shape[1] < 2 or not np.isfinite(scores).all():
    raise ConfigError(f"alpha needs finite scores of at least two plain videos per prompt, got {list(scores.shape)}")
  low, high = np.percentile(scores, [10, 90], axis=1)
  alpha = float(np.mean(high - low) / math.log(1000))
  require(alpha > 0.0, "alpha has no scale: all plain videos of a prompt score the same")
  return alpha
