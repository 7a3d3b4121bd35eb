"""FLOP of a search, from shapes: 2 per multiply-add, for the forwards it makes and the keys that are visible."""

from collections.abc import Iterable

import numpy as np

from streamt1_jax.config import ModelConfig, SearchConfig


def forward_flop(model: ModelConfig, visible_chunks: float) -> float:
  """FLOP of one forward of one chunk with cached text that sees `visible_chunks` chunks, its own included."""
  c, tokens = model.backbone, model.chunk_tokens
  # Self-attention has four square projections, cross-attention two: its keys and values are cached.
  linear = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
  self_attention = 4 * tokens * visible_chunks * tokens * c.dim
  cross_attention = 4 * tokens * c.text_len * c.dim
  patches = 2 * 2 * tokens * c.latent_channels * c.patch_size**2 * c.dim
  time = 2 * model.chunk_frames * (c.freq_dim * c.dim + c.dim**2 + 6 * c.dim**2)
  return c.num_layers * (linear + self_attention + cross_attention) + patches + time


def search_flop(model: ModelConfig, search: SearchConfig, visible: Iterable[np.ndarray]) -> float:
  """FLOP of a search; `visible` has, chunk by chunk, how many chunks each beam's candidates saw [K]."""
  forwards = search.beam_size * len(model.schedule.denoising_steps) + 1
  return sum(forwards * forward_flop(model, seen) for chunk in visible for seen in chunk)
