"""Strict conversion of published checkpoints: a mapping table is data, and only this engine reads it.

  rules + parameter shapes ── expand ──► name, shape and destination of every source tensor
                                              │
  source tensors ──────────────────────── compare ── every problem in one ConfigError
                                              │
                                   transform and stack ──► parameters       (stream: row by row; convert: in memory)
                                   slice and invert    ◄── parameters       (invert)

A rule names a source tensor by a template, not by a pattern. So one declaration serves both directions, and the
complete list of names is known before any tensor is read:

  Rule("blocks.{layer}.attn.q.weight", "blocks.self_attn.query.kernel", LINEAR)

reads one tensor per index of the leading axis of that parameter. Nothing is guessed and nothing is skipped: a tensor
without a rule, or a parameter without a tensor, stops the conversion.
"""

import dataclasses
import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Shaped

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats.lazy import LazyTensor
from streamt1_jax.convert.transforms import IDENTITY, Transform
from streamt1_jax.io.part_writer import CHUNK_BYTES, Piece
from streamt1_jax.messages import one_line
from streamt1_jax.nn.abstract import abstract_module
from streamt1_jax.typing import Params

LAYER = "{layer}"
"""Stands in the name of a rule for the number of a layer."""
_LISTED = 20  # Problems of one kind that are spelled out: the file of another model has thousands.
_LISTED_IN_LINE = 3
_MISFIT = "the checkpoint does not fit the model"


@dataclasses.dataclass(frozen=True)
class Rule:
  """Where one tensor of a checkpoint goes, or one tensor per layer.

  Attributes:
    source: name in the checkpoint. `{layer}` stands for 0, 1, ... along the leading axis of the parameter.
    path: the parameter, as dotted keys of the nested dict (`nnx.to_pure_dict(nnx.state(module, nnx.Param))`).
    transform: from the checkpoint's layout to the parameter's; of one layer where `source` has `{layer}`.
  """

  source: str
  path: str
  transform: Transform = IDENTITY


class _Slot(NamedTuple):
  """Where one source tensor goes, and what it must look like."""

  keys: tuple[Any, ...]
  layer: int | None
  transform: Transform
  spec: jax.ShapeDtypeStruct

  def __str__(self) -> str:
    layer = "" if self.layer is None else f"[{self.layer}]"
    return _dotted(self.keys) + layer


class FitError(ConfigError):
  """A checkpoint or a table does not fit the model; its text has one line per problem.

  Attributes:
    line: the same as one line, with the first problems of every kind.
  """

  def __init__(self, summary: str, problems: Mapping[str, Sequence[str]]):
    self._summary, self._problems = summary, problems
    counts = f"{summary}: " + ", ".join(f"{len(lines)} {kind}" for kind, lines in problems.items())
    super().__init__("; ".join([counts, *(text.strip() for text in _listed(problems, _LISTED_IN_LINE))]))
    self.line = super().__str__()
    self._text = "\n".join(map(one_line, [counts, *_listed(problems, _LISTED)]))

  def __str__(self) -> str:
    return self._text

  def prefixed(self, where: str) -> "FitError":
    """The same error, beginning with the file it is about."""
    return FitError(f"{where}: {self._summary}", self._problems)


def _listed(problems: Mapping[str, Sequence[str]], count: int) -> Iterator[str]:
  for kind, lines in problems.items():
    yield from (f"  {kind}: {line}" for line in lines[:count])
    if len(lines) > count:
      yield f"  {kind}: and {len(lines) - count} more"


class _Problems:
  """Collects what is wrong, by kind, and reports it at once, so that a table or a file is repaired in one go."""

  def __init__(self):
    self._by_kind: dict[str, list[str]] = {}

  def add(self, kind: str, lines: Iterable[str]) -> None:
    self._by_kind.setdefault(kind, []).extend(lines)

  def raise_if_any(self, summary: str) -> None:
    found = {kind: lines for kind, lines in self._by_kind.items() if lines}
    if found:
      raise FitError(summary, found)


def abstract_params(make_module: Callable[[], nnx.Module]) -> Params:
  """Shapes and dtypes of a module's parameters, as a nested dict; no weight is allocated."""
  return abstract_module(make_module)[1]


def source_specs(rules: Sequence[Rule], abstract_params: Params) -> dict[str, jax.ShapeDtypeStruct]:
  """Name and shape of every tensor a checkpoint must hold; dtypes are those of the parameters.

  Raises ConfigError if a parameter is written by no rule or by several, or a rule writes no parameter.
  """
  return {name: slot.spec for name, slot in _complete_slots(rules, _flatten(abstract_params)).items()}


