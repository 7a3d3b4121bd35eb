"""The shapes world: one coloured shape that moves at constant velocity on a torus over a plain background.

A clip and its caption come from the same `Scene`, so whether a video shows what its caption says can be
computed (`streamt1_jax.data.verify`). Objects wrap around the borders: the captioned direction stays true for
ever, and every temporal window of a long video obeys the same caption.

  Attributes ── caption ──► "a small red circle moves quickly left over a dark blue background"
      │             ◄── parse_caption
      └─ + start ── Scene ── render ──► frames [T, 64, 64, 3]

Everywhere below an attribute is the index of its name in the table of that attribute.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from streamt1_jax.config import ConfigError, required
from streamt1_jax.typing import FloatLike, HostArray, IntLike

FRAME_SIZE = 64
"""Height and width of a frame in pixels."""
FPS = 16
"""Frames per second."""

SIZES = {"small": 7.0, "large": 11.0}
"""Name to the radius in pixels of the circle whose area every shape of that size has."""
COLORS = {
  "red": (230, 30, 30),
  "green": (40, 210, 50),
  "blue": (50, 110, 255),
  "yellow": (245, 225, 40),
  "magenta": (225, 50, 225),
  "white": (250, 250, 250),
}
"""Name to RGB in 0..255."""
SHAPES = ("circle", "square", "triangle")
SPEEDS = {"slowly": 1, "quickly": 2}
"""Name to pixels per frame."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Name to the (x, y) step; y grows downwards."""
BACKGROUNDS = {
  "black": (0, 0, 0),
  "dark blue": (0, 0, 110),
  "dark green": (0, 90, 0),
  "gray": (115, 115, 115),
}
"""Name to RGB in 0..255."""

START_POSITIONS = np.array(list(itertools.product((8, 24, 40, 56), repeat=2)), np.int32)
"""`[16, 2]` start centres (x, y) in pixels, on a coarse grid: free starts are much harder to learn."""

SPLITS = ("train", "tune", "test")
_HASH_BUCKETS = 20  # one bucket each for "tune" and "test": 5 % and 5 %


class Attributes(NamedTuple):
  """What a caption can say. Indices into the tables above; `None` where a caption is silent."""

  size: int | None
  color: int
  shape: int
  speed: int | None
  direction: int
  background: int


def attribute_names() -> dict[str, tuple[str, ...]]:
  """The names that the indices in every field of `Attributes` stand for."""
  tables = (SIZES, COLORS, SHAPES, SPEEDS, DIRECTIONS, BACKGROUNDS)
  return {field: tuple(table) for field, table in zip(Attributes._fields, tables, strict=True)}


class Scene(NamedTuple):
  """Everything a clip depends on. All int32; a batch of scenes has leading axes on every field."""

  size: IntLike
  color: IntLike
  shape: IntLike
  speed: IntLike
  direction: IntLike
  background: IntLike
  start: Int[HostArray, 2]  # (x, y) centre in pixels at frame 0


def render(scene: Scene, frame_indices: Int[HostArray, " T"]) -> Float32[Array, "T 64 64 3"]:
  """Draws frames of an unbatched scene.

  Args:
    scene: unbatched; `jax.vmap` over it for a batch.
    frame_indices: `[T]` int32, 0 .. 10**5; in any order, with or without gaps.

  Returns:
    `[T, 64, 64, 3]` float32 RGB in [0, 1]. An edge pixel is mixed by how far it reaches into the shape.
  """
  direction = jnp.asarray(list(DIRECTIONS.values()), jnp.int32)[scene.direction]
  velocity = direction * jnp.asarray(list(SPEEDS.values()), jnp.int32)[scene.speed]
  centers = jnp.asarray(scene.start)[None, :] + velocity[None, :] * frame_indices[:, None]
  offsets = torus_offsets(centers)
  radius = jnp.asarray(list(SIZES.values()), jnp.float32)[scene.size]
  distance = signed_distance(scene.shape, radius, offsets[:, None, :, 0], offsets[:, :, None, 1])
  coverage = jnp.clip(0.5 - distance, 0.0, 1.0)[..., None]
  color = palette(COLORS)[scene.color].reshape(1, 1, 1, 3)
  background = palette(BACKGROUNDS)[scene.background].reshape(1, 1, 1, 3)
  return background + coverage * (color - background)


def signed_distance(
  shape: IntLike | Int[HostArray, " ..."],
  radius: FloatLike | Float[HostArray, " ..."],
  x: Float[HostArray, " ..."],
  y: Float[HostArray, " ..."],
) -> Float[Array, " ..."]:
  """Distance in pixels to the outline of a shape at the origin, negative inside.

  All shapes of one radius have the area of the circle of that radius, and their centroid at the origin, so
  size and position can be read off an image without knowing its shape. Beyond the corners of a polygon the
  value is a lower bound.

  Args:
    shape: int32 scalar, index into `SHAPES`, or an array that broadcasts against `x`.
    radius: float32 scalar in pixels, or an array likewise.
    x: horizontal offsets in pixels; broadcasts against `y`.
    y: vertical offsets in pixels, downwards; same rank as `x`.
  """
  half_side = radius * (np.pi**0.5 / 2)
  inradius = radius * (np.pi**0.5 / 27**0.25)
  circle = jnp.sqrt(x * x + y * y) - radius
  square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - half_side
  triangle = jnp.maximum(y, 0.75**0.5 * jnp.abs(x) - 0.5 * y) - inradius
  return jnp.where(shape == 0, circle, jnp.where(shape == 1, square, triangle))


