"""Clips of one or two objects, to which things happen, as a training draws them: states of frames, on the host."""

import numpy as np

from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import FrameStates

TWO_OBJECTS = 0.75
"""How often a short clip has two objects."""
EVENTS = 0.3
"""How often something happens in a short clip."""
LATENT_FRAME = 4
"""Frames of a latent frame; what happens, happens between two of them."""


def short_clips(rng: np.random.Generator, count: int, frames: int, split: str) -> FrameStates:
  """`count` clips of `frames` frames, one after the other, from any place and moment of the world."""
  return joined([_short_clip(rng, frames, split) for _ in range(count)])


def _short_clip(rng: np.random.Generator, frames: int, split: str) -> FrameStates:
  descriptions = [world.draw_description(rng, split, 1 + int(rng.random() < TWO_OBJECTS))]
  begins = [0]
  last_event = (frames - 1) // LATENT_FRAME
  if last_event > 0 and rng.random() < EVENTS:
    descriptions.append(world.draw_event(rng, descriptions[0], split))
    begins.append(1 + LATENT_FRAME * int(rng.integers(last_event)))
  starts = rng.integers(shapes.FRAME_SIZE, size=(2, 2)).astype(np.int32)
  return world.play(descriptions, begins, starts, np.arange(frames))


def joined(clips: list[FrameStates]) -> FrameStates:
  """The frames of all clips, one clip after the other."""
  return FrameStates(*(np.concatenate(fields) for fields in zip(*clips, strict=True)))
