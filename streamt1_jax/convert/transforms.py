"""Invertible changes of layout between PyTorch tensors and our parameters (docs/reference/checkpoints.md).

They use only methods that numpy arrays share with traced arrays, so that `jax.eval_shape` can run them on shapes alone.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Transform(Protocol):
  """`inverse(forward(x)) == x`, bit for bit."""

  def forward(self, tensor: Any) -> Any:
    """From the checkpoint's layout to the parameter's."""
    ...

  def inverse(self, array: Any) -> Any:
    """From the parameter's layout to the checkpoint's."""
    ...


@dataclasses.dataclass(frozen=True)
class Transpose:
  """Axis i of the parameter is axis `order[i]` of the checkpoint's tensor."""

  order: tuple[int, ...]

  def forward(self, tensor):
    return tensor.transpose(self.order)

  def inverse(self, array):
    return array.transpose(tuple(self.order.index(axis) for axis in range(len(self.order))))


@dataclasses.dataclass(frozen=True)
class Squeeze:
  """Drops axes of size 1; `axes` counts those of the checkpoint's tensor, in ascending order."""

  axes: tuple[int, ...]

  def forward(self, tensor):
    return tensor.squeeze(self.axes)

  def inverse(self, array):
    shape = list(array.shape)
    for axis in self.axes:
      shape.insert(axis, 1)
    return array.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Merge:
  """Flattens the leading axes, whose sizes are `sizes`; one size may be -1 and is then inferred."""

  sizes: tuple[int, ...]

  def forward(self, tensor):
    return tensor.reshape(-1, *tensor.shape[len(self.sizes) :])

  def inverse(self, array):
    return array.reshape(*self.sizes, *array.shape[1:])


@dataclasses.dataclass(frozen=True)
class Reorder:
  """Index i of the last axis is index `order[i]` of the checkpoint's tensor."""

  order: tuple[int, ...]

  def forward(self, tensor):
    return tensor.take(np.asarray(self.order), axis=-1)

  def inverse(self, array):
    return array.take(np.argsort(self.order), axis=-1)


@dataclasses.dataclass(frozen=True)
class Chain:
  """Several transforms in turn, starting from the checkpoint's layout. An empty chain changes nothing."""

  steps: tuple[Transform, ...] = ()

  def forward(self, tensor):
    for step in self.steps:
      tensor = step.forward(tensor)
    return tensor

  def inverse(self, array):
    for step in reversed(self.steps):
      array = step.inverse(array)
    return array


IDENTITY = Chain()
LINEAR = Transpose((1, 0))
"""`[out, in]` to `[in, out]`."""
CONV2D = Transpose((2, 3, 1, 0))
"""OIHW to HWIO."""
CONV3D = Transpose((2, 3, 4, 1, 0))
"""OIDHW to DHWIO."""


def patch_embedding(patch_size: int) -> Transform:
  """Strided convolution `[dim, C, 1, p, p]` to a matrix `[p * p * C, dim]`; C runs fastest, rows slowest."""
  return Chain((Squeeze((2,)), CONV2D, Merge((patch_size, patch_size, -1))))


def pointwise(num_spatial: int) -> Transform:
  """Convolution with a kernel of one pixel, `[out, in, 1, ...]` with `num_spatial` ones, to `[in, out]`."""
  return Chain((Squeeze(tuple(range(2, 2 + num_spatial))), LINEAR))


def gamma(num_spatial: int) -> Transform:
  """Channel scale `[C, 1, ...]` with `num_spatial` ones to `[C]`."""
  return Squeeze(tuple(range(1, 1 + num_spatial)))
