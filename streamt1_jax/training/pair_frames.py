"""The frames of pairs of clips, drawn on the device.

clips ──┬─ draw ── encode, noise, decode ─┬─ frames uint8: better, and worse since some time
        └─ draw ──────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.training import appearance, preferences
from streamt1_jax.training.preferences import Clips, Pair
from streamt1_jax.typing import HostArray

CODEC_CONTEXT = 5
"""Frames that the codec sees for each frame that is drawn through it: the frame and the four before it."""

Codec = Callable[..., Float[Array, "64 64 3"]]
"""Frames [5, 64, 64, 3] in [-1, 1], the standard deviation of noise added to their latents, and its key, to the last
frame [64, 64, 3], decoded."""


def through_codec(codec: VideoCodec) -> Codec:
  """Encodes, adds noise, decodes."""

  def last_frame(frames: jax.Array, noise: jax.Array, key: jax.Array) -> jax.Array:
    latents = codec.encoder.encode(frames)
    return codec.decoder.decode(latents + noise * jax.random.normal(key, latents.shape))[-1]

  return last_frame


class PairClips(NamedTuple):
  """The clips of B pairs as arrays, (better, worse) of each; the first `coded` pairs go through the codec.

  Attributes:
    coded: with the frames that the codec sees: T is 5 n.
    plain: the others; T is n.
    since: when the worse clip begins to be another one.
  """

  coded: tuple[Clips, Clips] | None
  plain: tuple[Clips, Clips] | None
  since: Int32[HostArray, " B"]


def pair_clips(pairs: Sequence[Pair], times: Int32[np.ndarray, " n"], coded: int) -> PairClips:
  """The clips of pairs, on the host; the first `coded` of them for the codec."""

  def arrays(some: Sequence[Pair], at: np.ndarray) -> tuple[Clips, Clips] | None:
    if not some:
      return None
    sides = [pair.better for pair in some], [pair.worse for pair in some]
    better, worse = (preferences.clip_arrays(side, at) for side in sides)
    return better, worse

  context = (times[:, None] + np.arange(1 - CODEC_CONTEXT, 1)[None]).reshape(-1).astype(np.int32)
  since = np.array([pair.since for pair in pairs], np.int32)
  return PairClips(arrays(pairs[:coded], context), arrays(pairs[coded:], times), since)


def draw(
  clips: PairClips, times: Int32[HostArray, " n"], codec: Codec
) -> tuple[UInt8[Array, "B n 64 64 3"], UInt8[Array, "B n 64 64 3"]]:
  """Frames of the better and the worse clips at `times`. Can be jitted."""
  sides = []
  for side in range(2):
    parts = []
    if clips.coded is not None:
      parts.append(jax.vmap(lambda clip: _through(clip, times, codec))(clips.coded[side]))
    if clips.plain is not None:
      parts.append(jax.vmap(lambda clip: to_bytes(appearance.draw(clip.states, clip.look, times)))(clips.plain[side]))
    sides.append(jnp.concatenate(parts))
  better, worse = sides
  is_worse = times[None] >= clips.since[:, None]
  return better, jnp.where(is_worse[..., None, None, None], worse, better)


def _through(clip: Clips, times: HostArray, codec: Codec) -> jax.Array:
  """Every frame by itself, with the frames before it."""
  context = jnp.arange(1 - CODEC_CONTEXT, 1)
  states = jax.tree.map(lambda x: x.reshape(-1, CODEC_CONTEXT, *x.shape[1:]), clip.states)

  def one(states, time):
    frames = appearance.draw(states, clip.look, time + context)
    key = jax.random.fold_in(jax.random.key(clip.look.seed), time)
    return to_bytes(0.5 * codec(2.0 * frames - 1.0, clip.look.latent_noise, key) + 0.5)

  return jax.vmap(one)(states, times)


def to_bytes(frames: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
  """Truncates, as the decoder of videos does."""
  return (255.0 * jnp.clip(frames, 0.0, 1.0)).astype(jnp.uint8)
