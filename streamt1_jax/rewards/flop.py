"""FLOP of the reward models, counted from shapes: 2 per multiply-add, and of causal attention the half that counts."""

from __future__ import annotations

import math

from streamt1_jax.rewards.hpsv3 import HPSv3
from streamt1_jax.rewards.qwen2_vl import preprocess
from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, VisionConfig
from streamt1_jax.rewards.videoalign import VideoAlign


def vision_flop(config: VisionConfig, out_dim: int, patches: int) -> int:
  """Of the vision tower on one slice of so many patches; `out_dim` is the decoder's width."""
  linear = 2 * patches * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim)
  attention = 4 * patches**2 * config.dim
  merged = config.dim * config.merge_size**2
  merger = 2 * (patches // config.merge_size**2) * (merged**2 + merged * out_dim)
  return config.num_layers * (linear + attention) + merger + 2 * patches * config.patch_values * config.dim


def decoder_flop(config: DecoderConfig, length: int) -> int:
  """Of the decoder on one sequence."""
  kv_dim = config.num_kv_heads * config.head_dim
  linear = 2 * length * (2 * config.dim**2 + 2 * config.dim * kv_dim + 3 * config.dim * config.ffn_dim)
  return config.num_layers * (linear + 2 * length**2 * config.dim)


def candidate_flop(reward: HPSv3 | VideoAlign, frames: int, size: tuple[int, int], text_tokens: int) -> int:
  """Of judging one candidate; the heads, a millionth of it, are left out.

  Args:
    reward: the reward.
    frames: of the chunk, all of which HPSv3 looks at, or of the window, of which VideoAlign samples some.
    size: rows and columns of a frame.
    text_tokens: length of a sequence without its pictures.
  """
  config, vision, decoder = reward.config, reward.config.backbone.vision, reward.config.backbone.decoder
  resized = preprocess.smart_resize(*size, vision.token_pixels, config.min_pixels, config.max_pixels)
  patches = math.prod(preprocess.grid_of(resized, vision))
  tokens = patches // vision.merge_size**2
  slice_flop = vision_flop(vision, decoder.dim, patches)
  if isinstance(reward, HPSv3):
    return frames * (slice_flop + decoder_flop(decoder, text_tokens + tokens))
  slices = len(reward.sample(frames)) // vision.temporal_patch
  return slices * slice_flop + decoder_flop(decoder, text_tokens + slices * tokens)
