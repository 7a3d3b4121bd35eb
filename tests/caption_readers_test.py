"""Readers of captions: they read the right words, and can tell two captions apart by them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from streamt1_jax.config import ConfigError, preset
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.text.umt5 import UMT5Encoder, relative_buckets
from streamt1_jax.training import caption_readers

TOKENIZER = "checkpoints/tiny/tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(pytestconfig) -> Tokenizer:
  return Tokenizer((pytestconfig.rootpath / TOKENIZER).as_posix(), 32)


SENTENCES = (
  "a small blue circle moves left over a dark green background",
  "a red triangle moves slowly down and a large green square moves quickly up over a black background",
)


@pytest.mark.parametrize(
  ("sentence", "words"),
  [
    (SENTENCES[0], {"color": ["circle"], "mover": ["left"], "background": ["background"]}),
    (SENTENCES[1], {"color": ["triangle", "square"], "mover": ["down", "up"], "background": ["background"]}),
  ],
)
def test_each_reader_reads_a_word_of_each_object(tokenizer, sentence, words):
  read = caption_readers.tokens_read(tokenizer)
  ids, pieces = tokenizer(sentence).ids, tokenizer.pieces(sentence)
  found = {name: [pieces[i] for i in np.flatnonzero(np.isin(ids, read[name]))] for name in read}
  assert found == {name: [f"▁{word}" for word in of] for name, of in words.items()}


def test_loss_is_the_cross_entropy_of_the_words_read(tokenizer):
  """Colours are red 0, green 1, blue 2; backgrounds black 0, dark green 2."""
  colors, background = jnp.array([[2, 5], [0, 1]]), jnp.array([2, 0])
  tokens = jnp.stack([jnp.asarray(tokenizer(sentence).ids) for sentence in SENTENCES])
  rng = np.random.default_rng(0)
  embeddings = rng.standard_normal((*tokens.shape, 8)).astype(np.float32)
  readers = {
    name: rng.standard_normal(x.shape).astype(np.float32) for name, x in caption_readers.init_readers(8).items()
  }
  said = {
    "color": [(0, "circle", 2), (1, "triangle", 0), (1, "square", 1)],
    "mover": [(0, "left", 2), (1, "down", 0), (1, "up", 1)],
    "background": [(0, "background", 2), (1, "background", 0)],
  }
  losses = []
  for name, entries in said.items():
    found = []
    for row, word, label in entries:
      logits = embeddings[row][tokenizer.pieces(SENTENCES[row]).index(f"▁{word}")] @ readers[name]
      found.append(np.log(np.exp(logits).sum()) - logits[label])
    losses.append(np.mean(found))
  read = caption_readers.tokens_read(tokenizer)
  loss = jax.jit(lambda e: caption_readers.naming_loss(readers, read, e, tokens, colors, background))
  np.testing.assert_allclose(loss(embeddings), np.mean(losses), rtol=1e-5)
  # Other words do not matter.
  others = ~np.isin(np.asarray(tokens), [token for name in read for token in read[name]])
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
