"""The encoded clips that the tiny causal DiT is trained on: every scene of the split "train", encoded once."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float32, Int32

from streamt1_jax.config import ModelConfig
from streamt1_jax.data import shapes
from streamt1_jax.text.tokenizer import Tokenizer

CHUNKS = 7
"""Chunks of a whole clip."""
EncodeClip = Callable[[jax.Array], jax.Array]
"""Frames [T, height, width, 3] in [-1, 1] to latents [F, C, H, W]."""
_CODEC_FRAMES = 640  # frames encoded at once; a bound on memory


class Dataset(NamedTuple):
  """Encoded training clips; M scenes of the split "train".

  Attributes:
    attributes: attribute indices, in the order of `shapes.Attributes`.
    clips: latents of whole clips.
    first: latents of first chunks from every start position.
    tokens: captions: complete, without size, without speed, without both.
  """

  attributes: Int32[Array, "M 6"]
  clips: Float32[Array, "M starts 7 F C H W"]
  first: Float32[Array, "M 16 F C H W"]
  tokens: Int32[Array, "M 4 X"]


def encode_scenes(encode_clip: EncodeClip, attributes: np.ndarray, starts: np.ndarray, num_frames: int) -> np.ndarray:
  """Latents `[n, F', C, H, W]` of clips with `attributes [n, 6]` from `starts [n, 2]`, in slices that fit in memory."""

  @jax.jit
  def encode(attributes, starts):
    scene = lambda a, s: shapes.Scene(*(a[i] for i in range(6)), start=s)
    frames = jax.vmap(lambda a, s: shapes.render(scene(a, s), jnp.arange(num_frames)))(attributes, starts)
    return jax.vmap(encode_clip)(2.0 * frames - 1.0)

  slice_size = max(1, _CODEC_FRAMES // num_frames)
  padded = -len(attributes) % slice_size
  pad = lambda x: np.concatenate([x, np.repeat(x[-1:], padded, axis=0)])
  pieces = zip(*(np.split(pad(x), len(pad(x)) // slice_size) for x in (attributes, starts)), strict=True)
  return np.concatenate([np.asarray(encode(a, s)) for a, s in pieces])[: len(attributes)]


def encode_dataset(
  encode_clip: EncodeClip, model: ModelConfig, starts_per_scene: int, seed: int
) -> dict[str, np.ndarray]:
  """`clips` and `first` of a `Dataset`.

  Args:
    encode_clip: the codec's encoder.
    model: sizes.
    starts_per_scene: how many of the 16 start positions the whole clips of a scene have; they are drawn.
    seed: draws them.
  """
  attributes = np.asarray(shapes.scenes_in("train"), np.int32)
  rng, starts, shape = np.random.default_rng(seed), shapes.START_POSITIONS, model.latent_shape
  frames = lambda chunks: 1 + model.required_codec.temporal_stride * (model.chunk_frames * chunks - 1)
  chosen = np.concatenate([starts[rng.permutation(len(starts))[:starts_per_scene]] for _ in attributes])
  clips = encode_scenes(encode_clip, np.repeat(attributes, starts_per_scene, axis=0), chosen, frames(CHUNKS))
  every = np.tile(starts, (len(attributes), 1))
  first = encode_scenes(encode_clip, np.repeat(attributes, len(starts), axis=0), every, frames(1))
  return {
    "clips": clips.reshape(len(attributes), starts_per_scene, CHUNKS, *shape),
    "first": first.reshape(len(attributes), len(starts), *shape),
  }


def make_dataset(latents: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> Dataset:
  """The dataset of what `encode_dataset` encoded."""
  attributes = np.asarray(shapes.scenes_in("train"), np.int32)
  omissions = ((False, False), (True, False), (False, True), (True, True))

  def ids(scene: np.ndarray) -> list[np.ndarray]:
    words = shapes.Attributes(*map(int, scene))
    return [tokenizer(shapes.caption(*words, *omit)).ids for omit in omissions]

  tokens = np.stack([np.stack(ids(a)) for a in attributes])
  return Dataset(*map(jnp.asarray, (attributes, latents["clips"], latents["first"], tokens)))


def read_or_encode(
  encode_clip: EncodeClip, model: ModelConfig, tokenizer: Tokenizer, starts_per_scene: int, seed: int, cache: epath.Path
) -> Dataset:
  """The dataset, of the latents in the file `cache`, which is made if it is missing; as of `encode_dataset`."""
  if not cache.exists():
    latents = encode_dataset(encode_clip, model, starts_per_scene, seed)
    partial = cache.with_name(f".{cache.name}.partial")
    with partial.open("wb") as file:
      np.savez(file, allow_pickle=False, **latents)
    partial.replace(cache)
  with cache.open("rb") as file:
    return make_dataset(np.load(file), tokenizer)
