"""Mapping table of VideoAlign, whose file holds unmerged adapters (rewards spec, section 3.6)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamt1_jax.convert import engine, peft_merge
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.convert.transforms import LINEAR
from streamt1_jax.rewards.videoalign import VideoAlignConfig, abstract_params
from streamt1_jax.typing import Params

LORA_RANK = 64
LORA_ALPHA = 128


def rules(config: VideoAlignConfig, new_names: bool = False) -> list[Rule]:
  """The table of the merged checkpoint, under old or new names of transformers."""
  vision = config.backbone.vision
  head = Rule("rm_head.weight", "head.kernel", LINEAR)
  return [*qwen2_vl.rules(vision.temporal_patch, vision.patch_size, new_names), head]


def convert(
  tensors: Mapping[str, np.ndarray],
  config: VideoAlignConfig,
  dtype: Any = np.float32,
  *,
  lora_rank: int = LORA_RANK,
  lora_alpha: float = LORA_ALPHA,
) -> Params:
  """Converts a checkpoint, with or without peft's adapters, under old or new names; see `engine.convert`.

  Args:
    tensors: the checkpoint.
    config: sizes.
    dtype: dtype of the backbone. Adapters are merged in float32 first.
    lora_rank: rank of the adapters, if there are any.
    lora_alpha: numerator of their scale.
  """
  if peft_merge.is_peft(tensors):
    tensors = peft_merge.merged(tensors, lora_rank, lora_alpha)
  table = rules(config, qwen2_vl.has_new_names(tensors))
  return engine.convert(tensors, table, abstract_params(config, dtype), ignore=qwen2_vl.UNUSED)
