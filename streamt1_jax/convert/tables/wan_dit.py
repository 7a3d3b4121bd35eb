"""Mapping tables of the causal DiT: Wan's names, diffusers' names, and peft adapters.

Source: Wan spec, sections 1.2 and 1.7. 825 tensors and 1,418,996,800 parameters at full size, under either set of
  names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.config import BackboneConfig, ConfigError, ModelConfig
from streamt1_jax.convert import engine, transforms
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.transforms import LINEAR, Chain, Reorder, Squeeze, Transform
from streamt1_jax.nn.rotary import halves_order
from streamt1_jax.typing import Params

_PEFT = "base_model.model."

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
  """Rotary pairs from interleaved to halves, for whatever ends in the channels of rotated queries or keys."""
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


def convert(tensors: Mapping[str, np.ndarray], model: ModelConfig, dtype: Any = None) -> Params:
  """Converts a checkpoint with Wan's or diffusers' names; see `engine.convert`."""
  by_diffusers = any(name.startswith("condition_embedder.") for name in tensors)
  rules = diffusers_rules(model.backbone) if by_diffusers else wan_rules(model.backbone)
  return engine.convert(tensors, rules, abstract_params(model), dtype)


def lora_targets() -> dict[str, str]:
  """The ten adapted layers of a block: dotted path of ours to Wan's name."""
  attention = {f"{a}.{p}": f"{_ATTENTIONS[a]}.{_PROJECTIONS[p]}" for a in _ATTENTIONS for p in _PROJECTIONS}
  return attention | _FEED_FORWARD


def lora_rules(config: BackboneConfig, diffusers: bool = False) -> list[Rule]:
  """The table for a peft adapter on the ten linear layers of every block."""
  rules = []
  for path, source in lora_targets().items():
    source = f"blocks.{{layer}}.{source}"
    source = _PEFT + (diffusers_name(source) if diffusers else source)
    channels = _channels(config, *path.split(".")) if "." in path else transforms.IDENTITY
    rules.append(Rule(f"{source}.lora_A.weight", f"blocks.{path}.down", LINEAR))
    rules.append(Rule(f"{source}.lora_B.weight", f"blocks.{path}.up", Chain((LINEAR, channels))))
  return rules


def convert_lora(tensors: Mapping[str, np.ndarray], model: ModelConfig) -> Params:
  """Converts a peft adapter (keys `base_model.model.<module>.lora_{A,B}.weight`) for `lora.merge_lora`; float32.

  The rank is read from the adapter. Raises ConfigError as `engine.convert` does.
  """
  rules = lora_rules(model.backbone)
  return engine.convert(tensors, rules, _abstract_adapter(rules, model, adapter_rank(tensors, "an adapter")))


def adapter_rank(tensors: Mapping[str, Any], where: str) -> int:
  """The one rank of an adapter. Raises ConfigError, beginning with `where`, if there is none or are several."""
  ranks = sorted({tuple(tensor.shape)[:1] for name, tensor in tensors.items() if name.endswith("lora_A.weight")})
  if len(ranks) != 1 or ranks == [()]:
    found = [rank for (rank,) in filter(None, ranks)]
    raise ConfigError(f"{where} needs one rank, found {found or 'no lora_A tensors'}")
  return ranks[0][0]


def check_lora(tensors: Mapping[str, Any], model: ModelConfig, rank: int) -> dict[str, str]:
  """Compares an adapter under Wan's or diffusers' names with the model.

  A linear layer may be left out of all blocks, but not of some.

  Args:
    tensors: names (peft's, with its prefix) to anything with `shape` and `dtype`.
    model: the model it is for.
    rank: what `adapter_rank` gave.

  Returns:
    Every adapted module, named as in `tensors` without `.lora_A.weight`, to Wan's name of it.

  Raises:
    ConfigError: as `engine.convert` does.
  """
  layers = range(model.backbone.num_layers)
  tables = [lora_rules(model.backbone, diffusers) for diffusers in (False, True)]
  occurring = [
    {_module(rule) for rule in table if any(_at(rule, layer) in tensors for layer in layers)} for table in tables
  ]
  diffusers = len(occurring[1]) > len(occurring[0])
  adapted = occurring[diffusers] or set(lora_targets())
  rules = [rule for rule in tables[diffusers] if _module(rule) in adapted]
  engine.check(tensors, rules, _abstract_adapter(rules, model, rank))
  return {
    _at(rule, layer).removesuffix(".lora_A.weight"): f"blocks.{layer}.{lora_targets()[_module(rule)]}"
    for rule in rules
    if rule.path.endswith(".down")
    for layer in layers
  }


def _module(rule: Rule) -> str:
  return rule.path.removeprefix("blocks.").rpartition(".")[0]


def _at(rule: Rule, layer: int) -> str:
  return rule.source.replace("{layer}", str(layer))


def _abstract_adapter(rules: Sequence[Rule], model: ModelConfig, rank: int) -> Params:
  """Shapes of the adapter that these rules write."""
  kernels = abstract_params(model)["blocks"]
  adapter: Params = {}
  for rule in rules:
    *module, matrix = rule.path.split(".")[1:]
    kernel, target = kernels, adapter
    for key in module:
      kernel, target = kernel[key], target.setdefault(key, {})
    layers, inputs, outputs = kernel["kernel"].shape
    shape = (layers, inputs, rank) if matrix == "down" else (layers, rank, outputs)
    target[matrix] = jax.ShapeDtypeStruct(shape, np.float32)
  return {"blocks": adapter}
