"""Mapping tables of the UMT5 encoder: the names of Wan's own file, and those of the Hugging Face flavour.

242 tensors and 5,680,910,336 parameters at full size, under either set of names. Source: docs/reference/umt5.md.
"""

from flax import nnx

from streamt1_jax.config import ModelConfig, TextConfig
from streamt1_jax.convert import engine
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.transforms import LINEAR
from streamt1_jax.text.umt5 import UMT5Encoder
from streamt1_jax.typing import Params

WAN_RULES = (
  Rule("token_embedding.weight", "token_embedding"),
  Rule("blocks.{layer}.norm1.weight", "blocks.attn_norm.scale"),
  Rule("blocks.{layer}.attn.q.weight", "blocks.self_attn.query.kernel", LINEAR),
  Rule("blocks.{layer}.attn.k.weight", "blocks.self_attn.key.kernel", LINEAR),
  Rule("blocks.{layer}.attn.v.weight", "blocks.self_attn.value.kernel", LINEAR),
  Rule("blocks.{layer}.attn.o.weight", "blocks.self_attn.out.kernel", LINEAR),
  Rule("blocks.{layer}.pos_embedding.embedding.weight", "blocks.self_attn.position_bias"),
  Rule("blocks.{layer}.norm2.weight", "blocks.ffn_norm.scale"),
  Rule("blocks.{layer}.ffn.gate.0.weight", "blocks.ffn.gate.kernel", LINEAR),
  Rule("blocks.{layer}.ffn.fc1.weight", "blocks.ffn.up.kernel", LINEAR),
  Rule("blocks.{layer}.ffn.fc2.weight", "blocks.ffn.down.kernel", LINEAR),
  Rule("norm.weight", "final_norm.scale"),
)

_HF_ATTENTION = "encoder.block.{layer}.layer.0"
_HF_FEED_FORWARD = "encoder.block.{layer}.layer.1"

HF_RULES = (
  Rule("shared.weight", "token_embedding"),
  Rule(f"{_HF_ATTENTION}.layer_norm.weight", "blocks.attn_norm.scale"),
  Rule(f"{_HF_ATTENTION}.SelfAttention.q.weight", "blocks.self_attn.query.kernel", LINEAR),
  Rule(f"{_HF_ATTENTION}.SelfAttention.k.weight", "blocks.self_attn.key.kernel", LINEAR),
  Rule(f"{_HF_ATTENTION}.SelfAttention.v.weight", "blocks.self_attn.value.kernel", LINEAR),
  Rule(f"{_HF_ATTENTION}.SelfAttention.o.weight", "blocks.self_attn.out.kernel", LINEAR),
  Rule(f"{_HF_ATTENTION}.SelfAttention.relative_attention_bias.weight", "blocks.self_attn.position_bias"),
  Rule(f"{_HF_FEED_FORWARD}.layer_norm.weight", "blocks.ffn_norm.scale"),
  Rule(f"{_HF_FEED_FORWARD}.DenseReluDense.wi_0.weight", "blocks.ffn.gate.kernel", LINEAR),
  Rule(f"{_HF_FEED_FORWARD}.DenseReluDense.wi_1.weight", "blocks.ffn.up.kernel", LINEAR),
  Rule(f"{_HF_FEED_FORWARD}.DenseReluDense.wo.weight", "blocks.ffn.down.kernel", LINEAR),
  Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
)

HF_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""Hugging Face ties two names to one embedding table."""


def abstract_params(config: TextConfig) -> Params:
  """Shapes of the encoder's parameters, as a nested dict."""
  return engine.abstract_params(lambda: UMT5Encoder(config, nnx.Rngs(0)))


def wan_flavour(model: ModelConfig) -> Flavour:
  """The names of Wan's `models_t5_umt5-xxl-enc-bf16.pth`."""
  return Flavour("text", "Wan", WAN_RULES, abstract_params(model.required_text))


def hugging_face_flavour(model: ModelConfig) -> Flavour:
  """The names of transformers' `UMT5EncoderModel`."""
  return Flavour("text", "Hugging Face", HF_RULES, abstract_params(model.required_text), HF_ALIASES)
