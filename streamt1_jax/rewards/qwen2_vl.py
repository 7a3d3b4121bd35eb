"""Qwen2-VL as the backbone of a reward model: pictures and a text to the hidden states of the reward tokens.

  frames ── patches [S, N, V] ── vision tower ── media tokens [S, N / 4, M] ─┐
                                                                            ▼
  prompt ── token ids ── embedding ───────────── text before │ media │ text after ── decoder ── [R, M] at reward tokens

Read-only containers of weights: split once (`nnx.split`), merge inside the transformation that calls them.
Source: rewards spec, section 1. The text is embedded once per video; media tokens go between its two parts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from streamt1_jax.rewards.config import Qwen2VLConfig
from streamt1_jax.rewards.decoder import Decoder
from streamt1_jax.rewards.vision_tower import VisionTower
from streamt1_jax.typing import Params


class PromptTokens(NamedTuple):
  """A tokenised prompt around the place of the media tokens.

  Attributes:
    before: [X] int32 ids, up to and including the start marker of the media.
    after: [Y] int32 ids, from the end marker on; what follows the last reward token is padding and never read.
    reward_index: [R] int32, positions in `after` of the reward tokens, ascending.
  """

  before: jax.Array
  after: jax.Array
  reward_index: jax.Array


class PromptEmbedding(NamedTuple):
  """`PromptTokens` with embeddings, [X, M] and [Y, M], for ids: all that a prompt contributes, once per video."""

  before: jax.Array
  after: jax.Array
  reward_index: jax.Array


class Qwen2VL(nnx.Module):
  """Vision tower and decoder."""

  def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
    self.vision = VisionTower(config.vision, config.decoder.dim, config.rope_dtype, rngs)
    self.decoder = Decoder(config.decoder, config.rope_dtype, rngs)

  def embed_prompt(self, tokens: PromptTokens) -> PromptEmbedding:
    return PromptEmbedding(self.decoder.embed(tokens.before), self.decoder.embed(tokens.after), tokens.reward_index)

  def read(self, prompt: PromptEmbedding, media: jax.Array) -> jax.Array:
    """Hidden states [R, M] of the reward tokens of one sequence with media tokens [Z, M]; `vmap` for several."""
    sequence = jnp.concatenate([prompt.before, media, prompt.after])
    return self.decoder(sequence, prompt.before.shape[0] + media.shape[0] + prompt.reward_index)


def abstract_params(make_model: Callable[[], nnx.Module], dtype: Any) -> Params:
  """Shapes and dtypes of a reward model's parameters, nothing is allocated.

  Args:
    make_model: builds a module with a `backbone`, a `Qwen2VL`, and a head.
    dtype: dtype of the backbone; the head keeps its float32.
  """
  params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make_model), nnx.Param))
  cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))
  return params | {"backbone": jax.tree.map(cast, params["backbone"])}
