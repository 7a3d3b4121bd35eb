"""Mapping tables of the video VAE: the names of `Wan2.1_VAE.pth`, and those of diffusers' `AutoencoderKLWan`.

194 tensors and 126,892,531 parameters at full size, under either set of names. The layers of a stage differ in shape,
so nothing is stacked, and the table is generated from the configuration. Source: docs/reference/wan_vae.md.
"""

import dataclasses
from collections.abc import Iterator

from flax import nnx

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import CodecConfig, ModelConfig
from streamt1_jax.convert import engine
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.transforms import (
  CONV2D,
  CONV3D,
  IDENTITY,
  Chain,
  Squeeze,
  Transform,
  Transpose,
  gamma,
  pointwise,
)
from streamt1_jax.typing import Params

TIME_CONV = Chain((Squeeze((3, 4)), Transpose((2, 1, 0))))
"""`[out, in, 3, 1, 1]` to `[3, in, out]`."""


@dataclasses.dataclass(frozen=True)
class Names:
  """How one flavour of checkpoint names the layers.

  Attributes:
    norm1, conv1, norm2, conv2, shortcut: inside a residual block.
    middle: first block, attention and second block at the resolution of the latent.
    conv_in, norm_out, conv_out: inside the encoder and the decoder.
    quant, post_quant: the pointwise layers around the latent.
    encoder_block, encoder_resample, decoder_block, decoder_resample: templates with the fields `stage`,
      `index` (of the block in its stage) and `flat` (of the layer among all layers of all stages, transitions
      included).
  """

  norm1: str
  conv1: str
  norm2: str
  conv2: str
  shortcut: str
  middle: tuple[str, str, str]
  conv_in: str
  norm_out: str
  conv_out: str
  quant: str
  post_quant: str
  encoder_block: str
  encoder_resample: str
  decoder_block: str
  decoder_resample: str


WAN_NAMES = Names(
  norm1="residual.0",
  conv1="residual.2",
  norm2="residual.3",
  conv2="residual.6",
  shortcut="shortcut",
  middle=("middle.0", "middle.1", "middle.2"),
  conv_in="conv1",
  norm_out="head.0",
  conv_out="head.2",
  quant="conv1",
  post_quant="conv2",
  encoder_block="downsamples.{flat}",
  encoder_resample="downsamples.{flat}",
  decoder_block="upsamples.{flat}",
  decoder_resample="upsamples.{flat}",
)

DIFFUSERS_NAMES = Names(
  norm1="norm1",
  conv1="conv1",
  norm2="norm2",
  conv2="conv2",
  shortcut="conv_shortcut",
  middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
  conv_in="conv_in",
  norm_out="norm_out",
  conv_out="conv_out",
  quant="quant_conv",
  post_quant="post_quant_conv",
  encoder_block="down_blocks.{flat}",
  encoder_resample="down_blocks.{flat}",
  decoder_block="up_blocks.{stage}.resnets.{index}",
  decoder_resample="up_blocks.{stage}.upsamplers.0",
)


def rules(config: CodecConfig, names: Names) -> tuple[Rule, ...]:
  """The mapping table of a codec of this configuration, under one set of names."""
  multipliers = (1, *config.dim_mult)
  widened = [a != b for a, b in zip(multipliers[:-1], multipliers[1:], strict=True)]
  # The decoder's blocks follow a spatial transition that has halved the channels.
  decoder_multipliers = (config.dim_mult[-1], *config.dim_mult[::-1])
  shares = (1, *(2 if spatial else 1 for spatial in config.spatial_down[::-1]))
  decoder_widened = [
    a != b * share for a, b, share in zip(decoder_multipliers[:-1], decoder_multipliers[1:], shares, strict=True)
  ]
  transitions = tuple(zip(config.spatial_down, config.temporal_down, strict=True))
  return (
    *_half("encoder", names, widened, config.num_res_blocks, transitions),
    *_affine(names.quant, "encoder.quant", pointwise(3)),
    *_affine(names.post_quant, "decoder.post_quant", pointwise(3)),
    *_half("decoder", names, decoder_widened, config.num_res_blocks + 1, transitions[::-1]),
  )


