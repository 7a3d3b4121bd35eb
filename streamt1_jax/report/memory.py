"""What the shown lineage remembered while every chunk was made, rebuilt from the routes in its trace.

The first chunk is a sink from the start. Every later chunk enters the window; the one that leaves it is discarded,
merged into the last sink, or stays as a new sink (`memory_sinking`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from streamt1_jax.report.account import Account, nodes

DISCARDED, MERGED, APPENDED = "discarded", "merged", "appended"
ROUTES = {"discard": DISCARDED, "ema": MERGED, "append": APPENDED, "append_at_maximum": MERGED}
"""Routes of a trace, in a page's words: at the most sinks, what would have become one is merged."""


@dataclasses.dataclass(frozen=True)
class Stay:
  """How long a chunk was in one slot.

  Attributes:
    held: the chunk.
    slot: row among the sinks, or among the slots of the window.
    begin: the first chunk that was made while it was there.
    end: the first chunk after that; the end of the video for what was there to the end.
    leaves: DISCARDED, MERGED or APPENDED, or "" for what was there to the end.
  """

  held: int
  slot: int
  begin: int
  end: int
  leaves: str


@dataclasses.dataclass(frozen=True)
class Event:
  """What happened before chunk `chunk` was made: `leaving` took `route`; a merge went into the sink `into`."""

  chunk: int
  leaving: int
  route: str
  into: int | None


@dataclasses.dataclass(frozen=True)
class Remembered:
  """The memory of one lineage.

  Attributes:
    sinks: stays of sinks, a row each.
    window: stays in the window.
    window_slots: rows that the window needs.
    events: what left the window, in order.
  """

  sinks: Sequence[Stay]
  window: Sequence[Stay]
  window_slots: int
  events: Sequence[Event]


def chunk_frames(account: Account) -> int:
  """Latent frames of a chunk: what the manifest says, or what the frames in the trace have in common; 3 otherwise."""
  length = account.section("length")
  frames, chunks = length.get("latent_frames"), length.get("chunks")
  if isinstance(frames, int) and isinstance(chunks, int) and chunks > 0 and frames >= chunks:
    return frames // chunks
  found = [eviction["frame"] or 0 for chunk in account.trace["chunks"] for eviction in chunk["evictions"]]
  return functools.reduce(math.gcd, found, 0) or 3


def remember(account: Account, line: Sequence[int], begin: int = 0) -> Remembered | None:
  """The memory along `line`, the shown candidate of every chunk. None if the trace does not say what left it.

  What was in it when chunk `begin` was made, and what came later, is told.
  """
  frames, given = chunk_frames(account), account.trace["given_chunks"]
  events, chunks = [], account.trace["chunks"]
  for chunk, number in zip(chunks, line, strict=True):
    event = _event(chunk, nodes(chunk)[number]["parent"], frames)
    events += [event] if event else []
  end = given + len(chunks)
  # What left first was the oldest chunk of the window: all chunks before it are sinks.
  first_sinks = events[0].leaving if events else 1
  if first_sinks > end or any(event.leaving >= event.chunk for event in events):
    return None
  if given:
    first_sinks = min(first_sinks, 1)
  return _since(begin, _stays(events, first_sinks, end, _unseen(events, first_sinks)))


def _since(begin: int, kept: Remembered) -> Remembered:
  later = lambda stays: [dataclasses.replace(stay, begin=max(stay.begin, begin)) for stay in stays if stay.end > begin]
  events = [event for event in kept.events if event.chunk >= begin]
  return Remembered(later(kept.sinks), later(kept.window), kept.window_slots, events)


def _event(chunk: Mapping[str, Any], parent: int, frames: int) -> Event | None:
  for eviction in chunk["evictions"]:
    route = ROUTES.get(eviction["route"])
    if eviction["parent"] == parent and route and eviction["frame"] is not None:
      into = None if eviction["sink_frame"] is None else eviction["sink_frame"] // frames
      return Event(chunk["chunk"], eviction["frame"] // frames, route, into)
  return None


def _unseen(events: Sequence[Event], first_sinks: int) -> Sequence[Event]:
  """What left the window while given chunks were taken in: a trace begins later, and such chunks were discarded."""
  if not events:
    return ()
  stay = events[0].chunk - events[0].leaving
  return [Event(held + stay, held, DISCARDED, None) for held in range(first_sinks, events[0].leaving)]


def _stays(events: Sequence[Event], first_sinks: int, end: int, unseen: Sequence[Event]) -> Remembered:
  left = {event.leaving: event for event in (*unseen, *events)}
  sinks = [Stay(held, held, held, end, "") for held in range(min(first_sinks, end))]
  window, free_from = [], []
  for held in range(first_sinks, end):
    event = left.get(held)
    until = event.chunk if event else end
    slot = next((row for row, free in enumerate(free_from) if free <= held), len(free_from))
    free_from[slot : slot + 1] = [until]
    window.append(Stay(held, slot, held, until, event.route if event else ""))
    if event and event.route == APPENDED:
      sinks.append(Stay(held, len(sinks), until, end, ""))
  sinks = [dataclasses.replace(stay, slot=row) for row, stay in enumerate(sorted(sinks, key=lambda stay: stay.begin))]
  return Remembered(sinks, window, len(free_from), events)
