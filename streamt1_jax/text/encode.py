"""Prompts to the embeddings that cross-attention sees, by an encoder whose weights stay on disk.

  token ids ── rows of the embedding table ── layer 0 ── layer 1 ── ... ── norm ── embeddings
                       read from disk         read, applied to all prompts, dropped

UMT5-XXL is four times as large as the model it feeds (11.4 GB in bfloat16), and a prompt needs it for one pass only. So
it is never loaded: memory holds one layer (0.4 GB) and the prompts' hidden states. The price is that prompts that come
later need the encoder to be read from disk again.
"""

import collections
import functools
import gc
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from streamt1_jax.config import ConfigError, TextConfig
from streamt1_jax.io import stored_part
from streamt1_jax.nn import precision
from streamt1_jax.text.tokenizer import Tokenizer, Tokens
from streamt1_jax.text.umt5 import UMT5Encoder
from streamt1_jax.typing import HostArray, Params

_KEPT = 256
"""Embeddings that are kept beside those of the largest batch. One has 0.4 MB for 25 tokens of UMT5-XXL."""


class PromptEncoder:
  """A tokenizer and a stored UMT5 encoder. It keeps no weights, but the embeddings of the prompts that were used last.

  All prompts that are prepared together are kept, and a few hundred others. Threads take turns.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    config: TextConfig,
    tokenizer: Tokenizer,
    text_len: int,
    dtype: DTypeLike = jnp.float32,
  ):
    """Checks the stored encoder. No weight is read yet.

    Args:
      directory: folder of the encoder's weights, a model part.
      config: its sizes.
      tokenizer: tokenizer of the same model.
      text_len: rows of an embedding, at least `tokenizer.max_len`.
      dtype: dtype of the computation.

    Raises:
      ConfigError: as for `stored_part.open_part`, or the tokenizer has more pieces than the encoder embeds, or its
        `max_len` exceeds `text_len`.
    """
    _require_fitting(tokenizer, config.vocab_size, text_len)
    encoder = nnx.eval_shape(lambda: UMT5Encoder(config, nnx.Rngs(0)))
    self.tokenizer = tokenizer
    self._num_layers, self._text_len = config.num_layers, text_len
    self._weights = stored_part.open_part(directory, nnx.to_pure_dict(nnx.state(encoder, nnx.Param)), dtype)
    self._block, layers = nnx.split(encoder.blocks, nnx.Param)
    self._layers = nnx.to_pure_dict(layers)
    self._norm = nnx.graphdef(encoder.final_norm)
    self._turn = threading.Lock()
    self._largest_batch = 0
    # The prompt that was used last is the last one.
    self._embeddings: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

  def __call__(self, prompt: str) -> Float32[Array, "X E"]:
    """Embeddings of one prompt, X = `text_len`; the rows after its end are zero (docs/reference/umt5.md).

    Raises ConfigError if the weights cannot be read or are not finite.
    """
    with self._turn:
      self._prepare([prompt])
      embedding = self._embeddings[prompt]
    return jnp.asarray(np.pad(embedding, ((0, self._text_len - len(embedding)), (0, 0))))

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes several prompts in one pass over the weights. A prompt that is too long is cut, with a warning.

    Each prompt is encoded at its own length. The encoder masks padding, so leaving it out changes only the cost (0.6
    instead of 4.8 TFLOP for 64 tokens of 512). Lengths are rounded up so that at most eight shapes are compiled.
    """
    with self._turn:
      self._prepare(list(dict.fromkeys(prompts)))

  def _prepare(self, prompts: list[str]) -> None:
    new = [prompt for prompt in prompts if prompt not in self._embeddings]
    tokens = [self.tokenizer(prompt) for prompt in new]
    for prompt, token in zip(new, tokens, strict=True):
      if token.truncated:
        logging.warning("only the first %d tokens of the prompt are used: %r", self.tokenizer.max_len, prompt)
    if new:
      embeddings = self._encode(tokens)
      self._embeddings |= {p: e[: t.length].copy() for p, t, e in zip(new, tokens, embeddings, strict=True)}
    for prompt in prompts:
      self._embeddings.move_to_end(prompt)
    self._largest_batch = max(self._largest_batch, len(prompts))
    while len(self._embeddings) > self._largest_batch + _KEPT:
      self._embeddings.popitem(last=False)

  def _encode(self, tokens: list[Tokens]) -> list[np.ndarray]:
    lengths = [padded_length(token.length, self._text_len) for token in tokens]
    ids = [np.pad(t.ids[: t.length], (0, length - t.length)) for t, length in zip(tokens, lengths, strict=True)]
    masks = [np.arange(length) < token.length for token, length in zip(tokens, lengths, strict=True)]
    used, rows = np.unique(np.concatenate(ids), return_inverse=True)
    table = self._on_device({"token_embedding": self._weights.read_rows("token_embedding", used)})["token_embedding"]
    states = [table[piece] for piece in np.split(rows, np.cumsum(lengths)[:-1])]
    for layer in range(self._num_layers):
      params = self._read_layer(layer)
      states = jax.block_until_ready([_run_block(params, self._block, x, mask) for x, mask in zip(states, masks)])
      del params  # Otherwise the next layer would be read beside this one.
    norm = self._on_device({"scale": self._weights.read("final_norm/scale")})
    return [np.asarray(_run_norm(norm, self._norm, x)) for x in states]

  def _read_layer(self, layer: int) -> Params:
    names, structure = stored_part.named_leaves(self._layers), jax.tree.structure(self._layers)
    one = (slice(layer, layer + 1),)
    return self._on_device(jax.tree.unflatten(structure, [self._weights.read(f"blocks/{n}", one)[0] for n in names]))

  def _on_device(self, weights: Params) -> Params:
    self._weights.require_finite()
    weights = jax.device_put(weights)
    gc.collect(0)  # JAX drops its references to host memory, and with them the layer before, at a collection.
    return weights


def padded_length(length: int, text_len: int) -> int:
  """`length` rounded up to a multiple of an eighth of `text_len`, or of 8 if that is more; at most `text_len`."""
  step = max(8, text_len // 8)
  return min(text_len, -(-length // step) * step)


@functools.partial(jax.jit, static_argnames="graphdef")
def _run_block(
  params: Params, graphdef: nnx.GraphDef, x: Float[Array, "X E"], mask: Bool[HostArray, " X"]
) -> Float[Array, "X E"]:
  with precision.of_weights(params):
    return nnx.merge(graphdef, params)(x, mask)


@functools.partial(jax.jit, static_argnames="graphdef")
def _run_norm(params: Params, graphdef: nnx.GraphDef, x: Float[Array, "X E"]) -> Float32[Array, "X E"]:
  return nnx.merge(graphdef, params)(x).astype(jnp.float32)


def _require_fitting(tokenizer: Tokenizer, vocab_size: int, text_len: int) -> None:
  if tokenizer.vocab_size > vocab_size:
    raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} pieces, the encoder embeds only {vocab_size}")
  if tokenizer.max_len > text_len:
    raise ConfigError(f"the tokenizer's max_len {tokenizer.max_len} exceeds text_len {text_len}")
