"""Presets: names of complete models."""

from __future__ import annotations

from streamt1_jax.config.base import require
from streamt1_jax.config.model import BackboneConfig, CodecConfig, ModelConfig, TextConfig


def _wan_1_3b() -> ModelConfig:
  return ModelConfig(
    name="wan_1_3b",
    backbone=BackboneConfig(
      dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096, text_len=512
    ),
    codec=CodecConfig(),
    text=TextConfig(),
    latent_height=60,
    latent_width=104,
  )


def _tiny() -> ModelConfig:
  return ModelConfig(
    name="tiny",
    backbone=BackboneConfig(dim=192, ffn_dim=768, num_heads=2, num_layers=6, freq_dim=64, text_dim=128, text_len=32),
    codec=CodecConfig(
      base_dim=72,
      dim_mult=(1, 1, 1),
      num_res_blocks=0,
      spatial_down=(False, False),
      temporal_down=(True, True),
      patch_size=8,
      latent_mean=(0.0,) * 16,
      latent_std=(1.0,) * 16,
    ),
    text=TextConfig(
      vocab_size=128, dim=128, attn_dim=128, ffn_dim=256, num_heads=4, num_layers=2, max_distance=32, max_len=32
    ),
    latent_height=8,
    latent_width=8,
  )


def _bench_mid() -> ModelConfig:
  return ModelConfig(
    name="bench_mid",
    backbone=BackboneConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=6, freq_dim=32, text_dim=32, text_len=16),
    codec=None,
    text=None,
    latent_height=16,
    latent_width=24,
  )


def _golden() -> ModelConfig:
  return ModelConfig(
    name="golden",
    backbone=BackboneConfig(dim=96, ffn_dim=192, num_heads=4, num_layers=3, freq_dim=32, text_dim=32, text_len=16),
    codec=None,
    text=None,
    latent_height=6,
    latent_width=8,
  )


PRESETS = {"wan_1_3b": _wan_1_3b, "tiny": _tiny, "bench_mid": _bench_mid, "golden": _golden}


def preset(name: str) -> ModelConfig:
  """The named preset. Raises ConfigError for a name that is not in `PRESETS`."""
  require(name in PRESETS, f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
  return PRESETS[name]()
