"""Linear readers that make a text encoder say which of two colours is the object's.

"a blue circle ... dark green" and "a green circle ... dark blue" have the same words, and a text encoder that learns
from videos alone distinguishes them very late. So readers, which are thrown away after training, must name an object's
colour from the embedding of the word that names its shape, and from that of its direction, and the background's from
that of the word "background".

The readers alone are not enough. Heads that begin with equal attention to all words name the colours no better than a
bag of words after 1500 steps; heads that begin with attention to their neighbours name all within 150.
"""

import functools
import operator

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.text.umt5 import UMT5Encoder, relative_buckets
from streamt1_jax.typing import FloatScalar, HostArray

_READS = {
  "color": (shapes.SHAPES, "color"),
  "mover": (tuple(shapes.DIRECTIONS), "color"),
  "background": (("background",), "background"),
}
"""The words that every reader reads, and what it names: for a direction the colour of the object that moves so."""

Readers = dict[str, Float[HostArray, "dim _"]]
"""A matrix [dim, values] for every attribute that is read; every one has values of its own."""


def look_at_neighbours(encoder: UMT5Encoder, bias: float) -> None:
  """Adds `bias` to every head's logits of one neighbour: heads 0, 1, 2, 3 of a block look at words -1, +1, -2, +2."""
  attention = encoder.blocks.self_attn
  buckets = relative_buckets(2 * attention.num_heads + 1, attention.num_buckets, attention.max_distance)
  middle = attention.num_heads
  for head in range(attention.num_heads):
    offset = (head // 2 + 1) * (-1 if head % 2 == 0 else 1)
    attention.position_bias[...] = attention.position_bias[...].at[:, buckets[middle, middle + offset], head].add(bias)


def init_readers(dim: int) -> Readers:
  """Readers of embeddings of `dim` channels that know nothing."""
  values = shapes.attribute_names()
  return {name: jnp.zeros((dim, len(values[attribute]))) for name, (_, attribute) in _READS.items()}


def tokens_read(tokenizer: Tokenizer) -> dict[str, list[int]]:
  """The tokens whose embeddings each reader reads. Raises ConfigError if one of the words is several tokens."""

  def token(word: str) -> int:
    ids = tokenizer(word)
    if ids.length != 2:  # the word and the end
      raise ConfigError(f"the tokenizer must know {word!r} as one token, got {tokenizer.pieces(word)}")
    return int(ids.ids[0])

  return {name: [token(word) for word in words] for name, (words, _) in _READS.items()}


def naming_loss(
  readers: Readers,
  read: dict[str, list[int]],
  embeddings: Float[Array, "G X dim"],
  tokens: Int32[Array, "G X"],
  colors: Int32[Array, "G 2"],
  background: Int32[Array, " G"],
) -> FloatScalar:
  """Cross entropy of what captions say, the mean over readers; float32 scalar.

  Args:
    readers: see `init_readers`.
    read: see `tokens_read`.
    embeddings: of the captions.
    tokens: the captions; each has one of the tokens of every reader for each object, or one in all.
    colors: of the objects, the first one before the second; of one that is not there any.
    background: of the captions.
  """
  labels = {"color": colors, "background": jnp.stack([background, background], axis=1)}
  losses = []
  for name, reader in readers.items():
    is_read = jnp.isin(tokens, jnp.asarray(read[name]))
    # The first such word is about the first object.
    which = jnp.clip(jnp.cumsum(is_read, axis=1) - 1, 0, 1)
    label = jnp.take_along_axis(labels[_READS[name][1]], which, axis=1)
    loss = optax.softmax_cross_entropy_with_integer_labels(embeddings @ reader, label)
    losses.append(loss.mean(where=is_read))
  return functools.reduce(operator.add, losses) / len(losses)
