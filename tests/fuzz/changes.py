"""Random changes of bytes, of JSON and of pickles."""

from __future__ import annotations

import copy
import json
import pickletools
from typing import Any

import numpy as np

Rng = np.random.Generator

_NUMBERS = (0, 1, 2, 3, 64, 65, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**70)
_VALUES = (
  *_NUMBERS,
  *(-1, -(2**63), 10**400, 0.0, -0.5, 1e308, True, False, None, "", "0", "a\nb\x1b[31m\u202e", "\ud800", "\0"),
  *("../../../etc/passwd", "/dev/zero", "x" * 300, "x" * 70_000, [], {}, [[]], {"": 0}, [0] * 70, [2**40, 0]),
  *([1] * 5000, {"F32": None}, ["F32"], "float32", "1.0"),
)


def pick(rng: Rng, values: Any) -> Any:
  return values[rng.integers(len(values))]


def of_bytes(rng: Rng, content: bytes, changes: int = 3, low: int = 0, high: int | None = None) -> bytes:
  """`content` after 1 to `changes` changes between `low` and `high`: flips, numbers, cuts, insertions, repetitions."""
  data = bytearray(content)
  for _ in range(rng.integers(1, changes + 1)):
    end = min(len(data), len(data) if high is None else high)
    if end <= low:
      break
    at = int(rng.integers(low, end))
    match rng.integers(8):
      case 0 | 1 | 2:
        data[at] ^= 1 << int(rng.integers(8))
      case 3:
        data[at] = int(rng.integers(256))
      case 4:
        size = int(pick(rng, (1, 2, 4, 8)))
        number = pick(rng, _NUMBERS) % 2 ** (8 * size)
        data[at : at + size] = number.to_bytes(size, pick(rng, ("little", "big")))
      case 5:
        del data[at : at + int(rng.integers(1, 40))]
      case 6:
        data[at:at] = bytes(rng.integers(0, 256, rng.integers(1, 40), np.uint8))
      case 7 if rng.integers(4) == 0:
        del data[at:]
      case _:
        piece = data[at : at + int(rng.integers(1, 200))]
        data[at:at] = piece * int(rng.integers(1, 4))
  return bytes(data)


def of_json(rng: Rng, document: Any, changes: int = 2) -> str:
  """Text of `document` after 1 to `changes` changes of values and names; now and then names stand twice."""
  text = json.dumps(of_values(rng, document, changes))
  if rng.integers(8) == 0 and text.startswith("{") and len(text) > 2:
    text = text[:-1] + "," + text[1:]
  if rng.integers(8) == 0:
    text = of_bytes(rng, text.encode(), 1).decode("utf-8", "replace")
  return text


def of_values(rng: Rng, document: Any, changes: int = 2) -> Any:
  """`document`, JSON values, after 1 to `changes` changes of values and names."""
  document = copy.deepcopy(document)
  for _ in range(rng.integers(1, changes + 1)):
    places = list(_places(document))
    if not places:
      break
    container, key = pick(rng, places)
    match rng.integers(6):
      case 0 | 1 | 2:
        container[key] = copy.deepcopy(pick(rng, _VALUES))
      case 3:
        container[key] = copy.deepcopy(pick(rng, places)[0])
      case 4 if isinstance(container, dict):
        container[str(pick(rng, _VALUES))] = container.pop(key)
      case _:
        del container[key]
  return document


def _places(value: Any, depth: int = 0):
  if depth > 6:
    return
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, item in items:
    yield value, key
    yield from _places(item, depth + 1)


def of_pickle(rng: Rng, data: bytes, changes: int = 3) -> bytes:
  """A pickle after 1 to `changes` changes: steps dropped, doubled, exchanged, put in from elsewhere, or grown."""
  starts = [position for _, _, position in pickletools.genops(data)]
  steps = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)])]
  for _ in range(rng.integers(1, changes + 1)):
    at, other = (int(rng.integers(1, len(steps))) for _ in range(2))
    match rng.integers(7):
      case 0:
        del steps[at]
      case 1:
        steps.insert(at, steps[other])
      case 2:
        steps[at], steps[other] = steps[other], steps[at]
      case 3:
        steps.insert(at, _step(rng))
      case 4:
        steps[at] = _step(rng)
      case 5:
        steps[at:at] = [b"]", *_laughs(rng)]
      case 6:
        steps[at] = of_bytes(rng, steps[at], 1)
    if len(steps) < 2:
      break
  return b"".join(steps)


def _step(rng: Rng) -> bytes:
  number = int(pick(rng, _NUMBERS))
  text = pick(rng, ("0", "storage", "a\nb\x1b", "x" * 3000, "os", "system", "torch", "FloatStorage")).encode()
  return pick(
    rng,
    (
      *(
        b"N",
        b"\x88",
        b"]",
        b"}",
        b")",
        b"(",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
        b"R",
        b"Q",
        b"b",
      ),
      *(b"\x94", b"\x93", b"0", b"1", b"2", b"l", b"d", b"i", b"o", b"\x81", b"\x8f", b"\x90", b"\x92", b"."),
      *(b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"),
      *(b"h" + bytes([number % 256]), b"q" + bytes([number % 256]), b"j" + (number % 2**32).to_bytes(4, "little")),
      *(b"K" + bytes([number % 256]), b"J" + (number % 2**32).to_bytes(4, "little")),
      b"\x8a\x0a" + (number % 2**79).to_bytes(10, "little"),
      b"X" + len(text).to_bytes(4, "little") + text,
      b"G" + bytes(rng.integers(0, 256, 8, np.uint8)),
      pick(rng, (b"N", b"]", b"(", b"]\x94", b"}")) * int(pick(rng, (10, 1000, 600_000))),
    ),
  )


def _laughs(rng: Rng) -> list[bytes]:
  """Steps that put a list, or a pair, into another many times over, and that one likewise."""
  levels = int(rng.integers(5, 60))
  if rng.integers(2):
    return [b"q\xfa" + b"h\xfa" + b"\x86"] * levels
  return [b"q\xfa](" + b"h\xfa" * 10 + b"e"] * levels
