"""Models of diffusers and transformers, all parameters random: layers that begin at zero would hide a wrong mapping."""

from collections.abc import Iterable

import diffusers
import torch
import transformers

from streamt1_jax.config import BackboneConfig, TextConfig


def fill(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int) -> None:
  """Linear layers at the scale of their width, norms around one, everything else at 0.3; nothing is left at zero."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in parameters:
      noise = torch.randn(parameter.shape, generator=generator)
      if "norm" in name and not name.endswith("bias"):
        parameter.copy_(1.0 + 0.2 * noise)
      elif name.endswith("weight"):
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
      else:
        parameter.copy_(0.3 * noise)


def wan_transformer(config: BackboneConfig, seed: int = 0) -> diffusers.WanTransformer3DModel:
  """diffusers' backbone of this size."""
  model = diffusers.WanTransformer3DModel(
    patch_size=(1, 2, 2),
    num_attention_heads=config.num_heads,
    attention_head_dim=config.head_dim,
    in_channels=config.latent_channels,
    out_channels=config.latent_channels,
    text_dim=config.text_dim,
    freq_dim=config.freq_dim,
    ffn_dim=config.ffn_dim,
    num_layers=config.num_layers,
    cross_attn_norm=True,
    eps=config.eps,
  ).eval()
  fill(model.named_parameters(), seed)
  return model


def umt5_encoder(config: TextConfig, seed: int = 0) -> transformers.UMT5EncoderModel:
  """transformers' text encoder of this size."""
  model = transformers.UMT5EncoderModel(
    transformers.UMT5Config(
      vocab_size=config.vocab_size,
      d_model=config.dim,
      d_kv=config.attn_dim // config.num_heads,
      d_ff=config.ffn_dim,
      num_heads=config.num_heads,
      num_layers=config.num_layers,
      relative_attention_num_buckets=config.num_buckets,
      relative_attention_max_distance=config.max_distance,
      layer_norm_epsilon=config.eps,
      feed_forward_proj="gated-gelu",
      dropout_rate=0.0,
    )
  ).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0.0, 0.3, generator=generator)
  return model
