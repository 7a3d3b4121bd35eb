"""The published reward models that can be converted, by the names of `rewards.table.REWARDS`."""

from collections.abc import Mapping

from streamt1_jax.convert.tables import hpsv3, videoalign
from streamt1_jax.convert.tables.qwen2_vl import RewardConversion

CONVERSIONS: Mapping[str, RewardConversion] = {"hpsv3": hpsv3.CONVERSION, "videoalign": videoalign.CONVERSION}
