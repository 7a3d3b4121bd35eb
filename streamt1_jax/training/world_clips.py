"""Clips of one or two objects, to which things happen, as a training draws them: states of frames, on the host.

What a chunk sees of its past decides which clips the training of the DiT needs:

  plain   one caption all the time; some begin with a still picture, as a video that goes on from a picture
  far     one caption, but the first chunk, the sink, is from long ago: it says where objects must be by now
  early   the caption changes before anything has left the window
  late    the first chunk, the sink, is from long ago, when the caption was another; it changes again, or not
"""

import dataclasses

import numpy as np

from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import Description, FrameStates

TWO_OBJECTS = 0.75
"""How often a short clip has two objects."""
EVENTS = 0.3
"""How often something happens in a short clip."""
LATENT_FRAME = 4
"""Frames of a latent frame; what happens, happens between two of them."""
KEPT_CHUNKS = 3
"""Past chunks that are in the memory between two chunks, besides the sink."""
PERIOD = 16
"""Chunks after which the world repeats: it does after 64 frames, 16 latent frames, so after 16 chunks of any size."""
_HIDDEN = 4  # pixels by which two objects must overlap


@dataclasses.dataclass(frozen=True)
class ClipShares:
  """Which clips are drawn.

  Attributes:
    two_objects: how often a clip has two objects.
    early: how often its caption changes early.
    late: how often its sink is of another caption.
    still: how often a plain clip begins with a still picture.
    far: how often the sink of another plain clip is from long ago.
    anywhere: how often objects start anywhere and not on the coarse grid.
    crossing: how often a clip is drawn until one object hides some of the other, after the first chunk.
  """

  two_objects: float
  early: float
  late: float
  still: float
  far: float
  anywhere: float
  crossing: float


@dataclasses.dataclass(frozen=True)
class TrainingClip:
  """A clip whose last caption is learned.

  Attributes:
    states: of all frames.
    description: of the last caption.
    sink: what the first chunk's caption says.
    switch: chunk with which the last caption begins; 0 if it did not change while a training could see it.
    late: whether the first chunk is from long ago, of an older caption.
    gap: chunks that are left out behind the first one, less than `PERIOD`; the world went on in the meantime.
  """

  states: FrameStates
  description: Description
  sink: Description
  switch: int
  late: bool
  gap: int


def short_clips(rng: np.random.Generator, count: int, frames: int, split: str) -> FrameStates:
  """`count` clips of `frames` frames, one after the other, from any place and moment of the world."""
  return joined([_short_clip(rng, frames, split) for _ in range(count)])


def _short_clip(rng: np.random.Generator, frames: int, split: str) -> FrameStates:
  descriptions = [_drawn(rng, split, TWO_OBJECTS)]
  begins = [0]
  last_event = (frames - 1) // LATENT_FRAME
  if last_event > 0 and rng.random() < EVENTS:
    descriptions.append(world.draw_event(rng, descriptions[0], split))
    begins.append(1 + LATENT_FRAME * int(rng.integers(last_event)))
  return world.play(descriptions, begins, _anywhere(rng), np.arange(frames))


def training_clip(
  rng: np.random.Generator, shares: ClipShares, chunks: int, first: int, later: int, split: str
) -> TrainingClip:
  """A clip of `chunks` chunks, of `first` frames and then of `later` frames each."""
  crossing = shares.crossing > 0 and rng.random() < shares.crossing
  while True:
    clip = _any_clip(rng, shares, chunks, first, later, split)
    if not crossing or _hides_some(clip.states)[first:].any():
      return clip


def _hides_some(states: FrameStates) -> np.ndarray:
  """[T] whether the first object hides a good part of the second, taking both for circles."""
  half = shapes.FRAME_SIZE // 2
  apart = (states.center[:, 0] - states.center[:, 1] + half) % shapes.FRAME_SIZE - half
  reach = np.array(list(shapes.SIZES.values()))[states.size].sum(axis=1) - _HIDDEN
  return states.present.all(axis=1) & (np.linalg.norm(apart, axis=1) < reach)


def _any_clip(
  rng: np.random.Generator, shares: ClipShares, chunks: int, first: int, later: int, split: str
) -> TrainingClip:
  """A clip of any kind, whether objects cross in it or not."""
  begin = lambda chunk: 0 if chunk == 0 else first + (chunk - 1) * later
  description = _drawn(rng, split, shares.two_objects)
  descriptions, begins, switch = [description], [0], 0
  kind = rng.random()
  late, early = kind < shares.late, shares.late <= kind < shares.late + shares.early
  if late:
    # As in a video with several captions: one thing has happened since the first chunk, or two.
    for _ in range(int(rng.integers(1, 3))):
      description = world.draw_event(rng, description, split)
    descriptions, begins = [*descriptions, description], [0, begin(1)]
    switch = int(rng.choice((0, 1 + KEPT_CHUNKS)))
  elif early:
    switch = int(rng.integers(1, 2 + KEPT_CHUNKS))
  if switch:
    description = world.draw_event(rng, description, split)
    descriptions, begins = [*descriptions, description], [*begins, begin(switch)]
  times, gap, is_plain = np.arange(begin(chunks)), 0, not (early or late)
  if is_plain and rng.random() < shares.still:
    times = np.maximum(times - (first - 1), 0)
  elif is_plain and rng.random() < shares.far:
    gap = int(rng.integers(1, PERIOD))
    times[first:] += later * gap
  grid = world.starts_of(shapes.START_POSITIONS[rng.integers(len(shapes.START_POSITIONS))])
  starts = _anywhere(rng) if rng.random() < shares.anywhere else grid
  states = world.play(descriptions, begins, starts, times)
  return TrainingClip(states, description, descriptions[0], switch, late, gap)


def _drawn(rng: np.random.Generator, split: str, two_objects: float) -> Description:
  return world.draw_description(rng, split, 1 + int(rng.random() < two_objects))


def _anywhere(rng: np.random.Generator) -> np.ndarray:
  return rng.integers(shapes.FRAME_SIZE, size=(2, 2)).astype(np.int32)


def joined(clips: list[FrameStates]) -> FrameStates:
  """The frames of all clips, one clip after the other."""
  return FrameStates(*(np.concatenate(fields) for fields in zip(*clips, strict=True)))
