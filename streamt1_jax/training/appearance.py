"""Clips of the shapes world with the defects that generated videos have: what the learned rewards are trained on.

  states of frames ── mixed shapes and colours, a second copy, opacity, size ── blur, noise ── frames [T, 64, 64, 3]

A `Look` without defects draws what `world.draw` draws. Every defect is a number, and zero means no defect, so that a
pair of clips can differ in the degree of a defect alone. One object has the defects, the target.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from streamt1_jax.data import shapes
from streamt1_jax.data.shapes import FRAME_SIZE
from streamt1_jax.data.world import MOST_OBJECTS, FrameStates
from streamt1_jax.typing import FloatLike, HostArray, IntLike

Whole = IntLike | Int32[HostArray, "*clips"]
Real = FloatLike | Float32[HostArray, "*clips"]

_RANDOM_FRAMES = 512  # randomness per frame repeats after so long
_TILE = 3 * FRAME_SIZE  # noise is cut out of a fixed tile: drawing it for every frame costs more than all else


class Look(NamedTuple):
  """How one clip looks; scalars but for `shift`, or those of several clips. Times are in frames of the window.

  Attributes:
    target: the object that has the defects.
    shape: index of the shape that is mixed with the target's.
    color: index of the colour that is mixed with the target's.
    background: index of the colour that is mixed with the background.
    event: time at which something begins.
    until: time at which it is over (vanishing only).
    end: time at which growth is complete.
    vanish: loss of opacity between `event` and `until`.
    flicker: largest loss of opacity, random in every frame.
    resize: logarithm of the growth of the object from `event` to `end`.
    mix_shape: weight of the other shape.
    mix_color: weight of the other colour.
    mix_background: weight of the other background.
    faint: loss of opacity.
    ghost: share of the opacity that a second copy has.
    shift: (x, y) pixels from the object to its second copy.
    erode: standard deviation in pixels of the random shift of the outline.
    cut: pixels from the object's centre to a straight cut, counted from the rim; 0 cuts nothing.
    blur: standard deviation in pixels.
    noise: standard deviation, frames being in [0, 1].
    latent_noise: standard deviation of noise added to latents, in a codec whose latents have standard deviation 1.
    seed: decides all randomness of the clip.
  """

  target: Whole = 0
  shape: Whole = 0
  color: Whole = 0
  background: Whole = 0
  event: Whole = 0
  until: Whole = 0
  end: Whole = 1
  vanish: Real = 0.0
  flicker: Real = 0.0
  resize: Real = 0.0
  mix_shape: Real = 0.0
  mix_color: Real = 0.0
  mix_background: Real = 0.0
  faint: Real = 0.0
  ghost: Real = 0.0
  shift: Float32[HostArray, "*clips 2"] | tuple[float, float] = (0.0, 0.0)
  erode: Real = 0.0
  cut: Real = 0.0
  blur: Real = 0.0
  noise: Real = 0.0
  latent_noise: Real = 0.0
  seed: Whole = 0


def draw(states: FrameStates, look: Look, times: Int32[HostArray, " T"]) -> Float32[Array, "T 64 64 3"]:
  """Frames of an unbatched clip.

  Args:
    states: what every frame shows.
    look: how it looks.
    times: [T] int32, the frames' times, at least -512.

  Returns:
    RGB in [0, 1].
  """
  key = jax.random.key(look.seed)
  states = jax.tree.map(jnp.asarray, states)
  colors, backgrounds = shapes.palette(shapes.COLORS), shapes.palette(shapes.BACKGROUNDS)
  background = _mixed(backgrounds[states.background], backgrounds[look.background], look.mix_background)
  frames = background[:, None, None]
  growth = jnp.clip((times - look.event) / jnp.maximum(look.end - look.event, 1), 0.0, 1.0)
  opacity = _opacity(look, key, times)
  uneven = _cut_out(_outline_tile(), jax.random.fold_in(key, 0), times)[..., 0]
  for index in reversed(range(MOST_OBJECTS)):
    own = jnp.asarray(look.target == index, jnp.float32)
    radius = jnp.asarray(list(shapes.SIZES.values()), jnp.float32)[states.size[:, index]]
    radius = radius * jnp.exp(own * look.resize * growth)
    weights = _mixed(
      jax.nn.one_hot(states.shape[:, index], len(shapes.SHAPES)),
      jax.nn.one_hot(look.shape, len(shapes.SHAPES)),
      own * look.mix_shape,
    )
    outline = _Outline(radius, weights, own * look.erode * uneven, own * look.cut, jax.random.fold_in(key, 1))
    center, copy = states.center[:, index].astype(jnp.float32), own * look.ghost
    first = (1.0 - copy) * outline.coverage(center)
    second = copy * outline.coverage(center + jnp.asarray(look.shift)[None])
    seen = jnp.where(states.present[:, index], 1.0 + own * (opacity - 1.0), 0.0)
    coverage = seen[:, None, None, None] * jnp.minimum(first + second, 1.0)[..., None]
    color = _mixed(colors[states.color[:, index]], colors[look.color], own * look.mix_color)
    frames = frames + coverage * (color[:, None, None] - frames)
  return _soften(look, key, frames, times)


def _mixed(own: jax.Array, other: jax.Array, weight: Real) -> jax.Array:
  """[T, C] of `own [T, C]` and `other [C]`."""
  return own + weight * (other[None] - own)


def _opacity(look: Look, key: jax.Array, times: HostArray) -> jax.Array:
  """[T] of the target."""
  gone = (times >= look.event) & (times < look.until)
  return jnp.float32(1.0 - look.faint) * (1.0 - look.vanish * gone) * (1.0 - look.flicker * _per_frame(key, times))


class _Outline(NamedTuple):
  """What an object covers: radius [T], weights of the shapes [T, 3], shift of its outline [T, 64, 64], a cut."""

  radius: jax.Array
  weights: jax.Array
  uneven: jax.Array
  cut: jax.Array
  key: jax.Array

  def coverage(self, centers: HostArray) -> jax.Array:
    """[T, 64, 64] in [0, 1], at real-valued centres [T, 2]."""
    offsets = _torus_offsets(centers)
    x, y = offsets[:, None, :, 0], offsets[:, :, None, 1]
    radius = self.radius[:, None, None]
    distances = [shapes.signed_distance(shape, radius, x, y) for shape in range(len(shapes.SHAPES))]
    parts = [jnp.clip(0.5 - distance - self.uneven, 0.0, 1.0) for distance in distances]
    coverage = sum(weight[:, None, None] * part for weight, part in zip(self.weights.T, parts))
    angle = 2.0 * jnp.pi * jax.random.uniform(self.key)
    beyond = x * jnp.cos(angle) + y * jnp.sin(angle) - (radius - self.cut)
    return coverage * jnp.where(self.cut > 0, jnp.clip(0.5 - beyond, 0.0, 1.0), 1.0)


def _torus_offsets(centers: HostArray) -> jax.Array:
  """`[T, 64, 2]` shortest offsets (x, y) from real-valued centres `[T, 2]` to the middle of every column and row."""
  half = FRAME_SIZE / 2
  steps = jnp.arange(FRAME_SIZE, dtype=jnp.float32)[None, :, None] - centers[:, None, :]
  return jnp.mod(steps + half, FRAME_SIZE) - half + 0.5


@functools.cache
def _noise_tile() -> np.ndarray:
  """`[192, 192, 3]` standard normal numbers."""
  return np.random.default_rng(0).normal(size=(_TILE, _TILE, 3)).astype(np.float32)


@functools.cache
def _outline_tile() -> np.ndarray:
  """`[192, 192, 1]` noise that is smooth over a few pixels, with mean 0 and standard deviation 1."""
  white = np.random.default_rng(1).normal(size=(_TILE, _TILE))
  frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None])
  smooth = np.fft.irfft2(np.fft.rfft2(white) * np.exp(-0.5 * (frequency / 0.06) ** 2), s=white.shape)
  return (smooth / smooth.std()).astype(np.float32)[..., None]


def _cut_out(tile: np.ndarray | jax.Array, key: jax.Array, times: HostArray) -> jax.Array:
  """`[T, 64, 64, channels]` from random places of a tile, another one for every frame."""
  corners = jax.random.randint(key, (_RANDOM_FRAMES, 2), 0, _TILE - FRAME_SIZE)[times % _RANDOM_FRAMES]
  size = (FRAME_SIZE, FRAME_SIZE, tile.shape[-1])
  tile = jnp.asarray(tile)
  return jax.vmap(lambda corner: jax.lax.dynamic_slice(tile, (corner[0], corner[1], 0), size))(corners)


def _per_frame(key: jax.Array, times: HostArray) -> jax.Array:
  """`[T]` in [0, 1], random in every frame and the same whenever that frame is drawn."""
  table = jax.random.uniform(jax.random.fold_in(key, 2), (_RANDOM_FRAMES,))
  return table[times % _RANDOM_FRAMES]


def _soften(look: Look, key: jax.Array, frames: jax.Array, times: HostArray) -> jax.Array:
  """Blurs on the torus, adds noise and clips."""
  position = jnp.arange(FRAME_SIZE)
  distance = jnp.abs(position[:, None] - position[None, :])
  distance = jnp.minimum(distance, FRAME_SIZE - distance)
  kernel = jnp.exp(-0.5 * jnp.square(distance / jnp.maximum(look.blur, 0.2)))
  kernel = kernel / kernel.sum(axis=1, keepdims=True)
  frames = jnp.einsum("ij,tjkc,lk->tilc", kernel, frames, kernel)
  noise = _cut_out(_noise_tile(), jax.random.fold_in(key, 3), times)
  return jnp.clip(frames + look.noise * noise, 0.0, 1.0)
