"""Mapping table of Qwen2-VL inside a reward model, under the names of old and new transformers.

Source: docs/reference/rewards.md. Old names (up to 4.51) are those of the published checkpoints; 4.52 moved
the vision tower and the decoder below a common `model.`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.transforms import LINEAR, Chain, Merge, Transpose

UNUSED = ("lm_head.weight",)
"""In every published file, and read by no reward."""


@dataclasses.dataclass(frozen=True)
class RewardConversion:
  """How a published reward model with a Qwen2-VL backbone is converted; its name is that of the reward.

  Attributes:
    rules: gives the mapping table, (configuration, whether names are those of transformers 4.52) to rules.
    file: name of the published file of weights; its suffix says in which format it is.
    text: where the instruction text is published, for help texts.
    text_member: path of the Python module with the text inside a published wheel; "" if there is no wheel.
    text_constants: the strings of that module that make the text, one after the other.
    lora: rank and alpha of the adapters that the published file holds beside the base weights; None if it holds none.
  """

  rules: Callable[[Any, bool], list[Rule]]
  file: str
  text: str
  text_member: str
  text_constants: tuple[str, ...]
  lora: tuple[int, int] | None


_NEW_PREFIXES = {"visual.": "model.visual.", "model.": "model.language_model."}


def rules(temporal_patch: int, patch_size: int, new_names: bool = False) -> list[Rule]:
  """The table; parameters are below `backbone.`.

  Args:
    temporal_patch: frames of a patch.
    patch_size: pixels on a side of a patch.
    new_names: whether the checkpoint was written by transformers 4.52 or later.
  """
  table = [*_vision_rules(temporal_patch, patch_size), *_decoder_rules()]
  if not new_names:
    return table
  return [Rule(new_name(rule.source), rule.path, rule.transform) for rule in table]


def new_name(name: str) -> str:
  """What transformers 4.52 calls a tensor of an older checkpoint."""
  for old, new in _NEW_PREFIXES.items():
    if name.startswith(old):
      return new + name.removeprefix(old)
  return name


def has_new_names(names: Iterable[str]) -> bool:
  return any(name.startswith(tuple(_NEW_PREFIXES.values())) for name in names)


def _linear(source: str, path: str, bias: bool = True) -> list[Rule]:
  kernel = Rule(f"{source}.weight", f"{path}.kernel", LINEAR)
  return [kernel, Rule(f"{source}.bias", f"{path}.bias")] if bias else [kernel]


def _norm(source: str, path: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{path}.scale"), Rule(f"{source}.bias", f"{path}.bias")]


def _vision_rules(temporal_patch: int, patch_size: int) -> list[Rule]:
  # A convolution whose kernel is its stride is a matrix of the flattened patch: channel, frame, row, column.
  matrix = Chain((Transpose((1, 2, 3, 4, 0)), Merge((3, temporal_patch, patch_size, patch_size))))
  source, path = "visual.blocks.{layer}", "backbone.vision.blocks"
  merger, merger_path = "visual.merger", "backbone.vision.merger"
  return [
    Rule("visual.patch_embed.proj.weight", "backbone.vision.patch_embedding.kernel", matrix),
    *_norm(f"{source}.norm1", f"{path}.attn_norm"),
    *_linear(f"{source}.attn.qkv", f"{path}.qkv"),
    *_linear(f"{source}.attn.proj", f"{path}.out"),
    *_norm(f"{source}.norm2", f"{path}.ffn_norm"),
    *_linear(f"{source}.mlp.fc1", f"{path}.ffn_in"),
    *_linear(f"{source}.mlp.fc2", f"{path}.ffn_out"),
    *_norm(f"{merger}.ln_q", f"{merger_path}.norm"),
    *_linear(f"{merger}.mlp.0", f"{merger_path}.hidden"),
    *_linear(f"{merger}.mlp.2", f"{merger_path}.out"),
  ]


def _decoder_rules() -> list[Rule]:
  source, path = "model.layers.{layer}", "backbone.decoder.blocks"
  return [
    Rule("model.embed_tokens.weight", "backbone.decoder.token_embedding"),
    Rule(f"{source}.input_layernorm.weight", f"{path}.attn_norm.scale"),
    *_linear(f"{source}.self_attn.q_proj", f"{path}.query"),
    *_linear(f"{source}.self_attn.k_proj", f"{path}.key"),
    *_linear(f"{source}.self_attn.v_proj", f"{path}.value"),
    *_linear(f"{source}.self_attn.o_proj", f"{path}.out", bias=False),
    Rule(f"{source}.post_attention_layernorm.weight", f"{path}.ffn_norm.scale"),
    *_linear(f"{source}.mlp.gate_proj", f"{path}.gate", bias=False),
    *_linear(f"{source}.mlp.up_proj", f"{path}.up", bias=False),
    *_linear(f"{source}.mlp.down_proj", f"{path}.down", bias=False),
    Rule("model.norm.weight", "backbone.decoder.final_norm.scale"),
  ]
