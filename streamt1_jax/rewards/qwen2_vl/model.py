"""Qwen2-VL as the backbone of a reward model: pictures and a text to the hidden states of the reward tokens.

  frames ── patches [S, N, V] ── vision tower ── media tokens [S, N / 4, M] ─┐
                                                                            ▼
  prompt ── token ids ── embedding ───────────── text before │ media │ text after ── decoder ── [R, M] at reward tokens

Read-only containers of weights: split once (`nnx.split`), merge inside the transformation that calls them.
Source: docs/reference/rewards.md. The text is embedded once per video; media tokens go between its two parts.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from streamt1_jax.nn import quantised
from streamt1_jax.rewards.qwen2_vl.config import Qwen2VLConfig
from streamt1_jax.rewards.qwen2_vl.decoder import Decoder
from streamt1_jax.rewards.qwen2_vl.vision_tower import VisionTower
from streamt1_jax.typing import HostArray, IntScalar, Params


class PromptTokens(NamedTuple):
  """A tokenised prompt around the place of the media tokens.

  Attributes:
    before: ids, up to and including the start marker of the media.
    after: ids, from the end marker on; what follows the last reward token is padding and never read.
    reward_index: positions in `after` of the reward tokens, ascending.
  """

  before: Int32[HostArray, " X"]
  after: Int32[HostArray, " Y"]
  reward_index: Int32[HostArray, " R"]


class PromptEmbedding(NamedTuple):
  """`PromptTokens` with embeddings in place of ids: what a prompt contributes, once per video."""

  before: Float[HostArray, "X M"]
  after: Float[HostArray, "Y M"]
  reward_index: Int32[HostArray, " R"]


# For one candidate. At full size a slice has 1008 patches, whose attention scores take 65 MB.
_PATCHES_AT_ONCE = 2048


def whole_batch(count: int, most: int) -> int:
  """Largest batch of at most `most` that divides `count`: a remainder would be compiled on its own."""
  return max(size for size in range(1, min(most, count) + 1) if count % size == 0)


class Qwen2VL(nnx.Module):
  """Vision tower and decoder."""

  def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
    self.vision = VisionTower(config.vision, config.decoder.dim, config.rope_dtype, rngs)
    self.decoder = Decoder(config.decoder, config.rope_dtype, rngs)

  def embed_prompt(self, tokens: PromptTokens | PromptEmbedding) -> PromptEmbedding:
    """Looks up the embeddings of a prompt, if that was not done on the host."""
    if isinstance(tokens, PromptEmbedding):
      return tokens
    return PromptEmbedding(self.decoder.embed(tokens.before), self.decoder.embed(tokens.after), tokens.reward_index)

  def see(
    self, patches: Float[Array, "S N V"], grid: tuple[int, int], count: IntScalar | None = None
  ) -> Float[Array, "Z M"]:
    """Media tokens of slices, a few slices at a time.

    Args:
      patches: of S slices.
      grid: rows and columns of patches of every slice.
      count: in 1..S, how many of the slices count; None for all. The others need not be computed, and their tokens mean
        nothing, but are finite.

    Returns:
      The tokens, N / 4 of a slice.
    """
    slices = patches.shape[0]
    batch = whole_batch(slices, max(1, _PATCHES_AT_ONCE // patches.shape[1]))
    if batch == slices:
      media = self.vision(patches, grid)
      return media.reshape(-1, media.shape[-1])

    def add_batch(index: jax.Array, media: jax.Array) -> jax.Array:
      some = jax.lax.dynamic_slice_in_dim(patches, index * batch, batch)
      return jax.lax.dynamic_update_slice_in_dim(media, self.vision(some, grid), index * batch, 0)

    shape = (slices, patches.shape[1] // self.vision.config.merge_size**2, self.decoder.config.dim)
    empty = jnp.zeros(shape, self.vision.patch_embedding.kernel.dtype)
    media = jax.lax.fori_loop(0, slices // batch if count is None else -(-count // batch), add_batch, empty)
    return media.reshape(-1, media.shape[-1])

  def read(
    self, prompt: PromptEmbedding, media: Float[Array, "Z M"], count: IntScalar | None = None
  ) -> Float[Array, "R M"]:
    """Hidden states of the reward tokens of one sequence; `vmap` for several.

    Args:
      prompt: the text around the media.
      media: media tokens.
      count: in 0..Z, how many of them exist; None for all. The text after them begins where they end, so
        that its positions are those of a shorter sequence. What is left of the others follows the text, and causal
        attention hides it from all that is read.
    """
    end = prompt.before.shape[0] + (media.shape[0] if count is None else count)
    sequence = jnp.concatenate([prompt.before, media, prompt.after])
    if count is not None:
      sequence = jax.lax.dynamic_update_slice_in_dim(sequence, prompt.after, end, 0)
    return self.decoder(sequence, end + prompt.reward_index)


_QUANTISED = r"(vision|decoder)/blocks/\w+/kernel|vision/merger/\w+/kernel"


def backbone_in(params: Params, dtype: DTypeLike) -> Params:
  """Shapes and dtypes of a reward model's parameters as they are read.

  Args:
    params: shapes of a "backbone", a `Qwen2VL`, and of a head.
    dtype: dtype of the backbone; the head keeps its float32. With int8 the kernels of its blocks and its merger are
      `QuantisedKernel`s; all else, activations too, is bfloat16.
  """
  in_int8 = jnp.dtype(dtype) == jnp.int8

  def cast(path, leaf):
    if in_int8 and re.fullmatch(_QUANTISED, jax.tree_util.keystr(path, simple=True, separator="/")):
      return quantised.abstract_kernel(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if in_int8 else jnp.dtype(dtype))

  return params | {"backbone": jax.tree_util.tree_map_with_path(cast, params["backbone"])}
