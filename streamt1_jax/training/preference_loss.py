"""What a small reward learns from: the preference loss, and readers that help it to see and to compare.

  pairs ── media tokens, once per clip ──┬─ decoder, with each of two captions ── scores ── Bradley and Terry
                                         └─ linear readers ── attributes of the object of every colour, next words;
                                                              where something is said: whether it is true, what is so

Batches of clips and captions at once; in a search a reward is called through its own interface, with the same result.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped, UInt8

from streamt1_jax.data import shapes
from streamt1_jax.rewards.qwen2_vl import preprocess
from streamt1_jax.rewards.qwen2_vl.config import VisionConfig
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens, Qwen2VL
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.videoalign import DIMENSIONS
from streamt1_jax.training.corruptions import CORRUPTIONS
from streamt1_jax.training.pair_labels import FIELDS, MOTION_FIELDS, UNKNOWN, Labels
from streamt1_jax.training.reward_text import CaptionTokens
from streamt1_jax.typing import FloatScalar, HostArray

Readers = dict[str, Float[HostArray, "M _"]]
"""A matrix [M, values] for everything that is read; every one has values of its own."""


@runtime_checkable
class RewardModel(Protocol):
  """The model of a learned reward."""

  backbone: Qwen2VL
  head: Any


class Pairs(NamedTuple):
  """B pairs; n frames each.

  Attributes:
    better: the clips that should win.
    worse: the clips that should lose.
    tokens: of their captions, by captions (right, other).
    said_at: where everything about the objects and the background is said, see `reward_text.said_at`.
    labels: what is known of them.
  """

  better: UInt8[HostArray, "B n 64 64 3"]
  worse: UInt8[HostArray, "B n 64 64 3"]
  tokens: CaptionTokens
  said_at: Int32[HostArray, "2 B 3"]
  labels: Labels


class _Kind(NamedTuple):
  """In what training an image reward and a video reward differ.

  Attributes:
    to_patches: pixels of one clip to patches.
    hidden: attributes that it cannot see.
    terms: keys of `preference_terms` beside those of every reward.
  """

  to_patches: Callable[[jax.Array, VisionConfig], jax.Array]
  hidden: tuple[str, ...] = ()
  terms: tuple[str, ...] = ()


_BY_KIND: Mapping[str, _Kind] = {
  "image": _Kind(preprocess.pictures_to_patches, hidden=MOTION_FIELDS),
  # A speed shows only as the way between two frames, and the time between them is not told, so in the shortest windows
  # it is ambiguous. Still, a VideoAlign whose media tokens need not name speeds never learned to compare them.
  "video": _Kind(preprocess.to_patches, terms=("change",)),
}
"""By `RewardSpec.kind`."""


def media_tokens(
  model: RewardModel, reward: RewardSpec, clips: UInt8[HostArray, "N n 64 64 3"]
) -> Float[Array, "N T M"]:
  """[N, T, dim] of clips [N, n, 64, 64, 3]: single pictures for an image reward, windows for a video reward."""
  vision = model.backbone.vision.config
  to_patches = _BY_KIND[reward.kind].to_patches
  patches = jax.vmap(lambda clip: to_patches(preprocess.normalise(clip), vision))(clips)
  _, _, height, width, _ = clips.shape
  grid = preprocess.grid_of((height, width), vision)
  tokens = model.backbone.vision(patches.reshape(-1, *patches.shape[2:]), grid)
  return tokens.reshape(clips.shape[0], -1, tokens.shape[-1])


class Reading(NamedTuple):
  """What a model makes of B pairs.

  Attributes:
    scores: captions (right, other) by clips (better, worse): mu (R = 1), or raw VQ, MQ and TA.
    media: media tokens of the better clips.
    hidden: hidden states of the text after them, with the right caption.
    said: what the decoder's blocks make of the three places where something is said, by captions and clips.
  """

  scores: Float32[Array, "2 2 B R"]
  media: Float[Array, "B T M"]
  hidden: Float[Array, "B Y M"]
  said: Float[Array, "2 2 B num_layers 3 M"]


def read_pairs(model: RewardModel, reward: RewardSpec, pairs: Pairs) -> Reading:
  """Reads both clips of every pair with both captions."""
  backbone, count = model.backbone, pairs.labels.kind.shape[0]
  media = media_tokens(model, reward, jnp.concatenate([pairs.better, pairs.worse]))
  # Captions outside, clips inside, as all that is read.
  texts = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0).reshape(-1, x.shape[-1]), pairs.tokens._replace(before=None))
  places = jnp.repeat(jnp.asarray(pairs.said_at), 2, axis=0).reshape(-1, pairs.said_at.shape[-1])
  positions = jnp.arange(texts.after.shape[-1])

  def read(media: jax.Array, after: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    prompt = backbone.embed_prompt(PromptTokens(pairs.tokens.before, after, positions))
    outputs = backbone.decoder.block_outputs(jnp.concatenate([prompt.before, media, prompt.after]))
    outputs = outputs[:, -len(positions) :]
    return backbone.decoder.final_norm(outputs[-1]), outputs[:, places]

  hidden, said = jax.vmap(read)(jnp.concatenate([media, media]), texts.after, places)
  scores = jax.vmap(lambda h, index: model.head(h[index])[..., 0])(hidden, texts.reward_index)
  said = said.reshape(2, 2, count, *said.shape[1:])
  return Reading(scores.reshape(2, 2, count, -1), media[:count], hidden[:count], said)


def bradley_terry(better: Float[Array, "*axes"], worse: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
  """-log sigmoid(better - worse)."""
  return jax.nn.softplus(worse - better)


@functools.cache
def _table(attribute: str) -> np.ndarray:
  """[kinds, 3] whether VQ, MQ and TA are in `attribute` of the corruption."""
  rows = [[d in getattr(corruption, attribute) for d in DIMENSIONS] for corruption in CORRUPTIONS.values()]
  return np.array(rows, np.float32)


def preference_terms(scores: Float32[Array, "2 2 B R"], labels: Labels) -> dict[str, FloatScalar]:
  """Losses and shares of pairs in the right order; `scores` as of `Reading`."""
  (better, worse), (better_other, worse_other) = scores
  # Text alignment comes last; the image reward has nothing else.
  alignment = lambda x: x[:, -1]
  caption = bradley_terry(alignment(better), alignment(better_other))
  exchanged = bradley_terry(alignment(worse_other), alignment(better_other))
  exchanged = exchanged + bradley_terry(alignment(worse_other), alignment(worse))
  total = bradley_terry(better.sum(axis=1), worse.sum(axis=1))
  terms = {"caption": caption.mean(), "exchanged": mean_where(exchanged, labels.shows_other), "clip": total.mean()}
  if scores.shape[-1] == len(DIMENSIONS):
    falls, stays = (jnp.asarray(_table(name))[labels.kind] for name in ("falls", "stays"))
    # What changes late changes while it moves, so motion quality may fall as well.
    stays = stays * jnp.where(labels.late & labels.is_text, 0.0, 1.0)[:, None]
    terms["clip"] = 0.5 * terms["clip"] + mean_where(bradley_terry(better, worse), falls > 0)
    terms["change"] = mean_where(jnp.square(better - worse), stays > 0)
  return terms | {
    "clips_right": (better.sum(axis=1) > worse.sum(axis=1)).mean(),
    "text_right": mean_where(better.sum(axis=1) > worse.sum(axis=1), labels.is_text),
    "captions_right": (alignment(better) > alignment(better_other)).mean(),
  }


def term_names(reward: RewardSpec) -> tuple[str, ...]:
  """Keys of all terms together."""
  names = ("caption", "exchanged", "clip", "clips_right", "text_right", "captions_right")
  names += ("naming", "named_right", "words", "correction", "truth", "truth_right")
  return names + _BY_KIND[reward.kind].terms


def mean_where(x: Shaped[Array, "*axes"], mask: Bool[HostArray, "*axes"]) -> FloatScalar:
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def seen_fields(reward: RewardSpec) -> tuple[str, ...]:
  """What the readers tell."""
  return tuple(field for field in FIELDS if field not in _BY_KIND[reward.kind].hidden)


def init_readers(reward: RewardSpec, dim: int, vocab_size: int) -> Readers:
  """Weights of the readers of `seeing_terms`, `telling_terms` and `comparing_terms`, all zero."""
  values = {field: len(shapes.attribute_names()[field]) for field in seen_fields(reward)}
  sizes = {f"name_{field}": number for field, number in values.items() if field != "color"}
  sizes |= {"name_there": len(shapes.COLORS)}
  sizes |= {f"correct_{field}": number for field, number in values.items()}
  sizes |= {"truth": len(FIELDS), "words": vocab_size}
  return {name: jnp.zeros((dim, number)) for name, number in sizes.items()}


def seeing_terms(readers: Readers, media: Float[Array, "B T M"], labels: Labels) -> dict[str, FloatScalar]:
  """Losses of what the media tokens [B, T, dim] of the better clips name.

  Which colours have an object, the attributes of the object of every colour, and the background. The attributes are
  read where the colour is: tokens need not say in the mean over a picture what belongs together, and one reader serves
  all colours.
  """
  colors = media @ readers["name_there"]
  there = colors.mean(axis=1)
  objects = jnp.einsum("btc,btd->bcd", jax.nn.softmax(colors, axis=1), media)
  known = labels.there != UNKNOWN
  losses = [mean_where(optax.sigmoid_binary_cross_entropy(there, jnp.maximum(labels.there, 0)), known)]
  right = [mean_where((there > 0) == (labels.there > 0), known)]
  read = {field: (labels.named[..., column], objects) for column, field in enumerate(FIELDS)}
  read["background"] = labels.background, media.mean(axis=1)
  for field in (field for field in read if f"name_{field}" in readers):
    label, seen = read[field]
    logits, known = seen @ readers[f"name_{field}"], label != UNKNOWN
    losses.append(mean_where(_cross_entropy(logits, jnp.maximum(label, 0)), known))
    right.append(mean_where(logits.argmax(axis=-1) == label, known))
  mean = lambda values: functools.reduce(operator.add, values) / len(values)
  return {"naming": mean(losses), "named_right": mean(right)}


def telling_terms(readers: Readers, reading: Reading, tokens: CaptionTokens) -> dict[str, FloatScalar]:
  """Cross entropy of the words of the better clips' captions, each foretold from those before it.

  What Qwen2-VL was trained with before it became a reward: it teaches the decoder to look an attribute up at the word
  that will name it.
  """
  following = tokens.after[0][:, 1:]
  is_text = jnp.arange(following.shape[1])[None] < tokens.reward_index[0][:, -1:]
  return {"words": mean_where(_cross_entropy(reading.hidden[:, :-1] @ readers["words"], following), is_text)}


def comparing_terms(readers: Readers, reading: Reading, labels: Labels, reward: RewardSpec) -> dict[str, FloatScalar]:
  """Losses where everything about an object or the background is said: whether it is true, and what is so instead.

  A preference tells that something in a caption is wrong; this tells what, and what the clip shows instead. A word and
  a clip must be compared: neither says anything alone, so preferences hardly teach it. What is so, and
  whether it is true, is read after the last block but one, so that the reward tokens can look at it.
  """
  said = _rms_normalised(reading.said[..., -2, :, :])
  truth = said @ readers["truth"]
  seen = np.array([field in seen_fields(reward) for field in FIELDS])
  known = (labels.is_true != UNKNOWN) & np.broadcast_to(seen, labels.is_true.shape)
  corrections = []
  for field in seen_fields(reward):
    label = labels.shown[..., FIELDS.index(field)]
    loss = _cross_entropy(said @ readers[f"correct_{field}"], jnp.maximum(label, 0))
    corrections.append(mean_where(loss, label != UNKNOWN))
  return {
    "correction": functools.reduce(operator.add, corrections) / len(corrections),
    "truth": mean_where(optax.sigmoid_binary_cross_entropy(truth, jnp.maximum(labels.is_true, 0)), known),
    "truth_right": mean_where((truth > 0) == (labels.is_true > 0), known),
  }


def _rms_normalised(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


_cross_entropy = optax.softmax_cross_entropy_with_integer_labels
