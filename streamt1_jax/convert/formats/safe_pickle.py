"""Reads pickles without executing them.

A pickle is a program: the standard library's machine imports and calls whatever the program names. This machine knows
containers, numbers, strings and the constructors it is given. It has no instruction that imports. A pickle that asks
for anything else is refused, and the message names what it asked for.
"""

from __future__ import annotations

import collections
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from streamt1_jax.config import ConfigError

_LISTED = 5


class Global(NamedTuple):
  """A name that a pickle refers to, such as `torch.FloatStorage`; only the name, nothing is imported."""

  name: str


def loads(
  data: bytes, names: Mapping[str, Callable[..., Any] | None], persistent_load: Callable[[Any], Any], where: str
) -> Any:
  """The object that a pickle of protocol 2 to 5 describes.

  Args:
    data: the pickle.
    names: the dotted names that it may refer to, each with the function that is called in its place; None if the name
      may only be mentioned.
    persistent_load: called with every persistent id.
    where: begins every message.

  Returns:
    Nested dicts, lists, tuples, strings, bytes, numbers, bools, None, `Global`s and what `names` construct.

  Raises:
    ConfigError: the pickle refers to another name, needs another instruction, or is corrupt.
  """
  try:
    _refuse_names(data, names, where)
    return _Machine(names, persistent_load, where).run(data)
  except ConfigError:
    raise
  except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
    raise ConfigError(f"{where} is corrupt: {error}") from error


def _refuse_names(data: bytes, names: Mapping[str, Any], where: str) -> None:
  """Refuses all names that the pickle spells out, in one message. Protocol 4 has them on the stack instead."""
  mentioned = {str(arg).replace(" ", ".") for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"}
  refused = sorted(mentioned - set(names))
  if refused:
    more = f" and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
    raise ConfigError(
      f"{where} refers to {', '.join(refused[:_LISTED])}{more}, which is not a tensor or a plain container; "
      "it was not executed"
    )


class _Machine:
  """The stack, the stacks set aside by MARK, and the memo of one pickle."""

  def __init__(self, names: Mapping[str, Callable | None], persistent_load: Callable[[Any], Any], where: str):
    self._names, self._persistent_load, self._where = names, persistent_load, where
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []
    self._memo: dict[int, Any] = {}

  def run(self, data: bytes) -> Any:
    for opcode, argument, _ in pickletools.genops(data):
      if opcode.name in _LITERALS:
        self._stack.append(argument)
      elif opcode.name in _CONSTANTS:
        self._stack.append(_CONSTANTS[opcode.name]())
      elif opcode.name in _INSTRUCTIONS:
        _INSTRUCTIONS[opcode.name](self, argument)
      elif opcode.name not in ("PROTO", "FRAME", "STOP"):
        raise ConfigError(f"{self._where} needs the pickle instruction {opcode.name}, which is not allowed")
    (result,) = self._stack
    return result

  def _mark(self, _) -> None:
    self._below.append(self._stack)
    self._stack = []

  def _since_mark(self) -> list[Any]:
    items, self._stack = self._stack, self._below.pop()
    return items

  def _tuple(self, _) -> None:
    items = self._since_mark()
    self._stack.append(tuple(items))

  def _short_tuple(self, size: int) -> None:
    if len(self._stack) < size:
      raise ValueError("the stack is empty")
    self._stack[-size:] = [tuple(self._stack[-size:])]

  def _append(self, _) -> None:
    item = self._stack.pop()
    self._container(list).append(item)

  def _appends(self, _) -> None:
    items = self._since_mark()
    self._container(list).extend(items)

  def _set_item(self, _) -> None:
    value, key = self._stack.pop(), self._stack.pop()
    self._container(dict)[key] = value

  def _set_items(self, _) -> None:
    items = self._since_mark()
    self._container(dict).update(zip(items[::2], items[1::2], strict=True))

  def _container(self, kind: type) -> Any:
    if not isinstance(self._stack[-1], kind):
      raise ValueError(f"an item is put into something that is no {kind.__name__}")
    return self._stack[-1]

  def _put(self, index: int) -> None:
    self._memo[index] = self._stack[-1]

  def _memoize(self, _) -> None:
    self._memo[len(self._memo)] = self._stack[-1]

  def _get(self, index: int) -> None:
    self._stack.append(self._memo[index])

  def _global(self, argument: str) -> None:
    self._stack.append(self._named(argument.replace(" ", ".")))

  def _stack_global(self, _) -> None:
    name, module = self._stack.pop(), self._stack.pop()
    self._stack.append(self._named(f"{module}.{name}"))

  def _named(self, name: str) -> Global:
    if name not in self._names:
      raise ConfigError(
        f"{self._where} refers to {name[:200]}, which is not a tensor or a plain container; it was not executed"
      )
    return Global(name)

  def _reduce(self, _) -> None:
    arguments, function = self._stack.pop(), self._stack.pop()
    constructor = self._names[function.name] if isinstance(function, Global) else None
    if constructor is None or not isinstance(arguments, tuple):
      raise ValueError(f"it calls {function!r:.200}")
    self._stack.append(constructor(*arguments))

  def _build(self, _) -> None:
    # A state dict of PyTorch has attributes (`_metadata`). They do not belong to the contents of the dict.
    self._stack.pop()
    self._container(collections.OrderedDict)

  def _persistent_id(self, _) -> None:
    self._stack.append(self._persistent_load(self._stack.pop()))


_LITERALS = frozenset(
  ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES")
  + ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_TUPLE": tuple,
  "EMPTY_LIST": list,
  "EMPTY_DICT": dict,
}
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
  "MARK": _Machine._mark,
  "TUPLE": _Machine._tuple,
  "TUPLE1": lambda machine, _: machine._short_tuple(1),
  "TUPLE2": lambda machine, _: machine._short_tuple(2),
  "TUPLE3": lambda machine, _: machine._short_tuple(3),
  "APPEND": _Machine._append,
  "APPENDS": _Machine._appends,
  "SETITEM": _Machine._set_item,
  "SETITEMS": _Machine._set_items,
  "BINPUT": _Machine._put,
  "LONG_BINPUT": _Machine._put,
  "MEMOIZE": _Machine._memoize,
  "BINGET": _Machine._get,
  "LONG_BINGET": _Machine._get,
  "GLOBAL": _Machine._global,
  "STACK_GLOBAL": _Machine._stack_global,
  "REDUCE": _Machine._reduce,
  "BUILD": _Machine._build,
  "BINPERSID": _Machine._persistent_id,
}
