"""Reads pickles without executing them.

A pickle is a program: the standard library's machine imports and calls whatever the program names. This machine knows
containers, numbers, strings and the constructors it is given. It has no instruction that imports. A pickle that asks
for anything else is refused, and the message names what it asked for.

It is bounded as well, so that a small file costs little. A step of a pickle makes at most one object of a few hundred
bytes, and copies nothing of arbitrary length, so the number of steps bounds time and memory. A list can hold another
one ten times, and that one likewise: after 30 such steps it has 10^30 entries, written out. So only
`messages.shortened` makes a text of a value, a tuple of tuples is no key (its hash would take forever), and a result
that is large when it is written out is refused. The limits are five times what the largest checkpoints need: the pickle
of 825 tensors takes 25,512 steps, with an optimizer's state 100,496.
"""

from __future__ import annotations

import collections
import pickletools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from streamt1_jax.config import ConfigError
from streamt1_jax.messages import one_line, shortened

MAX_STEPS = 2**19
MAX_DEPTH = 100
"""Containers in containers; a checkpoint has 5."""
_MAX_ITEMS = 2**20  # In the result, written out: what is held twice counts twice.
_MAX_ARGUMENTS = 16
_MAX_NAME = 256
_LISTED = 5
_NAME_SHOWN = 60
_CONTAINERS = (Mapping, list, tuple)
_SCALARS = (str, int, float, bool, bytes, type(None))


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
      may only be mentioned. A function must not copy what it is given, unless it is short.
    persistent_load: called with every persistent id.
    where: begins every message.

  Returns:
    Nested dicts, lists, tuples, strings, bytes, numbers, bools, None, `Global`s and what `names` construct: at most
    2^20 of them, at most 100 deep.

  Raises:
    ConfigError: the pickle refers to another name, needs another instruction or more than 2^19 of them, describes
      something larger, or is corrupt.
  """
  try:
    _refuse_names(data, names, where)
    result = _Machine(names, persistent_load, where).run(data)
  except ConfigError:
    raise
  except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
    raise ConfigError(f"{where} is corrupt: {error}") from error
  _require_small(result, where)
  return result


def _steps(data: bytes, where: str) -> Iterator[tuple[str, Any]]:
  """Name and argument of every instruction."""
  for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
    if number >= MAX_STEPS:
      raise ConfigError(f"{where} has more than {MAX_STEPS} instructions, which no checkpoint needs")
    yield opcode.name, argument


def _refuse_names(data: bytes, names: Mapping[str, Any], where: str) -> None:
  """Refuses all names that the pickle spells out, in one message. Protocol 4 has them on the stack instead."""
  mentioned = {str(argument).replace(" ", ".") for name, argument in _steps(data, where) if name == "GLOBAL"}
  refused = sorted(mentioned - set(names))
  if refused:
    more = f" and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
    shown = ", ".join(one_line(name, _NAME_SHOWN) for name in refused[:_LISTED])
    raise ConfigError(
      f"{where} refers to {shown}{more}, which is not a tensor or a plain container; it was not executed"
    )


def _require_small(value: Any, where: str) -> None:
  """Raises ConfigError if `value`, written out, is too large for anybody who walks through it."""
  things, height = _measure(value)
  if things > _MAX_ITEMS or height > MAX_DEPTH:
    raise ConfigError(
      f"{where} holds more than {_MAX_ITEMS} things, or containers more than {MAX_DEPTH} deep; no checkpoint does"
    )


def _measure(value: Any) -> tuple[int, int]:
  """How many things `value` holds, written out, and how deep; every container is looked into once."""
  begun: set[int] = set()
  sizes: dict[int, tuple[int, int]] = {}
  waiting = [value]
  while waiting:
    item = waiting[-1]
    if id(item) in sizes:
      waiting.pop()
      continue
    inside = [child for child in _inside(item) if isinstance(child, _CONTAINERS)]
    if id(item) not in begun:
      begun.add(id(item))
      waiting.extend(child for child in inside if id(child) not in begun)
      continue
    # A container that is not finished holds itself, so it has no end.
    found = [sizes.get(id(child), (0, MAX_DEPTH)) for child in inside]
    things = len(item) + sum(size for size, _ in found) if isinstance(item, _CONTAINERS) else 0
    sizes[id(item)] = things, 1 + max((height for _, height in found), default=0)
  return sizes[id(value)]


def _inside(item: Any) -> Iterable[Any]:
  return item.values() if isinstance(item, Mapping) else item if isinstance(item, _CONTAINERS) else ()


def _key(value: Any) -> Any:
  """`value`, a key of a dict. Raises ValueError for a container of containers, whose hash may take forever."""
  if isinstance(value, _SCALARS):
    return value
  if type(value) is tuple and len(value) <= _MAX_ARGUMENTS and all(isinstance(item, _SCALARS) for item in value):
    return value
  raise ValueError(f"a key of a dict must be a text or a number, got {shortened(value)}")


class _Machine:
  """The stack, the stacks set aside by MARK, and the memo of one pickle."""

  def __init__(self, names: Mapping[str, Callable | None], persistent_load: Callable[[Any], Any], where: str):
    self._names, self._persistent_load, self._where = names, persistent_load, where
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []
    self._memo: dict[int, Any] = {}

  def run(self, data: bytes) -> Any:
    for name, argument in _steps(data, self._where):
      if name in _LITERALS:
        self._stack.append(argument)
      elif name in _CONSTANTS:
        self._stack.append(_CONSTANTS[name]())
      elif name in _INSTRUCTIONS:
        _INSTRUCTIONS[name](self, argument)
      elif name not in ("PROTO", "FRAME", "STOP"):
        raise ConfigError(f"{self._where} needs the pickle instruction {name}, which is not allowed")
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
    self._container(dict)[_key(key)] = value

  def _set_items(self, _) -> None:
    items = self._since_mark()
    self._container(dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))

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
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MAX_NAME:
      raise ValueError(f"it refers to {shortened(name)} of {shortened(module)}")
    self._stack.append(self._named(f"{module}.{name}"))

  def _named(self, name: str) -> Global:
    if name not in self._names:
      raise ConfigError(
        f"{self._where} refers to {name}, which is not a tensor or a plain container; it was not executed"
      )
    return Global(name)

  def _reduce(self, _) -> None:
    arguments, function = self._stack.pop(), self._stack.pop()
    constructor = self._names[function.name] if isinstance(function, Global) else None
    if constructor is None or not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
      raise ValueError(f"it calls {function if isinstance(function, Global) else shortened(function)}")
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
