"""Readers of captions: they read the right words, and can tell two captions apart by them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from streamt1_jax.config import ConfigError, preset
from streamt1_jax.data import shapes
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.text.umt5 import UMT5Encoder, relative_buckets
from streamt1_jax.training import caption_readers

TOKENIZER = "checkpoints/tiny/tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(pytestconfig) -> Tokenizer:
  return Tokenizer((pytestconfig.rootpath / TOKENIZER).as_posix(), 32)


def test_each_reader_reads_one_word_of_every_caption(tokenizer):
  read = caption_readers.tokens_read(tokenizer)
  for attributes in shapes.all_scenes():
    caption = shapes.caption(*attributes)
    ids, pieces = tokenizer(caption).ids, tokenizer.pieces(caption)
    found = {name: [pieces[i] for i in np.flatnonzero(np.isin(ids, read[name]))] for name in read}
    assert found == {"color": [f"▁{shapes.SHAPES[attributes.shape]}"], "background": ["▁background"]}


def test_loss_is_the_cross_entropy_of_the_words_read(tokenizer):
  rows = [shapes.Attributes(0, 2, 0, 0, 0, 2), shapes.Attributes(1, 1, 2, 1, 3, 1)]
  tokens = jnp.stack([jnp.asarray(tokenizer(shapes.caption(*row)).ids) for row in rows])
  rng = np.random.default_rng(0)
  embeddings = rng.standard_normal((*tokens.shape, 8)).astype(np.float32)
  readers = {
    name: rng.standard_normal(x.shape).astype(np.float32) for name, x in caption_readers.init_readers(8).items()
  }
  losses = []
  for row, embedding in zip(rows, embeddings, strict=True):
    words = tokenizer.pieces(shapes.caption(*row))
    for name, word in (("color", f"▁{shapes.SHAPES[row.shape]}"), ("background", "▁background")):
      logits = embedding[words.index(word)] @ readers[name]
      losses.append(np.log(np.exp(logits).sum()) - logits[getattr(row, name)])
  read = caption_readers.tokens_read(tokenizer)
  loss = jax.jit(lambda e: caption_readers.naming_loss(readers, read, e, tokens, jnp.asarray(rows, jnp.int32)))
  np.testing.assert_allclose(loss(embeddings), np.mean(losses), rtol=1e-5)
  # Other words do not matter.
  others = ~np.isin(np.asarray(tokens), [*read["color"], *read["background"]])
  np.testing.assert_allclose(loss(embeddings + 7.0 * others[:, :, None]), loss(embeddings), rtol=1e-5)


def test_heads_begin_with_looking_at_neighbours():
  """With no other preference, a head's weight for its neighbour is e^4 against 1 for each of the others."""
  config = preset("tiny").text
  encoder = UMT5Encoder(config, nnx.Rngs(0))
  encoder.blocks.self_attn.position_bias[...] *= 0.0
  caption_readers.look_at_neighbours(encoder, 4.0)
  length, middle = 11, 5
  bias = np.asarray(encoder.blocks.self_attn.position_bias)
  buckets = relative_buckets(length, config.num_buckets, config.max_distance)
  weights = np.exp(bias[:, buckets[middle]])  # [blocks, keys, heads]
  weights /= weights.sum(axis=1, keepdims=True)
  for head, offset in enumerate((-1, 1, -2, 2)):
    expected = np.where(np.arange(length) == middle + offset, np.exp(4.0), 1.0) / (np.exp(4.0) + length - 1)
    np.testing.assert_allclose(weights[:, :, head], np.tile(expected, (config.num_layers, 1)), rtol=1e-5)


@pytest.mark.usefixtures("unchecked_types")
def test_a_tokenizer_that_splits_a_word_is_refused():
  class Splitting:
    def __call__(self, word):
      return type("Tokens", (), {"ids": np.array([5, 6, 1]), "length": 3})

    def pieces(self, word):
      return ["▁cir", "cle"]

  with pytest.raises(ConfigError, match="'circle' as one token"):
    caption_readers.tokens_read(Splitting())