def check(
  tensors: Mapping[str, Any], rules: Sequence[Rule], abstract_params: Params, ignore: Sequence[str] = ()
) -> None:
  """Raises the FitError that `convert` would raise; reads names, shapes and dtypes only."""
  _checked_slots(tensors, rules, _flatten(abstract_params), ignore)


def compare(tensors: Mapping[str, Any], specs: Mapping[str, jax.ShapeDtypeStruct]) -> None:
  """Raises the FitError that `check` would raise, where no rules but the wanted tensors themselves are known."""
  problems = _Problems()
  _compare(tensors, specs, {}, (), problems)
  problems.raise_if_any(_MISFIT)


def convert(
  tensors: Mapping[str, Shaped[np.ndarray, " ..."]],
  rules: Sequence[Rule],
  abstract_params: Params,
  dtype: Any = None,
  ignore: Sequence[str] = (),
) -> Params:
  """Converts a checkpoint to parameters in memory.

  Args:
    tensors: the checkpoint; its arrays may be memory-mapped, and each is read once.
    rules: the mapping table.
    abstract_params: nested dict or `nnx.State` of arrays or `jax.ShapeDtypeStruct`s.
    dtype: dtype of the floating parameters; None gives each the dtype of its leaf in `abstract_params`.
    ignore: shell-style patterns ("critic.*") of names that may be present and are left out.

  Returns:
    Nested dict of numpy arrays with the keys and shapes of `abstract_params`.

  Raises:
    FitError: lists every name that is unknown, missing, misshapen or of the wrong kind of number, and every
      parameter that is written by no rule or by several.
  """
  leaves = _flatten(abstract_params)
  pieces: dict[tuple[Any, ...], list[np.ndarray | np.generic]] = {}
  for name, slot in _checked_slots(tensors, rules, leaves, ignore).items():
    pieces.setdefault(slot.keys, []).extend(piece.rows for piece in _pieces(tensors[name], slot))
  joined = {keys: np.concatenate(rows) if len(rows) > 1 else rows[0] for keys, rows in pieces.items()}
  params = {keys: np.array(joined[keys], _target_dtype(leaf, dtype), order="C") for keys, leaf in leaves.items()}
  return traverse_util.unflatten_dict(params)


def stream(tensors: Mapping[str, Any], rules: Sequence[Rule], abstract_params: Params) -> Iterator[Piece]:
  """The same conversion, piece by piece in the checkpoint's dtypes, for `part_writer.write_part`.

  Only one tensor is in memory at a time: one layer of a stacked parameter, or some rows of a table that needs no
  transform. Raises FitError as `convert` does, before the first piece.
  """
  slots = _checked_slots(tensors, rules, _flatten(abstract_params), ())
  return (piece for name, slot in slots.items() for piece in _pieces(tensors[name], slot))


def _pieces(tensor: Any, slot: _Slot) -> Iterator[Piece]:
  path = "/".join(map(str, slot.keys))
  if slot.layer is not None:
    yield Piece(path, slot.transform.forward(np.asarray(tensor))[None])
  elif slot.transform == IDENTITY and isinstance(tensor, LazyTensor):
    yield from (Piece(path, rows) for rows in tensor.blocks(CHUNK_BYTES))
  else:
    yield Piece(path, slot.transform.forward(np.asarray(tensor)))


