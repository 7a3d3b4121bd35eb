"""Policies that change how many candidates there are while a chunk is denoised."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from streamt1_jax.config import SearchConfig, require
from streamt1_jax.policies.base import Event
from streamt1_jax.policies.selection import TopK
from streamt1_jax.reward_pruning import prune


@dataclasses.dataclass(frozen=True)
class Reject(TopK):
  """Early rejection: more candidates than are finished. After some steps a preview of each is judged.

  Every beam begins with `start` candidates. After denoising step `step` the first latent frames of what this step
  predicts are decoded and shown to the image reward; the best `beam_size` of each beam are finished, judged in full,
  and pruned as by `TopK`. Who stays is what it would have been without the others, to the bit.

  It is worth no more than its previews are. On the small model they rank candidates no better than chance
  (docs/evidence/previews.md), so no named search rejects early: measure another model with
  `experiments.evaluate.preview_rank` first.

  Without judges (`judges=False`, one candidate per beam is finished) the preview alone decides in every beam.

  Attributes:
    start: candidates per beam, at least `beam_size`; with `beam_size` of them nothing is rejected.
    step: the denoising step, counted from 0; one before the last.
    latent_frames: latent frames of the chunk that a preview decodes.
    frames: decoded frames that the image reward sees of them, evenly spread.
  """

  start: int = 8
  step: int = 0
  latent_frames: int = 1
  frames: int = 1

  def __post_init__(self):
    # Upper bound: that of beam_size.
    require(1 <= self.start <= 100, f"start must be in 1..100, got {self.start}")
    for name in ("step", "latent_frames", "frames"):
      least, value = int(name != "step"), getattr(self, name)
      require(value >= least, f"{name} must be at least {least}, got {value}")

  def event(self, search: SearchConfig) -> Event | None:
    """None for a search that finishes all candidates."""
    require(self.start >= search.beam_size, f"start must be at least beam_size {search.beam_size}, got {self.start}")
    if self.start == search.beam_size:
      return None
    return Event(self.start, self.step, self.latent_frames, self.frames)

  def inside(
    self, search: SearchConfig, preview: Float32[Array, " w"], usable: Bool[Array, " w"]
  ) -> Int32[Array, " B"]:
    # In the order in which they were drawn: with all of them this is no choice.
    return jnp.sort(prune(preview, usable, search.beam_size)[0])
