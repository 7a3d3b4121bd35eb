"""Text for messages. What a file holds is a stranger's text: it is cut and escaped before anyone sees it."""

from __future__ import annotations

import itertools
import reprlib
import unicodedata
from typing import Any

MESSAGE_LIMIT = 500
"""Characters of a message."""
_VALUE_LIMIT = 60
_GAP = " ... "
# Control and format characters, halves of pairs, and separators of lines would change how a terminal shows the message.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def one_line(text: str, limit: int = MESSAGE_LIMIT) -> str:
  r"""`text` on one line: control characters escaped as in `\n`, and the middle left out of what is too long.

  Args:
    text: what to say.
    limit: characters of the result, at least 20.
  """
  # An escape is longer than what it stands for, so no more than `limit` characters of either end can be shown.
  ends = text if len(text) <= 2 * limit else text[:limit] + text[-limit:]
  shown = "".join(map(_visible, ends))
  if len(shown) <= limit and len(ends) == len(text):
    return shown
  tail = limit // 3
  return shown[: limit - tail - len(_GAP)] + _GAP + shown[-tail:]


def shortened(value: Any, limit: int = _VALUE_LIMIT) -> str:
  """`repr(value)`, cut to `limit` characters. Only the beginning of a large or deeply nested value is looked at."""
  text = _SHORT.repr(value)
  return text if len(text) <= limit else text[: limit - 3] + "..."


def _visible(character: str) -> str:
  if unicodedata.category(character) not in _HIDDEN:
    return character
  return character.encode("unicode_escape").decode()


class _Short(reprlib.Repr):
  """`reprlib` without the places where it builds the whole text, or sorts the whole dict, before it cuts."""

  def __init__(self):
    super().__init__()
    self.maxlevel = 3
    self.maxlist = self.maxtuple = self.maxdict = 4
    self.maxstring = self.maxother = self.maxlong = _VALUE_LIMIT

  def repr_dict(self, x: Any, level: int) -> str:
    if level <= 0:
      return "{...}"
    items = [
      f"{self.repr1(key, level - 1)}: {self.repr1(item, level - 1)}"
      for key, item in itertools.islice(x.items(), self.maxdict)
    ]
    return "{" + ", ".join([*items, *(["..."] if len(x) > self.maxdict else [])]) + "}"

  repr_OrderedDict = repr_dict

  def repr_int(self, x: int, level: int) -> str:
    return repr(x) if x.bit_length() < 1000 else f"<an integer of {x.bit_length()} bits>"

  def repr_bytes(self, x: bytes, level: int) -> str:
    return repr(x[:_VALUE_LIMIT])

  def repr_instance(self, x: Any, level: int) -> str:
    return repr(x) if x is None or type(x) in (bool, float) else f"<{type(x).__name__}>"


_SHORT = _Short()
