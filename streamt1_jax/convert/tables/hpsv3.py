"""Mapping table of HPSv3: 736 tensors, of which the language-model head is left out (rewards spec, section 2.6)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamt1_jax.convert import engine
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.tables import qwen2_vl
from streamt1_jax.convert.transforms import LINEAR
from streamt1_jax.rewards.hpsv3 import HPSv3Config, abstract_params
from streamt1_jax.typing import Params

_HEAD = {"first": 0, "second": 3, "out": 5}  # places of the linear layers among activations and dropout


def rules(config: HPSv3Config, new_names: bool = False) -> list[Rule]:
  """The table, under old or new names of transformers."""
  vision = config.backbone.vision
  table = qwen2_vl.rules(vision.temporal_patch, vision.patch_size, new_names)
  for name, place in _HEAD.items():
    table.append(Rule(f"rm_head.{place}.weight", f"head.{name}.kernel", LINEAR))
    table.append(Rule(f"rm_head.{place}.bias", f"head.{name}.bias"))
  return table


def convert(tensors: Mapping[str, np.ndarray], config: HPSv3Config, dtype: Any = np.float32) -> Params:
  """Converts a checkpoint with old or new names; see `engine.convert`. `dtype` is the backbone's."""
  table = rules(config, qwen2_vl.has_new_names(tensors))
  return engine.convert(tensors, table, abstract_params(config, dtype), ignore=qwen2_vl.UNUSED)
