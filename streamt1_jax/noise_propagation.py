"""Stream-Scaled Noise Propagation: a candidate's starting noise is its parent's noise, fused with fresh noise.

  eps_n = sigma * eps_parent + sqrt(1 - sigma^2) * eps_fresh                      (Stream-T1, noise propagation)

With independent draws the fused noise has unit variance. In the released code candidate 0 of a beam draws its
parent's fresh noise again, so its two terms are correlated and its variance is not one;
`SearchConfig.first_candidate` chooses.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from streamt1_jax.typing import IntLike, IntScalar, Latents

SEEDS_PER_CHUNK = 1000
"""Between the seeds of two chunks, by the released rule: they are distinct for up to 10 beams of 100 candidates."""
_SEED_PER_BEAM = 100


class NoiseDraws(NamedTuple):
  """All random numbers of one candidate.

  Attributes:
    fresh: noise before fusion.
    renoise: noise added back between denoising steps.
  """

  fresh: Latents
  renoise: Float32[Array, "between F C H W"]


@runtime_checkable
class DrawNoise(Protocol):
  """Draws a candidate's noise from its seed; pure, so that equal seeds give equal noise."""

  def __call__(self, seed: IntScalar) -> NoiseDraws: ...


@functools.cache
def gaussian_noise(latent_shape: tuple[int, ...], num_steps: int) -> DrawNoise:
  """Standard normal draws from `jax.random.key(seed)`; equal arguments give one function, and compiled programs are
  found again by it."""

  def draw(seed: IntLike) -> NoiseDraws:
    noise = jax.random.normal(jax.random.key(seed), (num_steps, *latent_shape))
    return NoiseDraws(fresh=noise[0], renoise=noise[1:])

  return draw


def candidate_seeds(
  base_seed: IntLike,
  parent_seed: Int32[Array, " K"],
  chunk_index: IntLike,
  begin: IntLike = 0,
  *,
  beam_size: int,
  first_candidate: str,
) -> Int32[Array, "K {beam_size}"]:
  """Seeds of all candidates of one chunk.

  The first chunk numbers its candidates from the base seed. Later, candidate i of beam k gets
  `base + 1000 * chunk + 100 * k + i`, except that candidate 0 takes its parent's seed when `first_candidate` is
  "reuse".

  Args:
    base_seed: seed of the video.
    parent_seed: the seed each beam's last chunk was drawn from.
    chunk_index: counted from 0.
    begin: the first chunk that is made; those before it are given.
    beam_size: candidates per beam, B.
    first_candidate: "reuse" or "fresh".
  """
  beams = jnp.arange(parent_seed.shape[0])[:, None]
  candidates = jnp.arange(beam_size)[None]
  first_chunk = base_seed + beams * beam_size + candidates
  later = base_seed + SEEDS_PER_CHUNK * chunk_index + _SEED_PER_BEAM * beams + candidates
  if first_candidate == "reuse":
    later = later.at[:, 0].set(parent_seed)
  return jnp.where(chunk_index == begin, first_chunk, later).astype(jnp.int32)


def fuse_noise(
  parent: Float32[Array, "*shape"], fresh: Float32[Array, "*shape"], sigma: float
) -> Float32[Array, "*shape"]:
  """sigma * parent + sqrt(1 - sigma^2) * fresh, for sigma in (-1, 1)."""
  return sigma * parent + (1.0 - sigma**2) ** 0.5 * fresh
