"""Rotary tables of the reward models, exact or rounded as the published models were run (docs/reference/rewards.md).

The reference casts its whole model to bfloat16, rotary buffers included, and was trained that way: at token 2700 some
decoder angles are off by half a turn. Unrounded tables are another model. Positions of the decoder are plain
0, 1, 2, ...: the three-axis positions of stock Qwen2-VL are not used by the reward models.

Tables depend on static sizes alone, so they are numpy arrays, built in float64 and stored as float32.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int

from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, RopeDtype, VisionConfig

Tables = tuple[Float32[np.ndarray, "places pairs"], Float32[np.ndarray, "places pairs"]]


def decoder_tables(positions: Int[np.ndarray, " places"], config: DecoderConfig, rope_dtype: RopeDtype) -> Tables:
  """Cosine and sine, each float32 [len(positions), head_dim / 2], of integer positions."""
  frequency = _frequencies(config.head_dim, config.rope_theta)
  if rope_dtype == "bf16_reference":
    frequency = _round_bf16(frequency)
  # The reference multiplies in float32: the rounded product is the angle.
  angle = np.asarray(positions, np.float32)[:, None] * frequency[None]
  return _cos_sin(angle)


def vision_axis_tables(size: int, config: VisionConfig, rope_dtype: RopeDtype) -> Tables:
  """Cosine and sine, each float32 [size, head_dim / 4], of rows or columns 0..size - 1."""
  frequency = _frequencies(config.head_dim // 2, config.rope_theta)
  position = np.arange(size, dtype=np.float32)
  if rope_dtype == "float32":
    return _cos_sin(position[:, None] * frequency[None])
  angle = _round_bf16(_round_bf16(position)[:, None] * _round_bf16(frequency)[None])
  cos, sin = _cos_sin(angle)
  return _round_bf16(cos), _round_bf16(sin)


def vision_tables(rows: int, columns: int, config: VisionConfig, rope_dtype: RopeDtype) -> Tables:
  """Cosine and sine, each float32 [rows * columns, head_dim / 2], of one temporal slice.

  Patches are ordered as the tower reads them: the `merge_size` squared patches of one token follow each other. Rows
  turn the first half of the pairs, columns the second.
  """
  merge = config.merge_size
  row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
  in_order = lambda x: x.reshape(rows // merge, merge, columns // merge, merge).swapaxes(1, 2).reshape(-1)
  row, column = in_order(row), in_order(column)
  by_row = vision_axis_tables(rows, config, rope_dtype)
  by_column = vision_axis_tables(columns, config, rope_dtype)
  cos, sin = (np.concatenate([of_row[row], of_column[column]], axis=1) for of_row, of_column in zip(by_row, by_column))
  return cos, sin


def _frequencies(width: int, theta: float) -> np.ndarray:
  """theta^(-2 k / width), k = 0..width / 2 - 1, float32."""
  return (theta ** (-np.arange(0, width, 2) / width)).astype(np.float32)


def _cos_sin(angle: np.ndarray) -> Tables:
  angle = angle.astype(np.float64)
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _round_bf16(x: np.ndarray) -> np.ndarray:
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)
