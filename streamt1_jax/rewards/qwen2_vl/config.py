"""Sizes of the reward models; frozen, because XLA compiles the programs for them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from streamt1_jax.config import require, require_sizes

RopeDtype = Literal["bf16_reference", "float32"]
ROPE_DTYPES = ("bf16_reference", "float32")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Vision tower of Qwen2-VL.

  Attributes:
    dim: width of the residual stream.
    ffn_dim: hidden width of the feed-forward layers.
    num_heads: attention heads; `dim / num_heads` is a multiple of 4, since rows and columns each turn half of the
      pairs.
    num_layers: blocks.
    patch_size: pixels on a side of a patch.
    temporal_patch: frames of a patch.
    merge_size: patches on a side that become one token of the decoder.
    rope_theta: base of the rotary frequencies.
    eps: epsilon of every LayerNorm.
  """

  dim: int = 1280
  ffn_dim: int = 5120
  num_heads: int = 16
  num_layers: int = 32
  patch_size: int = 14
  temporal_patch: int = 2
  merge_size: int = 2
  rope_theta: float = 1e4
  eps: float = 1e-6

  def __post_init__(self):
    require_sizes(self)
    require(
      self.dim % self.num_heads == 0 and self.head_dim % 4 == 0,
      f"vision dim {self.dim} must be num_heads ({self.num_heads}) times a multiple of 4",
    )

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  @property
  def patch_values(self) -> int:
    """Numbers in one flattened RGB patch."""
    return 3 * self.temporal_patch * self.patch_size**2

  @property
  def token_pixels(self) -> int:
    """Pixels on a side of one token of the decoder; every picture is resized to a multiple of it."""
    return self.patch_size * self.merge_size


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Language model of Qwen2-VL.

  Attributes:
    dim: width of the residual stream.
    ffn_dim: hidden width of the gated feed-forward layers.
    num_heads: query heads; `dim / num_heads` is even.
    num_kv_heads: key and value heads, a divisor of `num_heads`.
    num_layers: blocks.
    vocab_size: rows of the token embedding.
    rope_theta: base of the rotary frequencies.
    eps: epsilon of every RMSNorm.
  """

  dim: int
  ffn_dim: int
  num_heads: int
  num_kv_heads: int
  num_layers: int
  vocab_size: int
  rope_theta: float = 1e6
  eps: float = 1e-6

  def __post_init__(self):
    require_sizes(self)
    require(
      self.dim % self.num_heads == 0 and self.head_dim % 2 == 0,
      f"decoder dim {self.dim} must be a multiple of num_heads {self.num_heads} with an even quotient",
    )
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
    )

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
  """Qwen2-VL as a reward backbone: no language-model head.

  Attributes:
    vision: the vision tower.
    decoder: the language model.
    rope_dtype: "bf16_reference" rounds the rotary frequencies (and the vision tables) to bfloat16, as the published
      models were trained and are run; "float32" keeps them exact (docs/reference/rewards.md).
  """

  vision: VisionConfig
  decoder: DecoderConfig
  rope_dtype: RopeDtype = "bf16_reference"

  def __post_init__(self):
    require(
      self.rope_dtype in ROPE_DTYPES, f"rope_dtype must be one of {', '.join(ROPE_DTYPES)}, got {self.rope_dtype!r}"
    )


def _qwen2_vl_2b() -> Qwen2VLConfig:
  return Qwen2VLConfig(
    VisionConfig(),
    DecoderConfig(dim=1536, ffn_dim=8960, num_heads=12, num_kv_heads=2, num_layers=28, vocab_size=151936),
  )


def _qwen2_vl_7b() -> Qwen2VLConfig:
  return Qwen2VLConfig(
    VisionConfig(),
    DecoderConfig(dim=3584, ffn_dim=18944, num_heads=28, num_kv_heads=4, num_layers=28, vocab_size=152064),
  )


def _qwen2_vl_tiny() -> Qwen2VLConfig:
  return Qwen2VLConfig(
    VisionConfig(dim=64, ffn_dim=256, num_heads=4, num_layers=3, patch_size=8),
    DecoderConfig(dim=128, ffn_dim=352, num_heads=4, num_kv_heads=2, num_layers=4, vocab_size=256),
  )


def _qwen2_vl_shapes() -> Qwen2VLConfig:
  # Few wide heads: faster on a CPU. Sequences are short, so rotary frequencies need not reach far.
  return Qwen2VLConfig(
    VisionConfig(dim=96, ffn_dim=384, num_heads=2, num_layers=2, patch_size=8),
    DecoderConfig(dim=128, ffn_dim=352, num_heads=2, num_kv_heads=1, num_layers=3, vocab_size=448, rope_theta=1e4),
    rope_dtype="float32",
  )


_PRESETS = {
  "qwen2_vl_2b": _qwen2_vl_2b,
  "qwen2_vl_7b": _qwen2_vl_7b,
  "qwen2_vl_tiny": _qwen2_vl_tiny,
  "qwen2_vl_shapes": _qwen2_vl_shapes,
}


def qwen2_vl_preset(name: str, vocab_size: int | None = None) -> Qwen2VLConfig:
  """The sizes of a preset.

  "qwen2_vl_2b" and "qwen2_vl_7b" are the published ones (docs/reference/rewards.md), "qwen2_vl_tiny" is for
  tests, and the small rewards of the shapes world are trained with "qwen2_vl_shapes".

  Args:
    name: the preset.
    vocab_size: rows of the token embedding; None keeps the base model's. Reward models resize it to their tokenizer.

  Raises ConfigError for an unknown name.
  """
  require(name in _PRESETS, f"unknown Qwen2-VL preset {name!r}; allowed: {', '.join(_PRESETS)}")
  config = _PRESETS[name]()
  if vocab_size is None:
    return config
  return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=vocab_size))