def caption(
  size: int | None,
  color: int,
  shape: int,
  speed: int | None,
  direction: int,
  background: int,
  omit_size: bool = False,
  omit_speed: bool = False,
) -> str:
  """The caption of these attributes; size and speed are left out on request or when `None`."""
  size_word = "" if omit_size or size is None else f"{list(SIZES)[size]} "
  speed_word = "" if omit_speed or speed is None else f"{list(SPEEDS)[speed]} "
  return (
    f"a {size_word}{list(COLORS)[color]} {SHAPES[shape]} moves {speed_word}{list(DIRECTIONS)[direction]} "
    f"over a {list(BACKGROUNDS)[background]} background"
  )


def parse_caption(text: str) -> Attributes:
  """Inverse of `caption`: `None` for an omitted size or speed. Raises ConfigError for any other text."""
  match = _caption_pattern().fullmatch(text.strip())
  if match is None:
    example = caption(0, 0, 0, 1, 0, 1)
    raise ConfigError(f"not a caption of the shapes world: {text!r}; expected for example {example!r}")
  words = match.groupdict()
  index_of = lambda names, word: None if word is None else names.index(word)
  indices: dict[str, Any] = {field: index_of(names, words[field]) for field, names in attribute_names().items()}
  return Attributes(**indices)


@functools.cache
def all_scenes() -> tuple[Attributes, ...]:
  """The 1152 attribute combinations, in a fixed order."""
  choices = [range(len(names)) for names in attribute_names().values()]
  return tuple(Attributes(*indices) for indices in itertools.product(*choices))


def split_of(attributes: Attributes) -> str:
  """The split of complete attributes, one of `SPLITS`: a hash of their names, so it never changes."""
  words = " ".join(
    names[required(index, "an attribute")] for names, index in zip(attribute_names().values(), attributes, strict=True)
  )
  bucket = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % _HASH_BUCKETS
  return {0: "tune", 1: "test"}.get(bucket, "train")


@functools.cache
def scenes_in(split: str) -> tuple[Attributes, ...]:
  """The attribute combinations of a split. Raises ConfigError for an unknown split."""
  if split not in SPLITS:
    raise ConfigError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
  return tuple(attributes for attributes in all_scenes() if split_of(attributes) == split)


def sample_scenes(key: PRNGKeyArray, n: int, split: str) -> Scene:
  """Draws `n` scenes of a split and start positions with replacement; every field gains a leading `[n]`.

  Can be jitted with `n` and `split` static.
  """
  table = jnp.asarray(scenes_in(split), jnp.int32)
  attributes_key, start_key = jax.random.split(key)
  rows = table[jax.random.randint(attributes_key, (n,), 0, table.shape[0])]
  starts = jnp.asarray(START_POSITIONS)[jax.random.randint(start_key, (n,), 0, len(START_POSITIONS))]
  return Scene(*(rows[:, column] for column in range(rows.shape[1])), start=starts)


def held_out_captions(split: str, n: int, seed: int) -> list[str]:
  """`n` complete captions of a split in random order, each once before any comes again."""
  scenes = scenes_in(split)
  generator = np.random.default_rng(seed)
  rounds = -(-n // len(scenes))
  order = np.concatenate([generator.permutation(len(scenes)) for _ in range(rounds)]) if n else []
  return [caption(*scenes[index]) for index in order[:n]]


def torus_offsets(centers: Float[Array, "T 2"] | Int[Array, "T 2"]) -> Float32[Array, "T 64 2"]:
  """`[T, 64, 2]` shortest offsets (x, y) from the centres `[T, 2]` to the middle of every column and row."""
  half = FRAME_SIZE // 2
  # Integers until the end: the remainder of a large float would lose the sub-pixel part.
  steps = jnp.arange(FRAME_SIZE, dtype=jnp.int32)[None, :, None] - centers[:, None, :]
  return (jnp.mod(steps + half, FRAME_SIZE) - half).astype(jnp.float32) + 0.5


def palette(table: dict[str, tuple[int, int, int]]) -> Float32[Array, "colors 3"]:
  return jnp.asarray(list(table.values()), jnp.float32) / 255.0


@functools.cache
def _caption_pattern() -> re.Pattern[str]:
  size, color, shape, speed, direction, background = (
    f"(?P<{field}>{'|'.join(names)})" for field, names in attribute_names().items()
  )
  return re.compile(f"a (?:{size} )?{color} {shape} moves (?:{speed} )?{direction} over a {background} background")
