"""Reads what a result folder says of its search, and refuses what is not the account of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files, result_files
from streamt1_jax.messages import shortened
from streamt1_jax.trace import VERSION

MOST_CHUNKS, MOST_CANDIDATES = 1000, 8000
"""The most of a search that a page shows, the newest: no browser would scroll a larger page."""
_LONGEST = 100_000
"""Chunks of a video that anything is said of."""
_NUMBERS = (int, float)
_LARGEST = 1e100


@dataclasses.dataclass(frozen=True)
class Account:
  """A result folder, checked.

  Attributes:
    folder: where it is.
    trace: trace.json; its fields have the types that `trace` gives them.
    run: manifest.json, or failed.json of a search that failed, or {} if there is neither.
    failed: whether the search failed.
    hidden: chunks at the beginning of the video that are left out, see `newest`.
  """

  folder: epath.Path
  trace: Mapping[str, Any]
  run: Mapping[str, Any]
  failed: bool
  hidden: int = 0

  @property
  def settings(self) -> Mapping[str, Any]:
    """What decided the video."""
    return _mapping(self.run.get("settings"))

  @property
  def prompt(self) -> str:
    """The prompt that the video begins with."""
    return self.trace["segments"][0]["prompt"] if self.trace["segments"] else "a video without a prompt"

  @property
  def video(self) -> epath.Path | None:
    """The file of the video, if there is one."""
    path = self.folder / result_files.VIDEO
    return path if path.is_file() else None

  def section(self, name: str) -> Mapping[str, Any]:
    """An object in the manifest; {} if it has none of this name."""
    return _mapping(self.run.get(name))


def nodes(chunk: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
  """The candidates of a chunk of a trace by number. Where a chunk is not judged, some numbers are not drawn."""
  return {candidate["candidate"]: candidate for candidate in chunk["candidates"]}


def rejected(chunk: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
  """Those that were not finished, which have no number. Older traces have none."""
  return chunk.get("rejected", ())


def newest(account: Account) -> Account:
  """What a page shows of it: all, or the newest chunks of a longer search.

  Chunks that are left out count as given in the trace, whose segments are those that the others are in.
  """
  trace = account.trace
  chunks, given, candidates = trace["chunks"], trace["given_chunks"], 0
  end = begin = given + len(chunks)
  while begin > max(given, end - MOST_CHUNKS):
    candidates += _count(chunks[begin - 1 - given])
    if candidates > MOST_CANDIDATES:
      break
    begin -= 1
  hidden = max(0, end - MOST_CHUNKS) if begin == given else begin
  if not hidden:
    return account
  cut = max(0, hidden - given)
  final, segments = trace["final"], trace["segments"]
  later = [segment["chunk"] for segment in segments[1:]] + [end]
  shown = {
    "given_chunks": given + cut,
    "chunks": chunks[cut:],
    "segments": [segment for segment, until in zip(segments, later) if until > hidden],
    "final": final and {**final, "lineage": final["lineage"][cut:]},
  }
  return dataclasses.replace(account, trace={**trace, **shown}, hidden=hidden)


def _count(chunk: Mapping[str, Any]) -> int:
  return len(chunk["candidates"]) + len(rejected(chunk))


def read(folder: epath.PathLike) -> Account:
  """Reads a result folder. Raises ConfigError, naming the file and the field, if it is not the account of a search."""
  folder = epath.Path(folder)
  trace = _read(folder, result_files.TRACE, "a result with a trace")
  check_trace(trace, str(folder / result_files.TRACE))
  for name, failed in ((result_files.MANIFEST, False), (result_files.FAILURE, True)):
    if (folder / name).is_file():
      return Account(folder, trace, _read(folder, name, "a result"), failed)
  return Account(folder, trace, {}, trace["final"] is None)


def _read(folder: epath.Path, name: str, what: str) -> dict[str, Any]:
  """A JSON object all of whose numbers can be added up and written down."""
  document = part_files.read_json_object(folder, name, what)
  left: list[Any] = [document]
  while left:
    value = left.pop()
    if isinstance(value, (dict, list)):
      left.extend(value.values() if isinstance(value, dict) else value)
    elif isinstance(value, _NUMBERS) and abs(value) > _LARGEST:
      raise ConfigError(f"{folder / name} has the number {shortened(value)}, which no search gives")
  return document


def check_trace(trace: Mapping[str, Any], where: str) -> None:
  """Raises ConfigError, which begins with `where`, unless `trace` is what a search tells.

  Fields that are not known are left alone: policies and methods add their own.
  """
  check = _Check(where)
  # The first traces did not say.
  if trace.get("version", VERSION) != VERSION or isinstance(trace.get("version"), bool):
    found = shortened(trace["version"])
    raise ConfigError(f"{where} is a trace of version {found}, and this program reads version {VERSION}")
  check.integer(trace, "beam_size", "", lower=1)
  top_k = check.integer(trace, "top_k", "", lower=1)
  given = check.integer(trace, "given_chunks", "")
  for index, segment in enumerate(check.objects(trace, "segments", "")):
    check.integer(segment, "chunk", f"segments[{index}].")
    check.kind(segment, "prompt", f"segments[{index}].", str, "a text")
  chunks = check.objects(trace, "chunks", "")
  parents = top_k
  for index, chunk in enumerate(chunks):
    parents = _check_chunk(check, chunk, f"chunks[{index}].", given + index, parents)
  most = max(map(_count, chunks), default=0)
  if given + len(chunks) > _LONGEST or most > MOST_CANDIDATES:
    raise ConfigError(
      f"{where} has {given + len(chunks)} chunks, of up to {most} candidates; a report is of at most {_LONGEST} chunks "
      f"of {MOST_CANDIDATES}"
    )
  _check_final(check, trace, [nodes(chunk) for chunk in chunks], given)


def _check_chunk(check: _Check, chunk: Mapping[str, Any], at: str, number: int, parents: int) -> int:
  """Checks chunk `number`, whose candidates have `parents` parents to descend from. Returns how many survive."""
  if check.integer(chunk, "chunk", at) != number:
    raise check.refusal(at + "chunk", chunk["chunk"], str(number))
  for index, eviction in enumerate(check.objects(chunk, "evictions", at)):
    inside = f"{at}evictions[{index}]."
    check.integer(eviction, "parent", inside, upper=parents - 1)
    check.kind(eviction, "route", inside, str, "a text")
    for name in ("frame", "sink_frame"):
      check.optional_integer(eviction, name, inside)
  candidates = check.objects(chunk, "candidates", at)
  if not candidates:
    raise check.refusal(at + "candidates", candidates, "at least one")
  for index, candidate in enumerate(candidates):
    inside = f"{at}candidates[{index}]."
    if check.integer(candidate, "candidate", inside, upper=MOST_CANDIDATES) < index:
      raise check.refusal(inside + "candidate", candidate["candidate"], "numbers that go up")
    check.integer(candidate, "parent", inside, upper=parents - 1)
    check.integer(candidate, "seed", inside, lower=-(2**31))
    for name in ("short", "long", "hybrid"):
      check.optional_number(candidate, name, inside)
    check.kind(candidate, "usable", inside, bool, "true or false")
  if len(nodes(chunk)) < len(candidates):
    raise ConfigError(f"{check.where} is no trace of this program: {at}candidates has a number twice")
  for index, each in enumerate(check.objects(chunk, "rejected", at) if "rejected" in chunk else ()):
    inside = f"{at}rejected[{index}]."
    check.integer(each, "parent", inside, upper=parents - 1)
    check.integer(each, "step", inside)
    check.integer(each, "seed", inside, lower=-(2**31))
    check.optional_number(each, "preview", inside)
    check.kind(each, "fate", inside, str, "a text")
  if "events" in chunk:
    check.objects(chunk, "events", at)
  survivors = check.kind(chunk, "survivors", at, list, "a list")
  if not survivors or not all(_is_integer(each) and each in nodes(chunk) for each in survivors):
    raise check.refusal(at + "survivors", survivors, "numbers of candidates")
  return len(survivors)


def _check_final(
  check: _Check, trace: Mapping[str, Any], chunks: Sequence[Mapping[int, Mapping[str, Any]]], given: int
) -> None:
  if "final" in trace and trace["final"] is None:
    return
  final = check.kind(trace, "final", "", dict, "an object or null")
  scores = check.kind(final, "scores", "final.", list, "a list")
  if not scores or not all(score is None or _is_number(score) for score in scores):
    raise check.refusal("final.scores", scores, "a number for every beam")
  check.integer(final, "best", "final.", upper=len(scores) - 1)
  lineage = check.objects(final, "lineage", "final.")
  if len(lineage) != len(chunks):
    raise check.refusal("final.lineage", len(lineage), f"a step for each of {len(chunks)} chunks")
  for index, (step, candidates) in enumerate(zip(lineage, chunks, strict=True)):
    if check.integer(step, "candidate", f"final.lineage[{index}].") not in candidates:
      raise check.refusal(f"final.lineage[{index}].candidate", step["candidate"], "a candidate of its chunk")
    if check.integer(step, "chunk", f"final.lineage[{index}].") != given + index:
      raise check.refusal(f"final.lineage[{index}].chunk", step["chunk"], str(given + index))


class _Check:
  """Takes fields out of JSON objects; what does not fit is told with the file and the place in it."""

  def __init__(self, where: str):
    self.where = where

  def refusal(self, place: str, found: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{self.where} is no trace of this program: {place} is {shortened(found)}, expected {allowed}")

  def kind(self, owner: Mapping[str, Any], name: str, at: str, kind: type, allowed: str) -> Any:
    if name not in owner:
      raise ConfigError(f"{self.where} is no trace of this program: {at}{name} is missing")
    if not isinstance(owner[name], kind):
      raise self.refusal(at + name, owner[name], allowed)
    return owner[name]

  def objects(self, owner: Mapping[str, Any], name: str, at: str) -> list[dict[str, Any]]:
    values = self.kind(owner, name, at, list, "a list")
    for index, value in enumerate(values):
      if not isinstance(value, dict):
        raise self.refusal(f"{at}{name}[{index}]", value, "an object")
    return values

  def integer(self, owner: Mapping[str, Any], name: str, at: str, lower: int = 0, upper: int = 2**31 - 1) -> int:
    value = self.kind(owner, name, at, object, "")
    if not _is_integer(value) or not lower <= value <= upper:
      raise self.refusal(at + name, value, f"an integer in {lower}..{upper}")
    return value

  def optional_integer(self, owner: Mapping[str, Any], name: str, at: str) -> None:
    if self.kind(owner, name, at, object, "") is not None:
      self.integer(owner, name, at)

  def optional_number(self, owner: Mapping[str, Any], name: str, at: str) -> None:
    value = self.kind(owner, name, at, object, "")
    if value is not None and not _is_number(value):
      raise self.refusal(at + name, value, "a number or null")


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return isinstance(value, _NUMBERS) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any) -> Mapping[str, Any]:
  return value if isinstance(value, Mapping) else {}
