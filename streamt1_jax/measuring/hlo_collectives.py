"""What devices send each other in a compiled program, read from its text (HLO).

Loops count: a collective in a loop of 30 blocks in a loop of 4 steps is 120. The number of trips is what the compiler
notes, or the constant that the loop's condition compares its counter with; a loop whose end is data counts once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+|c64|c128)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: "all-reduce", "all-gather", ...
    axes: axes of the mesh between whose devices it sends, joined by "+".
    phase: part of the program it belongs to; "" outside the parts asked for.
    bytes: size of its result on one device.
    executions: how often it runs.
  """

  kind: str
  axes: str
  phase: str
  bytes: int
  executions: int


def find(text: str, mesh_shape: Mapping[str, int], phases: tuple[str, ...] = ()) -> list[Collective]:
  """All collectives of a compiled program.

  Args:
    text: `compiled.as_text()`.
    mesh_shape: axes and sizes of its mesh, in the order of its devices.
    phases: names of scopes (`jax.named_scope`) that tell where an operation comes from.
  """
  computations, entry = _computations(text)
  trips = {name: _trips(lines) for name, lines in computations.items()}
  found = Counter()

  def visit(name: str, executions: int) -> None:
    # A TPU's asynchronous collective is written several times: where it starts, at every computation that it runs
    # beside, and where it is done. They share a chain.
    starts = any('"AsyncCollectiveStart"' in line for line in computations[name])
    for result, operation, rest in _instructions(computations[name]):
      kind = operation.removesuffix("-start")
      if kind in _KINDS and (starts or "chain_id=" not in rest):
        phase = next((phase for phase in phases if re.search(rf'op_name="[^"]*\b{phase}\b', rest)), "")
        size = _largest(result) if operation.endswith("-start") else _total(result)
        found[Collective(kind, _axes(rest, mesh_shape), phase, size, 0)] += executions
      condition = re.search(r"condition=%?([\w.-]+)", rest)
      known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
      times = executions * (int(known[1]) if known else trips[condition[1]] if condition else 1)
      for called in _callees(rest):
        if called in computations:
          visit(called, times)

  visit(entry, 1)
  return [dataclasses.replace(collective, executions=times) for collective, times in found.items()]


def by_kind(collectives: list[Collective]) -> dict[str, dict[str, int]]:
  """Executions and bytes of a whole run of the program, by kind."""
  totals = {}
  for one in collectives:
    total = totals.setdefault(one.kind, {"count": 0, "bytes": 0})
    total["count"] += one.executions
    total["bytes"] += one.executions * one.bytes
  return dict(sorted(totals.items()))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines of every computation, by name, and the name of the first one to run."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header[1], [])
      entry = header[1] if line.startswith("ENTRY") else entry
    elif line.startswith("}"):
      current = None
    elif current is not None:
      current.append(line)
  return computations, entry


def _instructions(lines: list[str]) -> Iterator[tuple[str, str, str]]:
  """Result, operation and the rest of every instruction."""
  for line in lines:
    match = _INSTRUCTION.match(line)
    if match:
      result, operation, rest = match.groups()
      yield result, operation, rest


def _callees(rest: str) -> list[str]:
  branches = _BRANCHES.search(rest)
  listed = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
  return [*_CALLED.findall(rest), *listed]


def _trips(lines: list[str]) -> int:
  """How often a loop with this condition runs."""
  constants = {}
  for line in lines:
    constant = re.match(r"^\s+(?:ROOT )?%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)", line)
    if constant:
      constants[constant[1]] = int(constant[2])
    compare = re.match(r"^\s+ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\).*direction=LT", line)
    if compare:
      return constants.get(compare[1], 1)
  return 1


def _sizes(result: str) -> list[int]:
  sizes = []
  for kind, shape in _SHAPE.findall(result):
    item = _ITEM_BYTES.get(kind) or (1 if kind.startswith("f8") else max(1, int(kind[1:]) // 8))
    sizes.append(item * math.prod(int(size) for size in shape.split(",") if size))
  return sizes


def _total(result: str) -> int:
  return sum(_sizes(result))


def _largest(result: str) -> int:
  """The start of an asynchronous collective returns its operand and its result."""
  return max(_sizes(result), default=0)


def _axes(rest: str, mesh_shape: Mapping[str, int]) -> str:
  """Axes along which the devices of a group, or source and target, differ."""
  sizes = tuple(mesh_shape.values())
  differs = np.zeros(len(sizes), bool)
  for group in _groups(rest) or [list(range(math.prod(sizes)))]:
    places = np.stack(np.unravel_index(group, sizes))
    differs |= (places != places[:, :1]).any(axis=1)
  return "+".join(axis for axis, differ in zip(mesh_shape, differs, strict=True) if differ)


def _groups(rest: str) -> list[list[int]]:
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest)
  if listed:
    return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
  if named:
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    across = [list(sizes).index(axis) for axis in re.findall(r"'([^']+)'", named[2])]
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    ids = np.moveaxis(ids, across, range(-len(across), 0))
    return ids.reshape(-1, math.prod(ids.shape[ids.ndim - len(across) :])).tolist()
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
  if not iota:
    return []
  ints = lambda text: [int(i) for i in text.split(",")]
  ids = np.arange(math.prod(ints(iota[2]))).reshape(ints(iota[2]))
  if iota[3]:
    ids = ids.transpose(ints(iota[3]))
  return ids.reshape(ints(iota[1])).tolist()
