"""Clips of the shapes world with the defects that generated videos have: what the learned rewards are trained on.

  Appearance ── time warp ── two objects, mixed shapes and colours, opacity ── blur, noise ── frames [T, 64, 64, 3]

An `Appearance` without defects draws what `shapes.render` draws. Every defect is a number, and zero
means no defect, so that a pair of clips can differ in the degree of a defect alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax.data import shapes
from streamt1_jax.data.shapes import FRAME_SIZE, Scene
from streamt1_jax.typing import HostArray, IntLike

_RANDOM_FRAMES = 512  # randomness per frame repeats after so long
_TILE = 3 * FRAME_SIZE  # noise is cut out of a fixed tile: drawing it for every frame costs more than all else


class Appearance(NamedTuple):
  """How one clip looks; scalars but for `shift`. Times are in frames of the window.

  Attributes:
    scene: what is shown.
    other: where shape, colour or scene are mixed, what they are mixed with.
    offset: int32, frame of the world at time 0.
    length: int32, frames of the window.
    event: int32, time at which something happens.
    until: int32, time at which it is over (vanishing only).
    freeze: 1 stops all motion at the event.
    turn: 1 reverses it.
    jump: int32, frames of the world that are skipped at the event.
    morph: 1 makes `other` out of `scene` at the event.
    vanish: loss of opacity between `event` and `until`.
    flicker: largest loss of opacity, random in every frame.
    resize: logarithm of the growth of the object from `event` to the end.
    mix_shape: weight of the other's shape.
    mix_color: weight of the other's object colour.
    mix_background: weight of the other's background.
    faint: loss of opacity.
    ghost: share of the opacity that a second copy has.
    shift: [2] float32 (x, y) pixels from the object to its second copy.
    erode: standard deviation in pixels of the random shift of the outline.
    cut: pixels from the object's centre to a straight cut, counted from the rim; 0 cuts nothing.
    blur: standard deviation in pixels.
    noise: standard deviation, frames being in [0, 1].
    latent_noise: standard deviation of noise added to latents, in a codec whose latents have standard deviation 1.
    key: decides all randomness of the clip.
  """

  scene: Scene
  other: Scene
  offset: jax.Array
  length: IntLike
  event: jax.Array
  until: jax.Array
  freeze: jax.Array
  turn: jax.Array
  jump: jax.Array
  morph: jax.Array
  vanish: jax.Array
  flicker: jax.Array
  resize: jax.Array
  mix_shape: jax.Array
  mix_color: jax.Array
  mix_background: jax.Array
  faint: jax.Array
  ghost: jax.Array
  shift: jax.Array
  erode: jax.Array
  cut: jax.Array
  blur: jax.Array
  noise: jax.Array
  latent_noise: jax.Array
  key: jax.Array


def flawless(scene: Scene, offset: jax.Array, length: IntLike, key: jax.Array) -> Appearance:
  """`scene` as it is."""
  zero = jnp.float32(0.0)
  defects = {name: zero for name in Appearance._fields if name not in ("scene", "other", "offset", "length", "key")}
  never = {"event": jnp.int32(length), "until": jnp.int32(length), "jump": jnp.int32(0), "shift": jnp.zeros(2)}
  return Appearance(scene=scene, other=scene, offset=offset, length=length, key=key, **defects | never)


def draw(look: Appearance, times: HostArray) -> jax.Array:
  """Frames of an unbatched appearance.

  Args:
    look: unbatched.
    times: `[T]` int32, at least -512; in any order, with or without gaps.

  Returns:
    `[T, 64, 64, 3]` float32 RGB in [0, 1].
  """
  after = times >= look.event
  elapsed = (times - look.event).astype(jnp.float32)
  warped = jnp.where(after & (look.freeze > 0), look.event, times)
  warped = jnp.where(after & (look.turn > 0), 2 * look.event - times, warped)
  frame = look.offset + warped + look.jump * after
  became_other = after & (look.morph > 0)
  now = jax.tree.map(lambda a, b: jnp.where(_like(became_other, a), b[None], a[None]), look.scene, look.other)
  centers = now.start + _velocity(now) * frame[:, None]
  progress = jnp.clip(elapsed / jnp.maximum(look.length - look.event, 1), 0.0, 1.0)
  radius = jnp.asarray(list(shapes.SIZES.values()), jnp.float32)[now.size] * jnp.exp(look.resize * progress)

  fields = _cut_out(_outline_tile(), jax.random.fold_in(look.key, 0), times)[..., 0]
  mixed = look.mix_shape * jax.nn.one_hot(look.other.shape, len(shapes.SHAPES))[None]
  weights = (1.0 - look.mix_shape) * jax.nn.one_hot(now.shape, len(shapes.SHAPES)) + mixed
  covered = lambda where: _coverage(look, where, radius, weights, fields)
  gone = (times >= look.event) & (times < look.until)
  opacity = (1.0 - look.faint) * (1.0 - look.vanish * gone) * (1.0 - look.flicker * _per_frame(look.key, times))
  opacity = opacity[:, None, None]
  first = opacity * (1.0 - look.ghost) * covered(centers.astype(jnp.float32))
  second = opacity * look.ghost * covered(centers + look.shift[None])
  coverage = jnp.minimum(first + second, 1.0)[..., None]

  color = _mix(shapes.palette(shapes.COLORS), now.color, look.other.color, look.mix_color)
  background = _mix(shapes.palette(shapes.BACKGROUNDS), now.background, look.other.background, look.mix_background)
  frames = background + coverage * (color - background)
  return _soften(look, frames, times)


def _velocity(scene: Scene) -> jax.Array:
  direction = jnp.asarray(list(shapes.DIRECTIONS.values()), jnp.int32)[scene.direction]
  return direction * jnp.asarray(list(shapes.SPEEDS.values()), jnp.int32)[scene.speed][:, None]


def _like(mask: HostArray, field: jax.Array) -> HostArray:
  """[T] to [T, 1, ...] with one more axis for each axis of `field`."""
  return mask.reshape(-1, *(1,) * field.ndim)


def _mix(palette: jax.Array, index: jax.Array, other: IntLike, weight: jax.Array) -> jax.Array:
  """Colours `[T, 1, 1, 3]` of indices `[T]`, mixed with the colour of `other`."""
  return ((1.0 - weight) * palette[index] + weight * palette[other][None])[:, None, None]


def _coverage(look: Appearance, centers: jax.Array, radius: jax.Array, weights: jax.Array, fields: jax.Array):
  """`[T, 64, 64]` in [0, 1] of objects at `centers [T, 2]`; shapes are mixed with `weights [T, 3]`."""
  offsets = _torus_offsets(centers)
  x, y = offsets[:, None, :, 0], offsets[:, :, None, 1]
  distances = [shapes.signed_distance(s, radius[:, None, None], x, y) for s in range(len(shapes.SHAPES))]
  uneven = look.erode * fields
  parts = [jnp.clip(0.5 - distance - uneven, 0.0, 1.0) for distance in distances]
  coverage = sum(weight[:, None, None] * part for weight, part in zip(weights.T, parts))
  angle = 2.0 * jnp.pi * jax.random.uniform(jax.random.fold_in(look.key, 1))
  beyond = x * jnp.cos(angle) + y * jnp.sin(angle) - (radius[:, None, None] - look.cut)
  return coverage * jnp.where(look.cut > 0, jnp.clip(0.5 - beyond, 0.0, 1.0), 1.0)


def _torus_offsets(centers: jax.Array) -> jax.Array:
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


def _soften(look: Appearance, frames: jax.Array, times: HostArray) -> jax.Array:
  """Blurs on the torus, adds noise and clips."""
  position = jnp.arange(FRAME_SIZE)
  distance = jnp.abs(position[:, None] - position[None, :])
  distance = jnp.minimum(distance, FRAME_SIZE - distance)
  kernel = jnp.exp(-0.5 * jnp.square(distance / jnp.maximum(look.blur, 0.2)))
  kernel = kernel / kernel.sum(axis=1, keepdims=True)
  frames = jnp.einsum("ij,tjkc,lk->tilc", kernel, frames, kernel)
  noise = _cut_out(_noise_tile(), jax.random.fold_in(look.key, 3), times)
  return jnp.clip(frames + look.noise * noise, 0.0, 1.0)
