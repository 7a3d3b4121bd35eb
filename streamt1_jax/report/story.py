"""What happened in a search, told for people: who descended from whom, and what became of every candidate.

Pure functions of trace.json; nothing is drawn here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from streamt1_jax.report.account import Account, nodes, rejected

WINNER, SURVIVOR, LOSER, REJECTED, UNUSABLE = "winner", "survivor", "loser", "rejected", "unusable"
"""Kinds of candidates: in the video shown, on a line that ended later, dropped at once, never finished, NaN or Inf."""
SCORES = (("short", "image"), ("long", "video"), ("hybrid", "hybrid"))
"""Fields of a candidate's scores, and what a page calls them."""
_FATES = ("survived", "duplicated", "pruned", "unusable")
"""Words of a trace that the sentences here say as well."""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One candidate of one chunk.

  Attributes:
    chunk: of the video, counted from 0.
    number: among the candidates of its chunk; those that were not finished come after all others.
    name: what it is called.
    parent: number of the candidate, one chunk before, that it goes on from; None where the search begins.
    seed: what its noise was drawn from.
    noise: a sentence about its noise.
    scores: image, video and hybrid score by field name; None where nothing judged it.
    place: its place by hybrid score among its siblings of the chunk, from 1; None where nothing judged it.
    kind: one of the kinds above.
    fate: a sentence about what became of it.
    route: what happened to the chunk that left its parent's window before it was drawn.
    route_after: what its own scores say of its chunk, when that leaves the window.
    notes: labels and texts of what only some searches have.
  """

  chunk: int
  number: int
  name: str
  parent: int | None
  seed: int
  noise: str
  scores: Mapping[str, float | None]
  place: int | None
  kind: str
  fate: str
  route: str
  route_after: str
  notes: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Story:
  """A search.

  Attributes:
    given: chunks that the video begins with and that nothing is told of: they were not searched, or are left out.
    hidden: those of them that are left out.
    chunks: candidates of every chunk that was made, by number.
    line: the candidate of every such chunk that is in the video; of a search that failed, what led to the best
      survivor of its last chunk.
    switches: chunks that begin under another prompt, with the prompt.
    judged: whether candidates have scores.
    failed: whether there is no video.
  """

  given: int
  chunks: Sequence[Mapping[int, Candidate]]
  line: Sequence[int]
  switches: Sequence[tuple[int, str]]
  judged: bool
  failed: bool
  hidden: int = 0

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
  shown = shown_line(account)
  lasts = last_descendants(chunks)
  told = [
    {number: _candidate(account, index, number, shown, lasts) for number in nodes(chunk)}
    for index, chunk in enumerate(chunks)
  ]
  first = 1 + max((number for chunk in told for number in chunk), default=-1)
  for index, (chunk, candidates) in enumerate(zip(chunks, told, strict=True)):
    unfinished = (_unfinished(account, index, place, first) for place in range(len(rejected(chunk))))
    candidates.update((candidate.number, candidate) for candidate in unfinished)
  return Story(
    given=given,
    chunks=told,
    line=shown,
    switches=[(segment["chunk"], segment["prompt"]) for segment in trace["segments"][1:]],
    judged=any(candidate["hybrid"] is not None for chunk in chunks for candidate in chunk["candidates"]),
    failed=account.failed,
    hidden=account.hidden,
  )


def shown_line(account: Account) -> list[int]:
  """The candidates of all chunks that are in the video, or led to the best survivor of a search that failed."""
  final = account.trace["final"]
  return ancestry(account.trace["chunks"]) if final is None else [step["candidate"] for step in final["lineage"]]


def ancestry(chunks: Sequence[Mapping[str, Any]]) -> list[int]:
  """The candidates of all chunks that led to the first survivor of the last one."""
  line, beam = [], 0
  for chunk in reversed(chunks):
    number = chunk["survivors"][beam]
    line.append(number)
    beam = nodes(chunk)[number]["parent"]
  return line[::-1]


def last_descendants(chunks: Sequence[Mapping[str, Any]]) -> list[dict[int, int]]:
  """For every candidate the place in `chunks` of the last chunk that it, or a descendant, survived; -1 for none."""
  lasts: list[dict[int, int]] = []
  for index, chunk in reversed(list(enumerate(chunks))):
    own = dict.fromkeys(nodes(chunk), -1)
    for beam, number in enumerate(chunk["survivors"]):
      own[number] = max(own[number], index)
      if lasts:
        children = (child for child, entry in nodes(chunks[index + 1]).items() if entry["parent"] == beam)
        own[number] = max([own[number], *(lasts[0][child] for child in children)])
    lasts.insert(0, own)
  return lasts


def _candidate(
  account: Account, index: int, number: int, line: Sequence[int], lasts: Sequence[Mapping[int, int]]
) -> Candidate:
  chunks, given = account.trace["chunks"], account.trace["given_chunks"]
  chunk = chunks[index]
  entry = nodes(chunk)[number]
  parent, noise = _origin(account, index, entry)
  scores = {name: entry[name] for name, _ in SCORES}
  kind = _kind(entry, number in chunk["survivors"], number == line[index])
  return Candidate(
    chunk=given + index,
    number=number,
    name=f"candidate {number}",
    parent=parent,
    seed=entry["seed"],
    noise=noise,
    scores=scores,
    place=_place(chunk["candidates"], entry),
    kind=kind,
    fate=_fate(account, entry, kind, given + lasts[index][number], is_last=lasts[index][number] == len(chunks) - 1),
    route=entry.get("route", "nothing"),
    route_after=_route_after(entry.get("flags")),
    notes=_notes(chunk, entry),
  )


def _unfinished(account: Account, index: int, place: int, first: int) -> Candidate:
  """A candidate that ended while its chunk was denoised; `first` is the number of the first such."""
  chunk = account.trace["chunks"][index]
  entry = rejected(chunk)[place]
  parent, noise = _origin(account, index, entry)
  ended = f"after denoising step {entry['step']}"
  usable = entry["fate"] != UNUSABLE
  return Candidate(
    chunk=account.trace["given_chunks"] + index,
    number=first + place,
    name=f"unfinished {place}",
    parent=parent,
    seed=entry["seed"],
    noise=noise,
    scores={name: None for name, _ in SCORES},
    place=None,
    kind=REJECTED if usable else UNUSABLE,
    fate=f"rejected {ended}" if usable else f"not usable {ended}: NaN or Inf",
    route="nothing",
    route_after="not finished",
    notes=_notes(chunk, entry),
  )


def _origin(account: Account, index: int, entry: Mapping[str, Any]) -> tuple[int | None, str]:
  """Number of the parent of a candidate of the `index`th chunk that was made, and the sentence about its noise."""
  sigma = account.settings.get("noise_sigma")
  if not index and account.hidden:
    return None, "not told: its parent is left out"
  if not index:
    return None, noise_sentence(sigma, entry["seed"], None, has_parent=False)
  before = account.trace["chunks"][index - 1]
  parent = before["survivors"][entry["parent"]]
  return parent, noise_sentence(sigma, entry["seed"], nodes(before)[parent]["seed"], has_parent=True)


def _notes(chunk: Mapping[str, Any], entry: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What policies add: looks at what is unfinished, weights, and what the choice at the end of the chunk was like."""
  notes = []
  for name, label in (("preview", "Early look"), ("ahead", "With what follows"), ("log_weight", "Log weight")):
    if isinstance(entry.get(name), (int, float)):
      notes.append((label, f"{entry[name]:.4f}".replace("-", "\N{MINUS SIGN}")))
  for event in chunk.get("events", ()):
    if isinstance(event, Mapping) and isinstance(event.get("ess"), (int, float)):
      again = ", beams drawn anew by weight" if event.get("resampled") else ""
      notes.append(("Chunk", f"effective sample size {event['ess']:.2f}{again}"))
  return notes


def _kind(entry: Mapping[str, Any], survives: bool, shown: bool) -> str:
  if shown:
    return WINNER
  if survives:
    return SURVIVOR
  return LOSER if entry["usable"] else UNUSABLE


def _fate(account: Account, entry: Mapping[str, Any], kind: str, last: int, *, is_last: bool) -> str:
  """A sentence without its stop. A `fate` that is not known here comes first, in its own word."""
  shown = "led to the best beam when the search failed" if account.failed else "in the video"
  ended = "to the end, in a beam that is not shown" if is_last else f"for a while; its line ended with chunk {last}"
  sentence = {
    WINNER: shown,
    SURVIVOR: f"survived {ended}",
    LOSER: "dropped",
    UNUSABLE: "not usable: NaN or Inf",
  }[kind]
  copies = entry.get("copies")
  if isinstance(copies, int) and copies > 1:
    return f"{sentence}; went on in {copies} beams"
  own = entry.get("fate")
  if not isinstance(own, str) or own in _FATES:
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
