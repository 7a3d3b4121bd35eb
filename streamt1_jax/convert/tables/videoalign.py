"""Mapping table of VideoAlign, whose file holds unmerged adapters (docs/reference/rewards.md)."""

from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.convert.tables.qwen2_vl import RewardConversion
from streamt1_jax.convert.transforms import LINEAR
from streamt1_jax.rewards.videoalign import VideoAlignConfig


def rules(config: VideoAlignConfig, new_names: bool = False) -> list[Rule]:
  """The table of the merged checkpoint, under old or new names of transformers."""
  vision = config.backbone.vision
  head = Rule("rm_head.weight", "head.kernel", LINEAR)
  return [*qwen2_vl.rules(vision.temporal_patch, vision.patch_size, new_names), head]


CONVERSION = RewardConversion(
  rules=rules,
  file="model.pth",
  text="prompt_template.py of its repository",
  text_member="",
  text_constants=("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",),
  lora=(64, 128),
)
