"""Three-axis rotary position embedding, in a layout without strided access.

A head's channels form pairs; pair j is a complex number turned by `position * 10000^(-2 j / d_axis)`. The pairs are
split between time, height and width: `d_height = d_width = 2 * (head_dim // 6)`, and time takes the rest. Source:
docs/reference/wan_dit.md.

Published weights interleave a pair's two numbers (2j, 2j + 1). Here the first numbers of all pairs come first and the
second numbers follow, so that a rotation is a few contiguous products on every backend. The converter permutes the
columns of the query and key projections once (`halves_order`); attention scores do not change, since queries and keys
are permuted alike.

Rotations compose: the score of a query at frame p and a key at frame r depends on p - r alone. So a chunk's queries and
keys are rotated at the chunk's own frames 0, 1, 2, wherever the chunk is in the video, and a query is turned by the
distance between its chunk and the one it looks at (`frame_turns`). No key is ever rotated again.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from streamt1_jax.typing import HostArray

_BASE = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
  """Complex pairs given to time, height and width."""
  space = head_dim // 6
  return head_dim // 2 - 2 * space, space, space


def _angles(positions: np.ndarray, pairs: int) -> np.ndarray:
  return positions[:, None] * _BASE ** (-np.arange(pairs) / pairs)


def _cos_sin(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def chunk_rotation(
  head_dim: int, num_frames: int, rows: int, columns: int
) -> tuple[Float32[np.ndarray, "num_frames places pairs"], Float32[np.ndarray, "num_frames places pairs"]]:
  """Cosines and sines of the tokens of a chunk at its own frames 0..num_frames - 1, built in float64.

  Args:
    head_dim: channels of a head.
    num_frames: latent frames of a chunk.
    rows: tokens from top to bottom.
    columns: tokens from left to right; places are numbered row by row.
  """
  time, height, width = axis_pairs(head_dim)
  shape = num_frames, rows, columns
  spread = lambda angles, *axes: np.broadcast_to(np.expand_dims(angles, axes), (*shape, angles.shape[-1]))
  parts = [
    spread(_angles(np.arange(num_frames), time), 1, 2),
    spread(_angles(np.arange(rows), height), 0, 2),
    spread(_angles(np.arange(columns), width), 0, 1),
  ]
  return _cos_sin(np.concatenate(parts, axis=-1).reshape(num_frames, rows * columns, -1))


class FrameTurns(NamedTuple):
  """What turns a head by a number of latent frames: its time pairs turn, the others stay.

  Attributes:
    cos: cosines of both halves.
    sin: sines of both halves, negative in the first one.
  """

  cos: Float32[HostArray, "*axes D"]
  sin: Float32[HostArray, "*axes D"]


def frame_turns(head_dim: int, longest: int) -> FrameTurns:
  """Turns by 0..longest latent frames, [longest + 1, head_dim] each, built in float64."""
  time, height, width = axis_pairs(head_dim)
  angles = np.pad(_angles(np.arange(longest + 1), time), ((0, 0), (0, height + width)))
  cos, sin = _cos_sin(angles)
  return FrameTurns(np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1))


def turns_of(table: FrameTurns, frames: Int32[Array, "*axes"]) -> FrameTurns:
  """The turns by `frames`, positive or negative and no more than the table's longest, [*axes, D] each."""
  cos, sin = jnp.asarray(table.cos)[jnp.abs(frames)], jnp.asarray(table.sin)[jnp.abs(frames)]
  return FrameTurns(cos, sin * jnp.sign(frames)[..., None].astype(sin.dtype))


def turn(x: Float[Array, "*axes D"], by: FrameTurns) -> Float32[Array, "*axes D"]:
  """Turns `x` (pairs as halves); cosines and sines broadcast against it."""
  x = x.astype(jnp.float32)
  return x * by.cos + swap_halves(x) * by.sin


def swap_halves(x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
  """The second numbers of all pairs before the first ones."""
  return jnp.roll(x, x.shape[-1] // 2, axis=-1)


def rotate(
  x: Float[Array, "*axes A D"], cos: Float[Array, "*axes pairs"], sin: Float[Array, "*axes pairs"]
) -> Float[Array, "*axes A D"]:
  """Rotates `x [..., A, D]` (pairs as halves) by `cos, sin [..., D / 2]`, in float32; the result has x's dtype."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def halves_order(num_heads: int, head_dim: int) -> Int[np.ndarray, " channels"]:
  """Channel order `[num_heads * head_dim]` that turns interleaved pairs into halves, head by head."""
  head = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
  return (np.arange(num_heads)[:, None] * head_dim + head[None]).reshape(-1)
