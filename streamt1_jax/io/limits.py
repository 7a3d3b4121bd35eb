"""What a file may claim. Every reader of weights asks here first, before it computes or allocates anything.

A header is a stranger's text: 64 bytes of it can speak of 2^70 dimensions. The limits are far above what published
models have, so a file beyond them is damaged or hostile:

  limit            here       the most in a published file that is read here
  tensors          65,536     825, in the DiT
  name             1,024      under 100 characters
  dimensions       64         5, of a convolution; numpy has no more than 64
  numbers          2^59       1.1e9, UMT5's embedding; sizes in bytes then fit into 63 bits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamt1_jax.config import ConfigError
from streamt1_jax.messages import shortened

MAX_TENSORS = 2**16
MAX_NAME = 1024
MAX_RANK = 64
MAX_NUMBERS = 2**59


def require_few(count: int, where: str) -> None:
  """Raises ConfigError, beginning with `where`, if a file has more tensors, or parts, than any model has."""
  if count > MAX_TENSORS:
    raise ConfigError(f"{where} has {count} entries; at most {MAX_TENSORS} are read")


def require_name(name: Any, where: str) -> str:
  """`name`. Raises ConfigError unless it is a text of a tensor's name."""
  if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
    raise ConfigError(f"{where}: a tensor's name must have 1 to {MAX_NAME} characters, got {shortened(name)}")
  return name


def require_numbers(numbers: Any, where: str) -> tuple[int, ...]:
  """`numbers`, such as a shape, as a tuple. Raises ConfigError unless they are up to 64 sizes, each of 0 to 2^59."""
  if not isinstance(numbers, (list, tuple)):
    raise ConfigError(f"{where} must be a list of whole numbers, got {shortened(numbers)}")
  if len(numbers) > MAX_RANK:
    raise ConfigError(f"{where} has {len(numbers)} dimensions; at most {MAX_RANK} are read")
  for number in numbers:
    if type(number) is not int or not 0 <= number <= MAX_NUMBERS:
      raise ConfigError(f"{where} must be whole numbers of 0 to 2^59, got {shortened(number)}")
  return tuple(numbers)


def count_numbers(shape: Any, where: str) -> int:
  """How many numbers an array of `shape` has.

  Raises ConfigError if `shape` is not a list of sizes, or has more than 2^59 numbers.
  """
  count = 1
  for size in require_numbers(shape, where):
    # Zeros are left out: numpy refuses an empty array whose other dimensions are too large.
    count *= size or 1
    if count > MAX_NUMBERS:
      raise ConfigError(f"{where} {shortened(list(shape))} has more than 2^59 numbers")
  return 0 if 0 in shape else count


def require_view(shape: Any, strides: Any, offset: Any, size: int, where: str) -> None:
  """Raises ConfigError unless a view stays inside its storage.

  Args:
    shape: claimed shape of the view.
    strides: claimed numbers between neighbours along each dimension.
    offset: claimed place of its first number.
    size: numbers in the storage.
    where: begins every message.
  """
  count_numbers(shape, f"{where}: shape")
  steps = require_numbers(strides, f"{where}: strides")
  (first,) = require_numbers([offset], f"{where}: offset")
  if len(steps) != len(shape):
    raise ConfigError(f"{where} has {len(shape)} dimensions and {len(steps)} strides")
  if first + span(shape, steps) > size:
    view = f"shape {shortened(list(shape))} and strides {shortened(list(steps))}"
    raise ConfigError(f"{where} of {view} leaves its storage")


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
  """How many numbers of a storage lie between the first and the last that a view touches, both included."""
  if 0 in shape:
    return 0
  return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
