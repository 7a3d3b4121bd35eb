"""What the compared videos are of: captions of the shapes world, timelines of them, or any prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from streamt1_jax.config import ConfigError
from streamt1_jax.data import world
from streamt1_jax.data.world import Description
from streamt1_jax.evaluation import room
from streamt1_jax.io.timeline import ChunkClock, Entry, Timeline
from streamt1_jax.noise_propagation import SEEDS_PER_CHUNK

SEGMENT_SECONDS = 6.0
"""About the seconds of one caption of a timeline; a timeline has at least two captions."""
SEED_STEP = 100 * SEEDS_PER_CHUNK
"""Between two videos: those of up to 100 chunks have different seeds."""


class Scene(NamedTuple):
  """What one video shows.

  Attributes:
    captions: one, or those of a timeline.
    begins: the chunk with which each begins.
  """

  captions: tuple[str, ...]
  begins: tuple[int, ...] = (0,)

  @property
  def text(self) -> str:
    """All captions as one: equal scenes have equal texts."""
    return "; ".join(self.captions)

  @property
  def descriptions(self) -> list[Description]:
    """Raises ConfigError for captions of another world."""
    return [world.parse(caption) for caption in self.captions]

  def prompt(self, clock: ChunkClock) -> str | Timeline:
    """As a pipeline takes it."""
    if len(self.captions) == 1:
      return self.captions[0]
    entries = zip(self.begins, self.captions, strict=True)
    return Timeline(tuple(Entry(clock.seconds(begin), caption) for begin, caption in entries))

  def script(self) -> list[tuple[int, str]]:
    """First chunks and prompts."""
    return list(zip(self.begins, self.captions, strict=True))

  def to_json(self) -> dict[str, Any]:
    return {"captions": list(self.captions), "begins": list(self.begins)}


class Case(NamedTuple):
  """One video's worth of a comparison: a prompt by its number, one of its seeds by its number, and the base seed."""

  prompt: int
  take: int
  seed: int


def of_world(split: str, count: int, chunks: int, seconds: float, objects: int, timelines: bool, seed: int):
  """`count` scenes of a split of the shapes world. Raises ConfigError for a video too short for a timeline."""
  segments = max(2, round(seconds / SEGMENT_SECONDS)) if timelines else 1
  if segments > chunks:
    raise ConfigError(f"a timeline of {segments} captions needs {segments} chunks, and the video has {chunks}")
  drawn = room.prompts(split, count, segments, chunks, objects, seed)
  return [Scene(tuple(map(world.caption, prompt.descriptions)), tuple(prompt.begins)) for prompt in drawn]


def of_prompts(prompts: Sequence[str], count: int) -> list[Scene]:
  """The first `count` different prompts. Raises ConfigError if there are fewer."""
  different = list(dict.fromkeys(prompts))
  if len(different) < count:
    raise ConfigError(f"{count} prompts are asked for, and there are {len(different)} different ones")
  return [Scene((prompt,)) for prompt in different[:count]]


def cases(prompts: int, seeds: int, seed: int) -> list[Case]:
  """All prompts with all of their seeds, prompt by prompt."""
  number = lambda prompt, take: seed + SEED_STEP * (prompt * seeds + take)
  return [Case(prompt, take, number(prompt, take)) for prompt in range(prompts) for take in range(seeds)]
