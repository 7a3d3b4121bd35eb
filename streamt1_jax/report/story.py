"""What happened in a search, told for people: who descended from whom, and what became of every candidate.

Pure functions of trace.json; nothing is drawn here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from streamt1_jax.report.account import Account

WINNER, SURVIVOR, LOSER, UNUSABLE = "winner", "survivor", "loser", "unusable"
"""Kinds of candidates: in the video shown, on a line that ended later, dropped at once, NaN or Inf."""
SCORES = (("short", "image"), ("long", "video"), ("hybrid", "hybrid"))
"""Fields of a candidate's scores, and what a page calls them."""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One candidate of one chunk.

  Attributes:
    chunk: of the video, counted from 0.
    number: among the candidates of its chunk.
    parent: number of the candidate, one chunk before, that it goes on from; None where the search begins.
    seed: what its noise was drawn from.
    noise: a sentence about its noise.
    scores: image, video and hybrid score by field name; None where nothing judged it.
    place: its place by hybrid score among its siblings of the chunk, from 1; None where nothing judged it.
    kind: one of the kinds above.
    fate: a sentence about what became of it.
    route: what happened to the chunk that left its parent's window before it was drawn.
    route_after: what its own scores say of its chunk, when that leaves the window.
  """

  chunk: int
  number: int
  parent: int | None
  seed: int
  noise: str
  scores: Mapping[str, float | None]
  place: int | None
  kind: str
  fate: str
  route: str
  route_after: str


@dataclasses.dataclass(frozen=True)
class Story:
  """A search.

  Attributes:
    given: chunks that the video began with and that were not searched.
    chunks: candidates of every chunk that was made.
    line: the candidate of every such chunk that is in the video; of a search that failed, what led to the best
      survivor of its last chunk.
    switches: chunks that begin under another prompt, with the prompt.
    judged: whether candidates have scores.
    failed: whether there is no video.
  """

  given: int
  chunks: Sequence[Sequence[Candidate]]
  line: Sequence[int]
  switches: Sequence[tuple[int, str]]
  judged: bool
  failed: bool

  @property
  def end(self) -> int:
    """Chunks of the video, or of what there is of it."""
    return self.given + len(self.chunks)

  def winner(self, index: int) -> Candidate:
    """The candidate of the `index`th chunk that was made which is in the video."""
    return self.chunks[index][self.line[index]]


def tell(account: Account) -> Story:
  """The story of a search."""
  trace = account.trace
  chunks, given = trace["chunks"], trace["given_chunks"]
  final = trace["final"]
  line = ancestry(chunks) if final is None else [step["candidate"] for step in final["lineage"]]
  lasts = last_descendants(chunks)
  told = [
    [_candidate(account, index, number, line, lasts) for number in range(len(chunk["candidates"]))]
    for index, chunk in enumerate(chunks)
  ]
  return Story(
    given=given,
    chunks=told,
    line=line,
    switches=[(segment["chunk"], segment["prompt"]) for segment in trace["segments"][1:]],
    judged=any(candidate["hybrid"] is not None for chunk in chunks for candidate in chunk["candidates"]),
    failed=account.failed,
  )


def ancestry(chunks: Sequence[Mapping[str, Any]]) -> list[int]:
  """The candidates of all chunks that led to the first survivor of the last one."""
  line, beam = [], 0
  for chunk in reversed(chunks):
    number = chunk["survivors"][beam]
    line.append(number)
    beam = chunk["candidates"][number]["parent"]
  return line[::-1]


def last_descendants(chunks: Sequence[Mapping[str, Any]]) -> list[list[int]]:
  """Of every candidate the place in `chunks` of the last chunk in which it, or a descendant, survived; -1 for none."""
  lasts: list[list[int]] = []
  for index, chunk in reversed(list(enumerate(chunks))):
    own = [-1] * len(chunk["candidates"])
    for beam, number in enumerate(chunk["survivors"]):
      own[number] = max(own[number], index)
      if lasts:
        later = zip(chunks[index + 1]["candidates"], lasts[0], strict=True)
        own[number] = max([own[number], *(last for child, last in later if child["parent"] == beam)])
    lasts.insert(0, own)
  return lasts


def _candidate(
  account: Account, index: int, number: int, line: Sequence[int], lasts: Sequence[Sequence[int]]
) -> Candidate:
  chunks, given = account.trace["chunks"], account.trace["given_chunks"]
  chunk = chunks[index]
  entry = chunk["candidates"][number]
  parent = chunks[index - 1]["survivors"][entry["parent"]] if index else None
  parent_seed = None if parent is None else chunks[index - 1]["candidates"][parent]["seed"]
  scores = {name: entry[name] for name, _ in SCORES}
  kind = _kind(entry, number in chunk["survivors"], number == line[index])
  return Candidate(
    chunk=given + index,
    number=number,
    parent=parent,
    seed=entry["seed"],
    noise=noise_sentence(account.settings.get("noise_sigma"), entry["seed"], parent_seed, has_parent=index > 0),
    scores=scores,
    place=_place(chunk["candidates"], entry),
    kind=kind,
    fate=_fate(account, entry, kind, given + lasts[index][number], is_last=lasts[index][number] == len(chunks) - 1),
    route=entry.get("route", "nothing"),
    route_after=_route_after(entry.get("flags")),
  )


def _kind(entry: Mapping[str, Any], survives: bool, shown: bool) -> str:
  if shown:
    return WINNER
  if survives:
    return SURVIVOR
  return LOSER if entry["usable"] else UNUSABLE


def _fate(account: Account, entry: Mapping[str, Any], kind: str, last: int, *, is_last: bool) -> str:
  """A sentence without its stop. Traces may have a `fate` in words of their own, which comes first."""
  shown = "led to the best beam when the search failed" if account.failed else "in the video"
  ended = "to the end, in a beam that is not shown" if is_last else f"for a while; its line ended with chunk {last}"
  sentence = {
    WINNER: shown,
    SURVIVOR: f"survived {ended}",
    LOSER: "dropped",
    UNUSABLE: "not usable: NaN or Inf",
  }[kind]
  own = entry.get("fate")
  if not isinstance(own, str) or own.replace("_", " ") in sentence:
    return sentence
  return f"{own.replace('_', ' ')}; {sentence}"


def _place(siblings: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> int | None:
  if entry["hybrid"] is None:
    return None
  return 1 + sum(other["hybrid"] is not None and other["hybrid"] > entry["hybrid"] for other in siblings)


def noise_sentence(sigma: Any, seed: int, parent_seed: int | None, *, has_parent: bool) -> str:
  """Whether noise was fresh or propagated from the parent, with its weights.

  Args:
    sigma: `SearchConfig.noise_sigma`, or anything else if the result does not say.
    seed: of the candidate.
    parent_seed: of its parent, None without one.
    has_parent: whether the candidate goes on from another one.
  """
  if not has_parent:
    return "fresh: the search begins here"
  if not isinstance(sigma, (int, float)) or not -1 < sigma < 1:
    return "not recorded"
  if sigma == 0:
    return "fresh"
  again = ", the parent's own draw again" if seed == parent_seed else ""
  return f"propagated: {minus(sigma)} of the parent's noise, {math.sqrt(1 - sigma**2):.3f} of a new draw{again}"


def minus(value: float) -> str:
  """A number as people write it."""
  return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _route_after(flags: Any) -> str:
  if not isinstance(flags, Mapping):
    return "not recorded"
  if flags.get("append"):
    return "worth keeping as a sink"
  return "worth merging into the last sink" if flags.get("ema") else "not worth remembering"