def abstract_params(config: CodecConfig) -> Params:
  """Shapes of the codec's parameters, as a nested dict."""
  return engine.abstract_params(lambda: VideoCodec(config, rngs=nnx.Rngs(0)))


def wan_flavour(model: ModelConfig) -> Flavour:
  """The names of `Wan2.1_VAE.pth`."""
  return Flavour("codec", "Wan", rules(model.required_codec, WAN_NAMES), abstract_params(model.required_codec))


def diffusers_flavour(model: ModelConfig) -> Flavour:
  """The names of diffusers' `AutoencoderKLWan`."""
  codec = model.required_codec
  return Flavour("codec", "diffusers", rules(codec, DIFFUSERS_NAMES), abstract_params(codec))


def _half(
  half: str, names: Names, widened: list[bool], num_blocks: int, transitions: tuple[tuple[bool, bool], ...]
) -> Iterator[Rule]:
  """The encoder or the decoder: `widened` says for each stage whether its first block changes the width."""
  yield from _affine(f"{half}.{names.conv_in}", f"{half}.conv_in", CONV3D)
  block1, attention, block2 = (f"{half}.{name}" for name in names.middle)
  yield from _block(block1, f"{half}.middle.block1", names, has_shortcut=False)
  yield from _attention(attention, f"{half}.middle.attention")
  yield from _block(block2, f"{half}.middle.block2", names, has_shortcut=False)
  block_name, resample_name = getattr(names, f"{half}_block"), getattr(names, f"{half}_resample")
  for stage, is_widened in enumerate(widened):
    path, flat = f"{half}.stages.{stage}", stage * (num_blocks + 1)
    for index in range(num_blocks):
      source = block_name.format(stage=stage, index=index, flat=flat + index)
      has_shortcut = is_widened and index == 0
      yield from _block(f"{half}.{source}", f"{path}.blocks.{index}", names, has_shortcut)
    if stage < len(transitions):
      source = resample_name.format(stage=stage, flat=flat + num_blocks)
      yield from _resample(f"{half}.{source}", f"{path}.resample", *transitions[stage])
  yield Rule(f"{half}.{names.norm_out}.gamma", f"{half}.norm_out.gamma", gamma(3))
  yield from _affine(f"{half}.{names.conv_out}", f"{half}.conv_out", CONV3D)


def _block(source: str, path: str, names: Names, has_shortcut: bool) -> Iterator[Rule]:
  yield Rule(f"{source}.{names.norm1}.gamma", f"{path}.norm1.gamma", gamma(3))
  yield from _affine(f"{source}.{names.conv1}", f"{path}.conv1", CONV3D)
  yield Rule(f"{source}.{names.norm2}.gamma", f"{path}.norm2.gamma", gamma(3))
  yield from _affine(f"{source}.{names.conv2}", f"{path}.conv2", CONV3D)
  if has_shortcut:
    yield from _affine(f"{source}.{names.shortcut}", f"{path}.shortcut", pointwise(3))


def _attention(source: str, path: str) -> Iterator[Rule]:
  yield Rule(f"{source}.norm.gamma", f"{path}.norm.gamma", gamma(2))
  yield from _affine(f"{source}.to_qkv", f"{path}.to_qkv", pointwise(2))
  yield from _affine(f"{source}.proj", f"{path}.proj", pointwise(2))


def _resample(source: str, path: str, spatial: bool, temporal: bool) -> Iterator[Rule]:
  if spatial:
    yield from _affine(f"{source}.resample.1", f"{path}.conv", CONV2D)
  if temporal:
    yield from _affine(f"{source}.time_conv", f"{path}.time_conv", TIME_CONV)


def _affine(source: str, path: str, transform: Transform) -> tuple[Rule, Rule]:
  return Rule(f"{source}.weight", f"{path}.kernel", transform), Rule(f"{source}.bias", f"{path}.bias", IDENTITY)
