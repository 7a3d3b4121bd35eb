"""Tensors that stay on disk until they are read, as a whole or row by row."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from streamt1_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor whose shape and dtype are known before it is read; `np.asarray` reads it whole.

  Attributes:
    shape: its shape.
    dtype: dtype of what is read; bfloat16 is `ml_dtypes.bfloat16`.
    read: `read(start, stop)` gives rows `start..stop - 1` of the leading axis; of a tensor without axes
      `read(0, 1)` gives the tensor. Raises ConfigError if the file is damaged.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[int, int], Shaped[np.ndarray, " ..."]] = dataclasses.field(repr=False)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, " ..."]:
    array = self.read(0, self.shape[0] if self.shape else 1)
    return array if dtype is None else array.astype(dtype, copy=False)

  def blocks(self, max_bytes: int) -> Iterator[Shaped[np.ndarray, " ..."]]:
    """The tensor in order, in blocks of whole rows: as many as fit into `max_bytes`, and at least one.

    A tensor without numbers is one block, however many rows it has.
    """
    if not self.shape or 0 in self.shape:
      yield np.asarray(self)
      return
    rows = max(1, max_bytes // (math.prod(self.shape[1:]) * self.dtype.itemsize))
    for start in range(0, self.shape[0], rows):
      yield self.read(start, min(start + rows, self.shape[0]))


def read_bytes(path: pathlib.Path, offset: int, count: int) -> UInt8[np.ndarray, " {count}"]:
  """`count` bytes of a file from `offset` on, uint8. Raises ConfigError if the file ends before."""
  try:
    # Compared first, because memory for `count` bytes is taken before they are read.
    if not 0 <= offset <= offset + count <= path.stat().st_size:
      raise ConfigError(f"{path} is truncated: it ends before byte {offset + count}")
    content = np.fromfile(path, np.uint8, count, offset=offset)
  except OSError as error:
    raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
  if content.size != count:
    raise ConfigError(f"{path} is truncated: it ends before byte {offset + count}")
  return content
