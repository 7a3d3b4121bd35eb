"""Mapping tables of the causal DiT: Wan's names and diffusers' names.

825 tensors and 1,418,996,800 parameters at full size, under either set of names. Source: docs/reference/wan_dit.md.
"""

from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.config import BackboneConfig, ConfigError, ModelConfig
from streamt1_jax.convert import engine, transforms
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.transforms import LINEAR, Chain, Reorder, Squeeze, Transform
from streamt1_jax.nn.rotary import halves_order
from streamt1_jax.typing import Params

ENTRIES = ("generator", "generator_ema", "model")
"""Where training programs keep the backbone, in the order in which one is chosen."""

# Ours to Wan's, then Wan's to diffusers'. "norm3" of Wan is "norm2" of diffusers.
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_ATTENTIONS = {"self_attention": "self_attn", "cross_attention": "cross_attn"}
_FEED_FORWARD = {"ffn_in": "ffn.0", "ffn_out": "ffn.2"}
_TOP_LINEAR = {
  "text_in": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
  "text_out": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
  "time_in": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
  "time_out": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
  "time_projection": ("time_projection.1", "condition_embedder.time_proj"),
  "head": ("head.head", "proj_out"),
}
_DIFFUSERS = {
  "self_attn.q": "attn1.to_q",
  "self_attn.k": "attn1.to_k",
  "self_attn.v": "attn1.to_v",
  "self_attn.o": "attn1.to_out.0",
  "self_attn.norm": "attn1.norm",
  "cross_attn.q": "attn2.to_q",
  "cross_attn.k": "attn2.to_k",
  "cross_attn.v": "attn2.to_v",
  "cross_attn.o": "attn2.to_out.0",
  "cross_attn.norm": "attn2.norm",
  "ffn.0": "ffn.net.0.proj",
  "ffn.2": "ffn.net.2",
  "norm3": "norm2",
  "modulation": "scale_shift_table",
}


def _rotated(config: BackboneConfig) -> Transform:
  """Rotary pairs from interleaved to halves, in a tensor whose last axis is the channels of queries or keys."""
  return Reorder(tuple(int(i) for i in halves_order(config.num_heads, config.head_dim)))


def _linear(source: str, path: str, channels: Transform = transforms.IDENTITY) -> list[Rule]:
  kernel = Chain((LINEAR, channels))
  return [Rule(f"{source}.weight", f"{path}.kernel", kernel), Rule(f"{source}.bias", f"{path}.bias", channels)]


def wan_rules(config: BackboneConfig) -> list[Rule]:
  """The table for Wan's names."""
  rules = [
    Rule("patch_embedding.weight", "patch_embedding.kernel", transforms.patch_embedding(config.patch_size)),
    Rule("patch_embedding.bias", "patch_embedding.bias"),
    Rule("head.modulation", "head_modulation", Squeeze((0,))),
    Rule("blocks.{layer}.modulation", "blocks.modulation", Squeeze((0,))),
    Rule("blocks.{layer}.norm3.weight", "blocks.cross_norm.scale"),
    Rule("blocks.{layer}.norm3.bias", "blocks.cross_norm.bias"),
  ]
  for path, (source, _) in _TOP_LINEAR.items():
    rules += _linear(source, path)
  for path, source in _FEED_FORWARD.items():
    rules += _linear(f"blocks.{{layer}}.{source}", f"blocks.{path}")
  for attention, short in _ATTENTIONS.items():
    for path, source in _PROJECTIONS.items():
      rules += _linear(
        f"blocks.{{layer}}.{short}.{source}", f"blocks.{attention}.{path}", _channels(config, attention, path)
      )
    for path in ("query", "key"):
      source = f"blocks.{{layer}}.{short}.norm_{_PROJECTIONS[path]}.weight"
      rules.append(Rule(source, f"blocks.{attention}.{path}_norm.scale", _channels(config, attention, path)))
  return rules


def _channels(config: BackboneConfig, attention: str, projection: str) -> Transform:
  rotated = attention == "self_attention" and projection in ("query", "key")
  return _rotated(config) if rotated else transforms.IDENTITY


def diffusers_rules(config: BackboneConfig) -> list[Rule]:
  """The same table under diffusers' names."""
  return [Rule(diffusers_name(rule.source), rule.path, rule.transform) for rule in wan_rules(config)]


def diffusers_name(name: str) -> str:
  """diffusers' name of a Wan tensor."""
  if name == "head.modulation":
    return "scale_shift_table"
  for wan, theirs in _TOP_LINEAR.values():
    if name.startswith(f"{wan}."):
      return theirs + name.removeprefix(wan)
  if not name.startswith("blocks."):
    return name
  _, layer, rest = name.split(".", 2)
  for wan, theirs in _DIFFUSERS.items():
    if rest == wan or rest.startswith((f"{wan}.", f"{wan}_")):
      return f"blocks.{layer}.{theirs}{rest.removeprefix(wan)}"
  raise ConfigError(f"{name} is not a tensor of the Wan DiT")


def abstract_params(model: ModelConfig) -> Params:
  """Shapes of the backbone's parameters, as a nested dict."""
  return engine.abstract_params(lambda: CausalWanDiT(model, nnx.Rngs(0)))


def wan_flavour(model: ModelConfig) -> Flavour:
  """The names of Wan's own files and of the training programs that grew from them."""
  return Flavour("backbone", "Wan", tuple(wan_rules(model.backbone)), abstract_params(model), entries=ENTRIES)


def diffusers_flavour(model: ModelConfig) -> Flavour:
  """The names of diffusers' `WanTransformer3DModel`."""
  rules = tuple(diffusers_rules(model.backbone))
  return Flavour("backbone", "diffusers", rules, abstract_params(model), entries=ENTRIES)
