"""One live session from its start to its end: chunk by chunk, on media time, with what is told of each."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from streamt1_jax.io import manifest
from streamt1_jax.messages import one_line
from streamt1_jax.report import pictures
from streamt1_jax.serve.control import CLOSED, Asked, Control
from streamt1_jax.serve.fragments import Film, Fragment
from streamt1_jax.serve.numbers import Numbers
from streamt1_jax.serve.pace import Pace
from streamt1_jax.serve.protocol import event
from streamt1_jax.serve.studio import Item, Keeper, KeepsNothing, LiveSession, Saved, Shown, Studio
from streamt1_jax.session import Chunk
from streamt1_jax.state import ChunkTrace
from streamt1_jax.trace import describe_chunk

IDLE = 1.0
"""Seconds between two calls of `Studio.idle`."""
_TICK = 0.05
"""Seconds between two looks at whether a viewer who cannot follow has caught up."""
_LOGGER = logging.getLogger(__name__)


class Take:
  """One session while it is made."""

  def __init__(
    self,
    studio: Studio,
    control: Control,
    tell: Callable[[Item], None],
    numbers: Numbers,
    *,
    most_seconds: float,
    lead: float,
    hold: Callable[[], bool],
    warm: bool = True,
  ):
    """See `search_thread.SearchThread`; `warm` says whether the programs of the search are compiled."""
    self._studio, self._control, self._tell_item, self._numbers = studio, control, tell, numbers
    self._most_seconds, self._hold, self._warm = most_seconds, hold, warm
    self.film = Film(studio.fps, scale=studio.scale)
    self.shown = 0
    self._pace = Pace(lead, control.clock)
    self._keeper: Keeper = KeepsNothing()
    self._session: LiveSession | None = None
    self._rows: dict[int, tuple[dict[str, Any], dict[int, bytes]]] = {}
    self._applied: list[Asked] = []
    self._made, self._making, self._searching = 0, 0.0, 0.0
    self._sent_at: float | None = None
    self._writer: threading.Thread | None = None

  def run(self) -> None:
    """Until it is stopped or over."""
    control = self._control
    if control.stopped:
      return
    self._keeper = self._studio.keeper(control.start)
    session = self._session = self._studio.open(control.start, self._take_trace)
    self._made = session.num_given
    control.attach(session)
    self._numbers.count("sessions_total")
    self._say_start(session)
    deadline = time.monotonic() + self._most_seconds
    while self._wait(session, deadline):
      self._say_running(session)
      begun = time.monotonic()
      chunk = next(session, None)
      taken = time.monotonic() - begun
      self._making += taken
      self._searching += taken
      self._answer()
      if chunk is None:
        break
      self._show(chunk)
    session.stop()
    for chunk in session:
      # What was made and not shown, because beams differed in it. It may be more than a viewer can take at once.
      while self._hold() and control.stopped != CLOSED:
        self._studio.idle()
        time.sleep(_TICK)
      self._show(chunk)
    self._wait_for_save()
    self._save_if_asked(session)
    self._wait_for_save()

  def close(self) -> None:
    """Lets go of the session and of what was kept of it."""
    self._control.attach(None)
    # Prompts that came after the last chunk, or before one that failed.
    self._answer()
    self._wait_for_save()
    self._keeper.close()

  def _wait(self, session: LiveSession, deadline: float) -> bool:
    """Until the next chunk is to be begun. False if there is to be none."""
    control = self._control
    while True:
      control.look()
      self._save_if_asked(session)
      left = deadline - time.monotonic()
      if left <= 0:
        control.stop("time")
      if control.stopped:
        return False
      wait = IDLE if control.paused else max(self._pace.wait, _TICK if self._hold() else 0.0)
      if wait <= 0:
        return True
      self._studio.idle()
      control.wait(min(left, wait, IDLE))

  def _save_if_asked(self, session: LiveSession) -> None:
    """Begins a save, which is written while the search goes on. One that is asked for meanwhile waits for it."""
    if self._writer is not None and self._writer.is_alive():
      return
    if not self._control.take_save():
      return
    try:
      write = self._keeper.prepare_save(session)
    except Exception as error:
      self._say_not_saved(error)
      return
    self._writer = threading.Thread(target=self._write, args=[write, self.shown], name="save", daemon=True)
    self._writer.start()

  def _write(self, write: Callable[[], Saved], chunks: int) -> None:
    """The work of a thread of its own."""
    try:
      saved = write()
    except Exception as error:
      self._say_not_saved(error)
    else:
      self._control.saved = saved.folder
      self._tell("session.saved", folder=saved.folder, chunks=chunks, no_report=saved.no_report)

  def _say_not_saved(self, error: Exception) -> None:
    # A disk that is full, or anything else: the video is not lost over its save.
    _LOGGER.warning(f"a session cannot be saved: {type(error).__name__}: {one_line(str(error))}")
    self._tell("error", code="not_saved", message=one_line(f"it cannot be saved: {error}"))

  def _wait_for_save(self) -> None:
    """Until nothing is being written."""
    while self._writer is not None and self._writer.is_alive():
      self._studio.idle()
      self._writer.join(IDLE)

  def _tell(self, kind: str, **fields: Any) -> None:
    self._tell_item(Item(event(kind, self._control.request, **fields)))

  def _say_start(self, session: LiveSession) -> None:
    search = session.config.search
    config = {
      "fps": self._studio.fps,
      "seed": session.config.seed,
      "search": self._studio.preset(self._control.start.search),
      "beam_size": search.beam_size,
      "top_k": search.top_k,
      "given_chunks": session.num_given,
    }
    self._tell("video.start", format="m4s", prompt=session.prompt, config=config)

  def _say_running(self, session: LiveSession) -> None:
    fields = {"generation_chunk_index": self._made, "state": "running"}
    row = event("search.candidates", self._control.request, count=session.config.search.num_candidates, **fields)
    self._tell_item(Item(row, "preview"))

  def _take_trace(self, trace: ChunkTrace) -> None:
    """Tells what became of the candidates of a chunk."""
    assert self._session is not None
    search, index = self._session.config.search, self._made
    self._made += 1
    # Strict JSON: a score that is NaN is null, also for a browser.
    row = json.loads(manifest.to_json_line(describe_chunk(index, trace, search)))
    strips = pictures.strips_of(trace, row, self._studio.pictures)
    self._rows[index] = row, strips
    names = ("candidate", "parent", "seed", "short", "long", "hybrid", "fate", "rank", "route", "flags")
    candidates = [
      {name: candidate[name] for name in names}
      | ({"strip": pictures.as_data(strips[candidate["candidate"]])} if candidate["candidate"] in strips else {})
      for candidate in row["candidates"]
    ]
    fields = {"generation_chunk_index": index, "state": "judged", "survivors": row["survivors"]}
    told = event("search.candidates", self._control.request, candidates=candidates, **fields)
    self._tell_item(Item(told, "preview"))

  def _show(self, chunk: Chunk) -> None:
    """Sends a chunk of the video."""
    row, strips = self._rows.pop(chunk.index, (None, {}))
    begun = time.monotonic()
    fragment = self.film.add(self._studio.pictures(chunk.frames))
    searching, self._searching = self._searching, 0.0
    self._keeper.add(Shown(chunk, fragment, row, strips, searching))
    self._making += time.monotonic() - begun
    now = self._control.clock()
    on_time = self._pace.add(fragment.num_frames / self.film.fps)
    seconds = self._count(fragment, now, on_time)
    survivor = None if row is None or chunk.beam is None else row["survivors"][chunk.beam]
    told = event(
      "video.chunk_metadata",
      self._control.request,
      kind="media",
      generation_chunk_index=chunk.index,
      transport_chunk_index=self.shown,
      num_frames=fragment.num_frames,
      begin=fragment.begin / self.film.fps,
      mime=self.film.mime(fragment.init),
      prompt=chunk.prompt,
      segment=chunk.segment,
      started_event_ids=self._started(chunk, now),
      winner=survivor,
      route=None if row is None else _route(row, survivor),
      lag=chunk.lag,
      making_seconds=round(seconds, 4),
      behind_seconds=round(self._pace.stood_still, 4),
      on_time=on_time,
    )
    self.shown += 1
    self._tell_item(Item(told, "media", fragment))

  def _count(self, fragment: Fragment, now: float, on_time: bool) -> float:
    """Returns the seconds that it took to make, encode and keep video since the chunk before was sent."""
    numbers, (seconds, self._making) = self._numbers, (self._making, 0.0)
    numbers.count("chunks_total")
    numbers.count("chunks_on_time_total", float(on_time))
    numbers.count("media_seconds_total", fragment.num_frames / self.film.fps)
    numbers.count("making_seconds_total", seconds)
    numbers.observe("chunk_seconds", seconds)
    if self._sent_at is None:
      numbers.observe("first_chunk_seconds" if self._warm else "cold_first_chunk_seconds", now - self._control.began)
    else:
      numbers.observe("chunk_gap_seconds", now - self._sent_at)
    self._sent_at = now
    return seconds

  def _started(self, chunk: Chunk, now: float) -> list[str]:
    """What clients call the prompts that this chunk is the first under."""
    begun = [asked for asked in self._applied if (asked.receipt.chunk or 0) <= chunk.index]
    self._applied = [asked for asked in self._applied if asked not in begun]
    for asked in begun:
      self._numbers.count("switches_total")
      self._numbers.observe("switch_seconds", now - asked.at)
    return [asked.event_id for asked in begun if asked.event_id is not None]

  def _answer(self) -> None:
    """Tells what became of prompts that were asked for."""
    for asked in self._control.take_decided():
      receipt = asked.receipt
      fields = {"event_id": asked.event_id, "prompt": receipt.prompt, "generation_chunk_index": receipt.chunk}
      self._tell(f"session.interaction.{receipt.status}", **fields, reason=receipt.reason or None)
      if receipt.status == "applied":
        self._applied.append(asked)


def _route(row: dict[str, Any], survivor: int | None) -> str | None:
  """What became of the chunk that left the memory before this one was made."""
  return next((entry["route"] for entry in row["candidates"] if entry["candidate"] == survivor), None)
