"""FLOP of Qwen2-VL, counted from shapes: 2 for a multiply-add; causal attention counts half of its products."""

from __future__ import annotations

from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, VisionConfig


def vision_flop(config: VisionConfig, out_dim: int, patches: int) -> int:
  """FLOP of the vision tower on one slice of `patches` patches; `out_dim` is the decoder's width."""
  linear = 2 * patches * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim)
  attention = 4 * patches**2 * config.dim
  merged = config.dim * config.merge_size**2
  merger = 2 * (patches // config.merge_size**2) * (merged**2 + merged * out_dim)
  return config.num_layers * (linear + attention) + merger + 2 * patches * config.patch_values * config.dim


def decoder_flop(config: DecoderConfig, length: int) -> int:
  """FLOP of the decoder on one sequence of `length` tokens."""
  kv_dim = config.num_kv_heads * config.head_dim
  linear = 2 * length * (2 * config.dim**2 + 2 * config.dim * kv_dim + 3 * config.dim * config.ffn_dim)
  return config.num_layers * (linear + 2 * length**2 * config.dim)
