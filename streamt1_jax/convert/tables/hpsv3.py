"""Mapping table of HPSv3: 736 tensors, without the language-model head (docs/reference/rewards.md)."""

from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.convert.tables.qwen2_vl import RewardConversion
from streamt1_jax.convert.transforms import LINEAR
from streamt1_jax.rewards.hpsv3 import HPSv3Config

_HEAD = {"first": 0, "second": 3, "out": 5}  # places of the linear layers among activations and dropout


def rules(config: HPSv3Config, new_names: bool = False) -> list[Rule]:
  """The table, under old or new names of transformers."""
  vision = config.backbone.vision
  table = qwen2_vl.rules(vision.temporal_patch, vision.patch_size, new_names)
  for name, place in _HEAD.items():
    table.append(Rule(f"rm_head.{place}.weight", f"head.{name}.kernel", LINEAR))
    table.append(Rule(f"rm_head.{place}.bias", f"head.{name}.bias"))
  return table


CONVERSION = RewardConversion(
  rules=rules,
  file="HPSv3.safetensors",
  text="the wheel of hpsv3 1.0.0, or its data_collator_qwen.py",
  text_member="hpsv3/dataset/data_collator_qwen.py",
  text_constants=("INSTRUCTION", "prompt_with_special_token"),
  lora=None,
)