def stored_leaves(abstract_params: Params, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """The weights that `part_writer.write_part` stores: shapes by "/"-joined path, floating ones in `dtype`."""
  return {
    "/".join(map(str, keys)): jax.ShapeDtypeStruct(leaf.shape, _target_dtype(leaf, dtype))
    for keys, leaf in _flatten(abstract_params).items()
  }


def invert(params: Params, rules: Sequence[Rule]) -> dict[str, Shaped[np.ndarray, " ..."]]:
  """The checkpoint that `convert` turns into `params`: contiguous arrays of the same dtype.

  Raises ConfigError if a parameter is written by no rule or by several, or a rule writes no parameter.
  """
  leaves = _flatten(params)
  tensors = {}
  for name, slot in _complete_slots(rules, leaves).items():
    leaf = np.asarray(leaves[slot.keys])
    layer = leaf if slot.layer is None else leaf[slot.layer]
    tensors[name] = np.ascontiguousarray(slot.transform.inverse(layer))
  return tensors


def _complete_slots(rules: Sequence[Rule], leaves: Mapping[tuple, Any]) -> dict[str, _Slot]:
  problems = _Problems()
  slots = _expand(rules, leaves, problems)
  problems.raise_if_any("the rules do not fit the model")
  return slots


def _checked_slots(
  tensors: Mapping[str, Any], rules: Sequence[Rule], leaves: Mapping[tuple, Any], ignore: Sequence[str]
) -> dict[str, _Slot]:
  problems = _Problems()
  slots = _expand(rules, leaves, problems)
  specs = {name: slot.spec for name, slot in slots.items()}
  _compare(tensors, specs, {name: f" (for {slot})" for name, slot in slots.items()}, ignore, problems)
  problems.raise_if_any(_MISFIT)
  return slots


def _expand(rules: Sequence[Rule], leaves: Mapping[tuple, Any], problems: _Problems) -> dict[str, _Slot]:
  """Every source name with its slot. A name or a parameter that two rules claim keeps the first claim."""
  paths = {_dotted(keys): keys for keys in leaves}
  slots: dict[str, _Slot] = {}
  sources: dict[str, str] = {}
  for rule in rules:
    if rule.path not in paths:
      problems.add("rule without a parameter", [f"{rule.source} -> {rule.path}{_nearest(rule.path, paths)}"])
      continue
    if rule.path in sources:
      problems.add("parameter with two rules", [f"{rule.path}: {sources[rule.path]} and {rule.source}"])
      continue
    sources[rule.path] = rule.source
    for name, slot in _slots_of(rule, paths[rule.path], leaves[paths[rule.path]]).items():
      if name in slots:
        problems.add("name with two rules", [f"{name}: {slots[name]} and {slot}"])
      slots.setdefault(name, slot)
  problems.add("parameter without a rule", [path for path in paths if path not in sources])
  return slots


def _slots_of(rule: Rule, keys: tuple[Any, ...], leaf: Any) -> dict[str, _Slot]:
  stacked = LAYER in rule.source
  of_parameter = jax.ShapeDtypeStruct(leaf.shape[1:] if stacked else leaf.shape, leaf.dtype)
  try:
    spec = _published(rule.transform, of_parameter)
  except (TypeError, ValueError) as error:
    raise ConfigError(f"{rule.transform} cannot produce {rule.path}, shape {list(leaf.shape)}: {error}") from error
  if not stacked:
    return {rule.source: _Slot(keys, None, rule.transform, spec)}
  return {
    rule.source.replace(LAYER, str(layer)): _Slot(keys, layer, rule.transform, spec) for layer in range(leaf.shape[0])
  }


@functools.cache
def _published(transform: Transform, of_parameter: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """What a parameter of this shape was before the transform: many layers and readings of a file ask the same."""
  return jax.eval_shape(transform.inverse, of_parameter)


def _compare(
  tensors: Mapping[str, Any],
  specs: Mapping[str, jax.ShapeDtypeStruct],
  notes: Mapping[str, str],
  ignore: Sequence[str],
  problems: _Problems,
) -> None:
  """Notes what differs between `tensors` and `specs`; `notes` follow the names of missing tensors."""
  missing = [name for name in specs if name not in tensors]
  ignored = {name for pattern in ignore for name in fnmatch.filter(tensors, pattern)}
  unknown = [name for name in tensors if name not in specs and name not in ignored]
  # A misspelt name is most likely a missing one. The search is slow, so only lines that are printed get it.
  hints = {name: _nearest(name, missing or specs) for name in unknown[:_LISTED]}
  problems.add("unknown", [name + hints.get(name, "") for name in unknown])
  problems.add("missing", [name + notes.get(name, "") for name in missing])
  for name in (name for name in specs if name in tensors):
    found, wanted = tensors[name], specs[name]
    if tuple(found.shape) != wanted.shape:
      problems.add("misshapen", [f"{name} is {list(found.shape)}, expected {list(wanted.shape)}"])
    if _is_floating(found) != _is_floating(wanted):
      problems.add("wrongly typed", [f"{name} is {found.dtype}, expected a type like {wanted.dtype}"])


def _nearest(name: str, known: Iterable[str]) -> str:
  matches = difflib.get_close_matches(name, list(known), n=1)
  return f" (nearest: {matches[0]})" if matches else ""


def _is_floating(array: Any) -> bool:
  return jnp.issubdtype(array.dtype, jnp.floating)


def _target_dtype(leaf: Any, dtype: Any) -> np.dtype:
  return jnp.dtype(dtype if dtype is not None and _is_floating(leaf) else leaf.dtype)


def _dotted(keys: tuple[Any, ...]) -> str:
  return ".".join(map(str, keys))


def _flatten(params: Params) -> dict[tuple[Any, ...], Any]:
  """Leaves by their keys; module lists have integer keys."""
  pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
  return traverse_util.flatten_dict(pure)
