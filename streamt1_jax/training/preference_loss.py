"""What a small reward learns from: the preference loss, and readers that help the vision tower to see.

  pairs ── media tokens, once per clip ──┬─ decoder, with each of two captions ── scores ── Bradley and Terry
                                         └─ linear readers ── names of the attributes, next words,
                                                              the word that differs: what is true, whether it is

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
from jaxtyping import Array, Float, Float32, Int32

from streamt1_jax.data import shapes
from streamt1_jax.rewards.qwen2_vl import preprocess
from streamt1_jax.rewards.qwen2_vl.config import VisionConfig
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens, Qwen2VL
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.videoalign import DIMENSIONS
from streamt1_jax.training import preferences
from streamt1_jax.training.preferences import Pairs
from streamt1_jax.training.reward_text import CaptionTokens


@runtime_checkable
class RewardModel(Protocol):
  """The model of a learned reward."""

  backbone: Qwen2VL
  head: Any


class _Kind(NamedTuple):
  """In what training an image reward and a video reward differ.

  Attributes:
    to_patches: pixels of one clip to patches.
    fields: attributes that the readers name beside those that a single frame shows.
    terms: keys of `preference_terms` beside those of every reward.
  """

  to_patches: Callable[[jax.Array, VisionConfig], jax.Array]
  fields: tuple[str, ...] = ()
  terms: tuple[str, ...] = ()


_BY_KIND: Mapping[str, _Kind] = {
  "image": _Kind(preprocess.pictures_to_patches),
  # A speed shows only as the way between two frames, and the time between them is not told, so in the shortest windows
  # it is ambiguous. Still, a VideoAlign whose media tokens need not name speeds never learned to compare them.
  "video": _Kind(preprocess.to_patches, fields=("direction", "speed"), terms=("change",)),
}
"""By `RewardSpec.kind`."""


def media_tokens(model: RewardModel, reward: RewardSpec, clips: jax.Array) -> jax.Array:
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
    tokens: what that text is; fields have a leading [B].
    differing: the first token in which the two captions differ, in either.
    compared: what the decoder's blocks make of that token, by captions and clips.
  """

  scores: Float32[Array, "2 2 B R"]
  media: Float[Array, "B T M"]
  hidden: Float[Array, "B Y M"]
  tokens: PromptTokens
  differing: Int32[Array, "2 B"]
  compared: Float[Array, "2 2 B num_layers M"]


