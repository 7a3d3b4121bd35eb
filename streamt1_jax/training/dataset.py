"""The encoded clips that the tiny causal DiT is trained on: scenes of the split "train", drawn and encoded once."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Float16, Int32, Shaped

from streamt1_jax.config import ModelConfig
from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import Description
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.training import world_clips
from streamt1_jax.training.world_clips import ClipShares

CHUNKS = 7
"""Chunks of a whole clip."""
OMISSIONS = tuple(itertools.product((False, True), (False, True), (False, True), (False, True)))
"""What captions leave out: size and speed of the first object, size and speed of the second."""
EncodeClip = Callable[[Float[Array, "T height width 3"]], Float[Array, "F C H W"]]
"""Frames [T, height, width, 3] in [-1, 1] to latents [F, C, H, W]."""
_CODEC_FRAMES = 324  # frames encoded at once; a bound on memory


@dataclasses.dataclass(frozen=True)
class DatasetSize:
  """How much is encoded.

  Attributes:
    whole_clips: whole clips, each of another scene.
    scenes: scenes with first chunks.
    starts: start positions of each of them.
    shares: which clips.
    seed: draws them.
  """

  whole_clips: int
  scenes: int
  starts: int
  shares: ClipShares
  seed: int


class Dataset(NamedTuple):
  """Encoded training clips: N whole ones, and the first chunks of M scenes from S starts each.

  Attributes:
    clips: latents of whole clips.
    tokens: captions of each clip's last description, with all `OMISSIONS`.
    sink_tokens: the caption of its first chunk, complete.
    switch: as in `TrainingClip`.
    late: as in `TrainingClip`.
    gap: as in `TrainingClip`.
    first: latents of first chunks.
    first_start: rows of `shapes.START_POSITIONS`.
    first_tokens: captions, with all `OMISSIONS`.
    values: size and speed of both objects; of a second one that is not there 0.
    colors: colours of both objects; of a second one that is not there 0.
    background: backgrounds.
    ambiguous: whether both an object and the background have colours that either may have.
    made: the first R of the clips, with the chunks that are learned as a model made them (`rollouts`).
  """

  clips: Float[Array, "N 7 F C H W"]
  tokens: Int32[Array, "N 16 X"]
  sink_tokens: Int32[Array, "N X"]
  switch: Int32[Array, " N"]
  late: Bool[Array, " N"]
  gap: Int32[Array, " N"]
  first: Float[Array, "M S F C H W"]
  first_start: Int32[Array, "M S"]
  first_tokens: Int32[Array, "M 16 X"]
  values: Int32[Array, "M 2 2"]
  colors: Int32[Array, "M 2"]
  background: Int32[Array, " M"]
  ambiguous: Bool[Array, " M"]
  made: Float[Array, "R 7 F C H W"]


def encode_states(
  encode_clip: EncodeClip, clips: Iterator[world.FrameStates], count: int, frames: int
) -> Float16[np.ndarray, "{count} F C H W"]:
  """Latents float16 `[count, F', C, H, W]` of clips of `frames` frames, in slices that fit in memory."""
  together = max(1, _CODEC_FRAMES // frames)

  @jax.jit
  def encode(states):
    drawn = 2.0 * world.draw(states) - 1.0
    return jax.vmap(encode_clip)(drawn.reshape(-1, frames, *drawn.shape[1:]))

  pieces = []
  for begin in range(0, count, together):
    found = [next(clips) for _ in range(min(together, count - begin))]
    padded = world_clips.joined(found + found[-1:] * (together - len(found)))
    pieces.append(np.asarray(encode(padded)[: len(found)], np.float16))
  return np.concatenate(pieces)


def encode_dataset(
  encode_clip: EncodeClip, model: ModelConfig, tokenizer: Tokenizer, size: DatasetSize
) -> dict[str, Shaped[np.ndarray, " ..."]]:
  """The fields of a `Dataset`.

  Args:
    encode_clip: the codec's encoder.
    model: sizes.
    tokenizer: of captions.
    size: how much.
  """
  rng = np.random.default_rng(size.seed)
  stride, shape = model.required_codec.temporal_stride, model.latent_shape
  first, later = 1 + stride * (model.chunk_frames - 1), stride * model.chunk_frames
  draw = lambda: world_clips.training_clip(rng, size.shares, CHUNKS, first, later, "train")
  drawn = [draw() for _ in range(size.whole_clips)]
  clips = encode_states(encode_clip, (clip.states for clip in drawn), len(drawn), first + later * (CHUNKS - 1))

  number = lambda: 1 + int(rng.random() < size.shares.two_objects)
  scenes = [world.draw_description(rng, "train", number()) for _ in range(size.scenes)]
  starts = np.stack([rng.permutation(len(shapes.START_POSITIONS))[: size.starts] for _ in scenes])
  states = (
    world.play([scene], [0], world.starts_of(shapes.START_POSITIONS[start]), np.arange(first))
    for scene, row in zip(scenes, starts, strict=True)
    for start in row
  )
  firsts = encode_states(encode_clip, states, starts.size, first)
  return {
    "clips": clips.reshape(len(drawn), CHUNKS, *shape),
    "tokens": np.stack([captions(tokenizer, clip.description) for clip in drawn]),
    "sink_tokens": np.stack([captions(tokenizer, clip.sink)[0] for clip in drawn]),
    "switch": np.array([clip.switch for clip in drawn], np.int32),
    "late": np.array([clip.late for clip in drawn]),
    "gap": np.array([clip.gap for clip in drawn], np.int32),
    "first": firsts.reshape(*starts.shape, *shape),
    "first_start": starts.astype(np.int32),
    "first_tokens": np.stack([captions(tokenizer, scene) for scene in scenes]),
    "values": _of_both(scenes, lambda thing: (thing.size, thing.speed), (0, 0)),
    "colors": _of_both(scenes, lambda thing: thing.color, 0),
    "background": np.array([scene.background for scene in scenes], np.int32),
    "ambiguous": np.array([is_ambiguous(scene) for scene in scenes]),
  }


def captions(tokenizer: Tokenizer, description: Description) -> Int32[np.ndarray, "16 X"]:
  """[16, X] int32 tokens of the captions of a description, with all `OMISSIONS`."""
  ids = {}
  for omit in OMISSIONS:
    # What is left out of an object that is not there changes nothing.
    given = (omit[:2], omit[2:])[: len(description.things)]
    if given not in ids:
      ids[given] = tokenizer(world.caption(world.without(description, given))).ids
  rows = [ids[(omit[:2], omit[2:])[: len(description.things)]] for omit in OMISSIONS]
  return np.stack(rows).astype(np.int32)


def _of_both(scenes: Sequence[Description], read: Callable, missing) -> np.ndarray:
  pairs = [[*map(read, scene.things), missing][: world.MOST_OBJECTS] for scene in scenes]
  return np.array(pairs, np.int32)


def is_ambiguous(description: Description) -> bool:
  """Whether an object and the background could exchange their colours: both exist for objects and for backgrounds.

  Which is which is said by the order of words alone: "a blue circle ... dark green".
  """
  backgrounds, colors = list(shapes.BACKGROUNDS), list(shapes.COLORS)
  hued = any(color in backgrounds[description.background] for color in colors)
  return hued and any(any(colors[t.color] in name for name in backgrounds) for t in description.things)


def read_or_encode(
  encode_clip: EncodeClip, model: ModelConfig, tokenizer: Tokenizer, size: DatasetSize, cache: epath.Path
) -> Dataset:
  """The dataset of the file `cache`, which is made if it is missing."""
  if not cache.exists():
    fields = encode_dataset(encode_clip, model, tokenizer, size)
    partial = cache.with_name(f".{cache.name}.partial")
    with partial.open("wb") as file:
      np.savez(file, allow_pickle=False, **fields)
    partial.replace(cache)
  with cache.open("rb") as file:
    return make_dataset(np.load(file))


def make_dataset(fields: Mapping[str, Shaped[np.ndarray, " ..."]]) -> Dataset:
  """The dataset of what `encode_dataset` made, without clips that a model made."""
  read = {name: jnp.asarray(fields[name]) for name in Dataset._fields if name != "made"}
  return Dataset(**read, made=read["clips"][:0])
