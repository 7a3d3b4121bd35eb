"""Three-axis rotary position embedding, in a layout without strided access.

A head's channels form pairs; pair j is a complex number turned by `position * 10000^(-2 j / d_axis)`. The pairs are
split between time, height and width: `d_height = d_width = 2 * (head_dim // 6)`, and time takes the rest. Source:
docs/reference/wan_dit.md.

Published weights interleave a pair's two numbers (2j, 2j + 1). Here the first numbers of all pairs come first and the
second numbers follow, so that a rotation is a few contiguous products on every backend. The converter permutes the
columns of the query and key projections once (`halves_order`); attention scores do not change, since queries and keys
are permuted alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from streamt1_jax.typing import IntLike

_BASE = 10000.0


class RotaryTables(NamedTuple):
  """Cosines and sines, float32, built in float64.

  Attributes:
    time: two arrays [max_frames, time_pairs].
    space: two arrays [rows * columns, height_pairs + width_pairs], row-major.
  """

  time: tuple[Float32[np.ndarray, "max_frames time_pairs"], Float32[np.ndarray, "max_frames time_pairs"]]
  space: tuple[Float32[np.ndarray, "places space_pairs"], Float32[np.ndarray, "places space_pairs"]]


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
  """Complex pairs given to time, height and width."""
  space = head_dim // 6
  return head_dim // 2 - 2 * space, space, space


def _angles(num_positions: int, pairs: int) -> np.ndarray:
  return np.arange(num_positions)[:, None] * _BASE ** (-np.arange(pairs) / pairs)


def _cos_sin(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotary_tables(head_dim: int, max_frames: int, rows: int, columns: int) -> RotaryTables:
  """Tables for heads of `head_dim` channels, `max_frames` latent frames and a grid of `rows` by `columns` tokens."""
  time, height, width = axis_pairs(head_dim)
  grid = (rows, columns)
  by_row = np.broadcast_to(_angles(rows, height)[:, None], (*grid, height))
  by_column = np.broadcast_to(_angles(columns, width)[None], (*grid, width))
  space = np.concatenate([by_row, by_column], axis=-1).reshape(rows * columns, height + width)
  return RotaryTables(time=_cos_sin(_angles(max_frames, time)), space=_cos_sin(space))


def chunk_rotation(
  tables: RotaryTables, first_frame: IntLike, num_frames: int
) -> tuple[Float32[Array, "tokens pairs"], Float32[Array, "tokens pairs"]]:
  """Cosines and sines of the tokens of consecutive frames, each [num_frames * frame_tokens, head_dim / 2].

  `first_frame` is the absolute index of the first frame, an int32 scalar in 0..max_frames - num_frames.
  """

  def tokens(time, space):
    frames = jax.lax.dynamic_slice_in_dim(jnp.asarray(time), first_frame, num_frames)
    shape = (num_frames, space.shape[0])
    frames = jnp.broadcast_to(frames[:, None], (*shape, time.shape[1]))
    places = jnp.broadcast_to(jnp.asarray(space)[None], (*shape, space.shape[1]))
    return jnp.concatenate([frames, places], axis=-1).reshape(num_frames * space.shape[0], -1)

  return tokens(tables.time[0], tables.space[0]), tokens(tables.time[1], tables.space[1])


def rotate(
  x: Float[Array, "*axes A D"], cos: Float[Array, "*axes pairs"], sin: Float[Array, "*axes pairs"]
) -> Float[Array, "*axes A D"]:
  """Rotates `x [..., A, D]` (pairs as halves) by `cos, sin [..., D / 2]`, in float32; the result has x's dtype."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def shift_frames(keys: Float[Array, "*axes D"], tables: RotaryTables, frames: IntLike) -> Float32[Array, "*axes D"]:
  """Moves rotated keys by a number of frames: rotations compose, so this equals rotating the raw keys anew.

  Args:
    keys: [..., D] keys, pairs as halves.
    tables: rotary tables.
    frames: int32 scalar, positive or negative, smaller in size than max_frames.

  Returns:
    [..., D] float32.
  """
  distance = jnp.abs(frames)
  cos = jnp.asarray(tables.time[0])[distance]
  sin = jnp.asarray(tables.time[1])[distance] * jnp.sign(frames).astype(jnp.float32)
  still = tables.space[0].shape[1]
  cos = jnp.concatenate([cos, jnp.ones(still, cos.dtype)])
  sin = jnp.concatenate([sin, jnp.zeros(still, sin.dtype)])
  lead = (1,) * (keys.ndim - 1)
  cos, sin = cos.reshape(*lead, -1), sin.reshape(*lead, -1)
  first, second = jnp.split(keys.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def halves_order(num_heads: int, head_dim: int) -> Int[np.ndarray, " channels"]:
  """Channel order `[num_heads * head_dim]` that turns interleaved pairs into halves, head by head."""
  head = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
  return (np.arange(num_heads)[:, None] * head_dim + head[None]).reshape(-1)