def read_pairs(model: RewardModel, reward: RewardSpec, captions: CaptionTokens, pairs: Pairs) -> Reading:
  """Reads both clips of every pair with both captions."""
  backbone, count = model.backbone, pairs.kind.shape[0]
  media = media_tokens(model, reward, jnp.concatenate([pairs.better, pairs.worse]))
  rows = jnp.concatenate([pairs.scene] * 2 + [pairs.other] * 2)
  tokens = jax.vmap(captions.of)(rows, jnp.tile(pairs.omit_size, 4), jnp.tile(pairs.omit_speed, 4))
  positions = jnp.arange(captions.after.shape[-1])

  texts = tokens.after.reshape(2, 2, count, -1)[:, 0]
  place = jnp.argmax(texts[0] != texts[1], axis=1)
  differing = jnp.take_along_axis(texts, place[None, :, None], axis=2)[..., 0]

  def read(media: jax.Array, after: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    prompt = backbone.embed_prompt(PromptTokens(captions.before, after, positions))
    outputs = backbone.decoder.block_outputs(jnp.concatenate([prompt.before, media, prompt.after]))
    outputs = outputs[:, -len(positions) :]
    return backbone.decoder.final_norm(outputs[-1]), outputs[:, place]

  hidden, compared = jax.vmap(read)(jnp.concatenate([media, media]), jnp.asarray(tokens.after), jnp.tile(place, 4))
  scores = jax.vmap(lambda h, index: model.head(h[index])[..., 0])(hidden, tokens.reward_index)
  media, hidden, tokens = jax.tree.map(lambda x: x[:count], (media, hidden, tokens))
  compared = compared.reshape(2, 2, count, *compared.shape[1:])
  return Reading(scores.reshape(2, 2, count, -1), media, hidden, tokens, differing, compared)


def bradley_terry(better: jax.Array, worse: jax.Array) -> jax.Array:
  """-log sigmoid(better - worse)."""
  return jax.nn.softplus(worse - better)


@functools.cache
def _table(attribute: str) -> np.ndarray:
  """[kinds, 3] whether VQ, MQ and TA are in `attribute` of the corruption."""
  rows = [[d in getattr(corruption, attribute) for d in DIMENSIONS] for corruption in preferences.CORRUPTIONS.values()]
  return np.array(rows, np.float32)


def _is_text(pairs: Pairs) -> jax.Array:
  """[B] whether the worse clips are of another caption, at least in the end."""
  return jnp.asarray([corruption.family == "text" for corruption in preferences.CORRUPTIONS.values()])[pairs.kind]


def _shows_other(pairs: Pairs) -> jax.Array:
  """[B] whether the worse clips show what the other caption says, and not only in their last chunk."""
  return _is_text(pairs) & ~pairs.late


def preference_terms(scores: jax.Array, pairs: Pairs) -> dict[str, jax.Array]:
  """Losses and shares of pairs in the right order; `scores` as of `Reading`."""
  (better, worse), (better_other, worse_other) = scores
  is_text = _is_text(pairs)
  # Text alignment comes last; the image reward has nothing else.
  alignment = lambda x: x[:, -1]
  caption = bradley_terry(alignment(better), alignment(better_other))
  exchanged = bradley_terry(alignment(worse_other), alignment(better_other))
  exchanged = exchanged + bradley_terry(alignment(worse_other), alignment(worse))
  total = bradley_terry(better.sum(axis=1), worse.sum(axis=1))
  terms = {"caption": caption.mean(), "exchanged": mean_where(exchanged, _shows_other(pairs)), "clip": total.mean()}
  if scores.shape[-1] == len(DIMENSIONS):
    falls, stays = (jnp.asarray(_table(name))[pairs.kind] for name in ("falls", "stays"))
    # What changes late changes while it moves, so motion quality may fall as well.
    stays = stays * jnp.where(pairs.late & is_text, 0.0, 1.0)[:, None]
    terms["clip"] = 0.5 * terms["clip"] + mean_where(bradley_terry(better, worse), falls > 0)
    terms["change"] = mean_where(jnp.square(better - worse), stays > 0)
  return terms | {
    "clips_right": (better.sum(axis=1) > worse.sum(axis=1)).mean(),
    "text_right": mean_where(better.sum(axis=1) > worse.sum(axis=1), is_text),
    "captions_right": (alignment(better) > alignment(better_other)).mean(),
  }


def term_names(reward: RewardSpec) -> tuple[str, ...]:
  """Keys of all terms together."""
  names = ("caption", "exchanged", "clip", "clips_right", "text_right", "captions_right")
  names += ("naming", "named_right", "words", "correction", "truth", "truth_right")
  return names + _BY_KIND[reward.kind].terms


def mean_where(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def named_fields(reward: RewardSpec) -> tuple[str, ...]:
  """What the readers name."""
  return ("size", "color", "shape", "background", *_BY_KIND[reward.kind].fields)


def init_readers(reward: RewardSpec, dim: int, vocab_size: int) -> dict[str, jax.Array]:
  """Weights of the readers by field, and of those of `telling_terms` and `comparing_terms`."""
  fields = {field: jnp.zeros((dim, len(shapes.attribute_names()[field]))) for field in named_fields(reward)}
  words = {reader: jnp.zeros((dim, vocab_size)) for reader in ("words", "correction")}
  return fields | words | {"truth": jnp.zeros(dim)}


def seeing_terms(readers: dict[str, jax.Array], media: jax.Array, pairs: Pairs) -> dict[str, jax.Array]:
  """Cross entropy of the better clips' attributes, read from their media tokens [B, T, dim]."""
  pooled = media.mean(axis=1)
  attributes = shapes.Attributes(*jnp.asarray(shapes.all_scenes(), jnp.int32)[pairs.scene].T)
  losses, right = [], []
  for field in (field for field in shapes.Attributes._fields if field in readers):
    logits, label = pooled @ readers[field], getattr(attributes, field)
    losses.append(_cross_entropy(logits, label).mean())
    right.append((logits.argmax(axis=1) == label).mean())
  mean = lambda values: functools.reduce(operator.add, values) / len(values)
  return {"naming": mean(losses), "named_right": mean(right)}


def telling_terms(readers: dict[str, jax.Array], reading: Reading) -> dict[str, jax.Array]:
  """Cross entropy of the words of the better clips' captions, each foretold from those before it.

  What Qwen2-VL was trained with before it became a reward: it teaches the decoder to look an attribute up at the word
  that will name it.
  """
  following = reading.tokens.after[:, 1:]
  is_text = jnp.arange(following.shape[1])[None] < reading.tokens.reward_index[:, -1:]
  return {"words": mean_where(_cross_entropy(reading.hidden[:, :-1] @ readers["words"], following), is_text)}


def comparing_terms(readers: dict[str, jax.Array], reading: Reading, pairs: Pairs) -> dict[str, jax.Array]:
  """Losses at the word in which two captions differ: what is true of the clip, and whether it stands there.

  A preference tells that something in a caption is wrong; this tells where, and what the clip shows instead. A word
  and a clip must be compared: neither says anything alone, so preferences hardly teach it. What is true is read after
  the first block, and whether it stands there is read before the last one, so that the reward tokens can look at it.
  """
  reader = lambda block, name: _rms_normalised(reading.compared[..., block, :]) @ readers[name]
  told, truth = reader(0, "correction"), reader(-2, "truth")
  shown = jnp.broadcast_to(reading.differing[None], truth.shape)  # by the better clip, and by the worse one
  is_true = jnp.broadcast_to(jnp.eye(2, dtype=bool)[:, :, None], truth.shape)
  known = jnp.stack([jnp.ones_like(pairs.late), _shows_other(pairs)])
  known = jnp.broadcast_to(known[None], truth.shape)
  return {
    "correction": mean_where(_cross_entropy(told, shown), known),
    "truth": mean_where(optax.sigmoid_binary_cross_entropy(truth, is_true.astype(truth.dtype)), known),
    "truth_right": mean_where((truth > 0) == is_true, known),
  }


def _rms_normalised(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


_cross_entropy = optax.softmax_cross_entropy_with_integer_labels
