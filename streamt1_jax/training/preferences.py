"""Pairs of clips, the first of which is better: the small reward models learn from them.

  caption ──┬─ the clip it describes ────────────────┐
            └─ the same with one corruption, or more ┴─ looks shared by both (codec, blur, noise) ── frames uint8

`corruptions` has the corruptions, `scene_pairs` says which scenes make pairs.

Windows have the lengths that a search shows to a video reward. Only the frames that the reward looks at are drawn. The
window of an image reward is one frame. Everything comes from keys, inside `jit`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt8

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import required
from streamt1_jax.data import shapes
from streamt1_jax.training import appearance
from streamt1_jax.training.appearance import Appearance
from streamt1_jax.training.corruptions import CORRUPTIONS, FAMILIES, FIELDS, NAMES, VISIBLE_FIELDS
from streamt1_jax.training.scene_pairs import Neighbours
from streamt1_jax.typing import HostArray, IntLike

CODEC_CONTEXT = 5
"""Frames that the codec sees for each frame that is drawn through it: the frame and the four before it."""


@dataclasses.dataclass(frozen=True)
class PairConfig:
  """How pairs are drawn.

  Attributes:
    count: pairs.
    on_frames: single frames for an image reward instead of windows.
    through_codec: how many of the pairs go through the codec.
    omit_probability: how often a caption leaves out the size, and how often the speed, unless the pair is about it.
    milder_probability: how often the better clip has the same defect, only less of it.
    soft_probability: how often both clips are slightly blurred and noisy.
    emphasis: pairs (corruption, factor): the factor multiplies how often the corruption is drawn.
  """

  count: int
  on_frames: bool
  through_codec: int = 0
  omit_probability: float = 0.2
  milder_probability: float = 0.25
  soft_probability: float = 0.5
  emphasis: tuple[tuple[str, float], ...] = ()


class Pairs(NamedTuple):
  """B pairs; n frames each.

  Attributes:
    better: the clips that should win.
    worse: the clips that should lose.
    kind: index into `NAMES`.
    late: whether only the newest chunk of the window is worse.
    scene: row of the captioned scene.
    other: row of a scene of another caption; the worse clip shows it if the corruption is of the family
      "text".
    omit_size: whether captions leave the size out.
    omit_speed: whether captions leave the speed out.
  """

  better: UInt8[Array, "B n 64 64 3"]
  worse: UInt8[Array, "B n 64 64 3"]
  kind: Int32[Array, " B"]
  late: Bool[Array, " B"]
  scene: Int32[Array, " B"]
  other: Int32[Array, " B"]
  omit_size: Bool[Array, " B"]
  omit_speed: Bool[Array, " B"]


Codec = Callable[..., jax.Array]
"""Frames [5, 64, 64, 3] in [-1, 1], the standard deviation of noise added to their latents, and its key, to the last
frame [64, 64, 3], decoded."""


def through_codec(codec: VideoCodec) -> Codec:
  """Encodes, adds noise, decodes."""

  def last_frame(frames: jax.Array, noise: jax.Array, key: jax.Array) -> jax.Array:
    latents = codec.encoder.encode(frames)
    return codec.decoder.decode(latents + noise * jax.random.normal(key, latents.shape))[-1]

  return last_frame


def draw_pairs(
  key: jax.Array,
  scenes: Neighbours,
  config: PairConfig,
  times: HostArray,
  length: IntLike,
  codec: Codec | None = None,
  kind: jax.Array | None = None,
) -> Pairs:
  """Draws `config.count` pairs.

  Args:
    key: decides everything.
    scenes: which scenes make pairs.
    config: how many, and how.
    times: [n] int32, frames of the window that are looked at; one frame for an image reward.
    length: int32, frames of the window.
    codec: what the first `config.through_codec` pairs go through.
    kind: int32, index into `NAMES` of the only corruption; None draws from all.
  """
  draws = jax.vmap(lambda k: _draw_pair(k, scenes, config, length, kind))(jax.random.split(key, config.count))
  split = config.through_codec
  head, tail = jax.tree.map(lambda x: x[:split], draws), jax.tree.map(lambda x: x[split:], draws)
  parts = []
  if split:
    through = required(codec, "the codec")
    parts.append(_pair_frames(head, times, lambda look, t: _frames_through_codec(look, t, through)))
  if split < config.count:
    parts.append(_pair_frames(tail, times, lambda look, t: _to_bytes(appearance.draw(look, t))))
  better, worse = (jnp.concatenate(clips) for clips in zip(*parts))
  return draws.pair._replace(better=better, worse=worse)


class _Draw(NamedTuple):
  """One pair before its frames are drawn. The worse clip is the better one before `since`; `pair` has no frames yet."""

  better: Appearance
  worse: Appearance
  since: jax.Array
  pair: Pairs


def _draw_pair(key: jax.Array, scenes: Neighbours, config: PairConfig, length: IntLike, kind: jax.Array | None):
  keys = iter(jax.random.split(key, 24))
  uniform = lambda low=0.0, high=1.0: jax.random.uniform(next(keys), (), minval=low, maxval=high)
  chance = lambda probability: jax.random.bernoulli(next(keys), probability)
  below = lambda limit: jax.random.randint(next(keys), (), 0, limit)
  drawn = jax.random.choice(next(keys), len(NAMES), p=_shares(config))
  kind = drawn if kind is None else kind
  field = jax.random.categorical(next(keys), jnp.log(_field_weights(config))[kind])
  row = scenes.rows[field, below(scenes.num_rows[field])]
  other_row = scenes.others[row, field, below(scenes.num_others[row, field])]

  start = jnp.asarray(shapes.START_POSITIONS)[below(len(shapes.START_POSITIONS))]
  table = jnp.asarray(shapes.all_scenes(), jnp.int32)
  scene, other = (shapes.Scene(*table[index], start=start) for index in (row, other_row))
  offset = jnp.where(chance(0.5), 0, below(shapes.FRAME_SIZE))
  soft = chance(config.soft_probability)
  better = appearance.flawless(scene, offset, length, next(keys))
  better = better._replace(other=other, blur=soft * uniform(0.0, 0.8), noise=soft * uniform(0.0, 0.03))

  strength = uniform(_WEAKEST, 1.0)
  milder = jnp.where(chance(config.milder_probability), strength - uniform(_WEAKEST, 1.0), 0.0)
  corrupt_key = next(keys)
  worse = _corrupted(corrupt_key, better._replace(key=next(keys)), kind, strength, length, config)
  graded = _corrupted(corrupt_key, better, kind, milder, length, config)
  use_graded = (milder > 0) & _is_graded()[kind]
  better = jax.tree.map(lambda a, b: jnp.where(use_graded, a, b), graded, better)

  late = ~jnp.asarray(config.on_frames) & (_family(kind) != FAMILIES.index("motion")) & chance(_LATE_PROBABILITY)
  # A first chunk is shorter: all of it would be worse.
  late &= length > _LAST_CHUNK
  omitted = lambda name: chance(config.omit_probability) & (field != FIELDS.index(name))
  return _Draw(
    better=better,
    worse=worse,
    since=jnp.where(late, length - _LAST_CHUNK, -_LONG_AGO),
    # The frames are not drawn yet.
    pair=cast(Any, Pairs)(None, None, kind, late, row, other_row, omitted("size"), omitted("speed")),
  )


_WEAKEST = 0.35
_LAST_CHUNK = 12  # frames of a later chunk
_LATE_PROBABILITY = 0.4
_LONG_AGO = 400
_GRADED = ("blur", "noise", "ghost", "faint", "eroded", "mixed_shape", "mixed_color", "flicker", "vanish", "resize")


def _corrupted(key, look: Appearance, kind, strength, length, config: PairConfig) -> Appearance:
  """`look` with a defect; `strength` is in (0, 1]."""
  keys = iter(jax.random.split(key, 16))
  uniform = lambda low=0.0, high=1.0: jax.random.uniform(next(keys), (), minval=low, maxval=high)
  sign = lambda: jnp.where(jax.random.bernoulli(next(keys)), 1, -1)
  of = lambda *names: jnp.any(jnp.stack([kind == NAMES.index(name) for name in names])) * strength
  is_kind = lambda name: (kind == NAMES.index(name)).astype(jnp.float32)

  # Events leave a few frames to be seen in; often they are in the newest chunk, where candidates of a search differ.
  latest = jnp.maximum(length - 5, 0)
  earliest = jnp.where(jax.random.bernoulli(next(keys), _LATE_PROBABILITY), jnp.maximum(length - _LAST_CHUNK, 0), 0)
  event = jax.random.randint(next(keys), (), earliest, latest + 1)
  if config.on_frames:
    event = jnp.int32(-_LONG_AGO)
  lasting = jnp.maximum(_LAST_CHUNK, (uniform(0.3, 1.0) * length).astype(jnp.int32))
  until = event + lasting + (2 * _LONG_AGO if config.on_frames else 0)

  radius = jnp.asarray(list(shapes.SIZES.values()), jnp.float32)[look.scene.size]
  speed = jnp.asarray(list(shapes.SPEEDS.values()), jnp.float32)[look.scene.speed]
  angle, distance = uniform(0.0, 2 * np.pi), uniform(8.0, 28.0)
  eaten = jax.random.bernoulli(next(keys))
  scene = jax.tree.map(lambda a, b: jnp.where(_family(kind) == 0, b, a), look.scene, look.other)
  return look._replace(
    scene=scene,
    event=event,
    until=until,
    freeze=is_kind("freeze"),
    turn=is_kind("turn"),
    jump=jnp.round(is_kind("jump") * sign() * uniform(10.0, 31.0) / speed).astype(jnp.int32),
    morph=is_kind("morph"),
    vanish=of("vanish"),
    flicker=of("flicker"),
    resize=0.6 * sign() * of("resize"),
    mix_shape=0.5 * of("mixed_shape"),
    mix_color=0.6 * of("mixed_color"),
    mix_background=0.6 * of("mixed_color"),
    faint=0.8 * of("faint"),
    ghost=0.5 * of("ghost"),
    shift=distance * jnp.stack([jnp.cos(angle), jnp.sin(angle)]),
    erode=3.5 * of("eroded") * eaten,
    cut=1.3 * radius * of("eroded") * (1 - eaten),
    blur=look.blur + 3.0 * of("blur"),
    noise=look.noise + 0.15 * of("noise"),
    latent_noise=0.8 * of("noise"),
  )


def _pair_frames(draws: _Draw, times: HostArray, frames_of: Callable[[Appearance, HostArray], jax.Array]):
  def one(draw: _Draw):
    better, worse = frames_of(draw.better, times), frames_of(draw.worse, times)
    return better, jnp.where((times >= draw.since)[:, None, None, None], worse, better)

  return jax.vmap(one)(draws)


def _frames_through_codec(look: Appearance, times: HostArray, codec: Codec) -> jax.Array:
  def one(time):
    frames = appearance.draw(look, time + jnp.arange(1 - CODEC_CONTEXT, 1))
    key = jax.random.fold_in(look.key, time)
    return _to_bytes(0.5 * codec(2.0 * frames - 1.0, look.latent_noise, key) + 0.5)

  return jax.vmap(one)(times)


def _to_bytes(frames: jax.Array) -> jax.Array:
  """Truncates, as the decoder of videos does."""
  return (255.0 * jnp.clip(frames, 0.0, 1.0)).astype(jnp.uint8)


def _shares(config: PairConfig) -> jax.Array:
  """[kinds] probabilities."""
  drawn = lambda corruption: corruption.on_frames or not config.on_frames
  emphasis = dict(config.emphasis)
  shares = np.array([c.share * drawn(c) * emphasis.get(name, 1.0) for name, c in CORRUPTIONS.items()])
  return jnp.asarray(shares / shares.sum(), jnp.float32)


def _field_weights(config: PairConfig) -> jax.Array:
  """[kinds, fields] 1 where the other scene may differ in that field."""
  seen = VISIBLE_FIELDS if config.on_frames else FIELDS
  allowed = [[field in CORRUPTIONS[name].fields and field in seen for field in FIELDS] for name in NAMES]
  return jnp.asarray(allowed, jnp.float32)


def _is_graded() -> jax.Array:
  return jnp.asarray([name in _GRADED for name in NAMES])


def _family(kind: jax.Array) -> jax.Array:
  return jnp.asarray([FAMILIES.index(corruption.family) for corruption in CORRUPTIONS.values()])[kind]
