"""The one thread that uses the devices. It makes one session after the other and tells what happens.

  order() ── session ── chunk by chunk, on media time ── tell(Item) ── hub, in another thread
  Control ── switch, pause, resume, stop, save ── between two chunks

It knows no network: what it tells are events and fragments of video.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from streamt1_jax.config import ConfigError
from streamt1_jax.messages import one_line
from streamt1_jax.report import pictures
from streamt1_jax.serve import protocol
from streamt1_jax.serve.control import Asked, Control
from streamt1_jax.serve.fragments import Film, Fragment
from streamt1_jax.serve.numbers import Numbers
from streamt1_jax.serve.pace import Pace
from streamt1_jax.serve.protocol import Start, event
from streamt1_jax.session import Chunk, Session
from streamt1_jax.state import ChunkTrace
from streamt1_jax.trace import describe_chunk

LEAD = 1.0
"""Seconds of video that are made before a viewer needs them."""
_TICK = 0.05
"""Seconds between two looks at whether a viewer who cannot follow has caught up."""
_LOGGER = logging.getLogger(__name__)


class Item(NamedTuple):
  """Something to tell.

  Attributes:
    event: as JSON values.
    kind: "news" reaches everybody; "preview" may be left out for a slow viewer; "media" has a fragment with it.
    fragment: a chunk of the video, or None.
  """

  event: dict[str, Any]
  kind: Literal["news", "preview", "media"] = "news"
  fragment: Fragment | None = None


class Shown(NamedTuple):
  """A chunk that was shown.

  Attributes:
    chunk: the chunk.
    fragment: its encoded frames.
    row: what the trace says of it, as `trace.describe_chunk`; None for a chunk that was given.
    strips: JPEGs of candidates by number, as in `report.pictures`.
  """

  chunk: Chunk
  fragment: Fragment
  row: dict[str, Any] | None
  strips: Mapping[int, bytes]


class Keeper(Protocol):
  """Keeps what a session shows, so that it can be saved."""

  def add(self, shown: Shown) -> None:
    """The next chunk."""
    ...

  def save(self, session: Session) -> str:
    """Writes it to a folder, whose path it returns. Raises ConfigError or OSError."""
    ...

  def close(self) -> None:
    """Nothing is kept any longer."""
    ...


class KeepsNothing:
  """A `Keeper` that cannot save."""

  def add(self, shown: Shown) -> None:
    pass

  def save(self, session: Session) -> str:
    raise ConfigError("this server saves nothing")

  def close(self) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Studio:
  """What sessions are made with.

  Attributes:
    open: makes a session; the other argument is what it calls with every trace. Raises ConfigError.
    fps: frames per second.
    scale: every pixel becomes a square of this many pixels on a side.
    presets: names of the searches that a client may choose, the default first.
    pictures: frames of a chunk as uint8 `[T, H, W, 3]`.
    keeper: makes what keeps a new session.
  """

  open: Callable[[Start, Callable[[ChunkTrace], None]], Session]
  fps: int
  scale: int = 1
  presets: tuple[str, ...] = ()
  pictures: Callable[[np.ndarray], np.ndarray] = np.asarray
  keeper: Callable[[Start], Keeper] = lambda start: KeepsNothing()


class SearchThread(threading.Thread):
  """Makes sessions in the order they are asked for.

  Attributes:
    ready: set when the first order can be taken: programs are compiled.
  """

  def __init__(
    self,
    studio: Studio,
    tell: Callable[[Item], None],
    numbers: Numbers,
    *,
    most_seconds: float = 600.0,
    lead: float = LEAD,
    hold: Callable[[], bool] = lambda: False,
    warm_up: Sequence[str] = (),
  ):
    """Begins with `start()`.

    Args:
      studio: what sessions are made with.
      tell: called in this thread with everything that happens.
      numbers: counts.
      most_seconds: of a session, on the clock of the wall.
      lead: seconds of video that are made before a viewer needs them.
      hold: whether the one who steers cannot follow; no chunk is begun then.
      warm_up: prompts: a video that shows one after the other is begun before anybody asks, to compile its programs.
    """
    super().__init__(name="search", daemon=True)
    self.studio, self.tell, self.numbers, self.hold = studio, tell, numbers, hold
    self.most_seconds, self.lead = most_seconds, lead
    self._warm_up = warm_up
    self.ready = threading.Event()
    self._orders: queue.SimpleQueue[Control | None] = queue.SimpleQueue()
    self._current: Control | None = None
    self._closing = threading.Event()

  def order(self, request: str, start: Start) -> Control:
    """Asks for a session. It is told of by `video.start`, and by `session.done` when it is over."""
    control = Control(request, start)
    self._orders.put(control)
    return control

  def close(self, *, save: bool = False) -> Control | None:
    """The thread ends before its next chunk; with `save` a session is saved first.

    Returns the session's control, which then says where, or None if there is no session.
    """
    self._closing.set()
    current = self._current
    if current is not None:
      if save:
        current.save()
      current.stop("closed")
    self._orders.put(None)
    return current

  def run(self) -> None:
    """The thread's work."""
    if self._warm_up:
      self._compile(self._warm_up)
    self.ready.set()
    while True:
      # Before the look at `closing`, so that `close` finds it or the thread ends here.
      control = self._current = self._orders.get()
      if control is None or self._closing.is_set():
        return
      self.numbers.set("running", 1)
      try:
        self._play(control)
      finally:
        self.numbers.set("running", 0)
        self._current = None

  def _compile(self, prompts: Sequence[str]) -> None:
    try:
      session = self.studio.open(Start(prompts[0]), lambda trace: None)
      # The first chunk, one of all others, and one after a switch.
      for then in (*prompts[1:], None, None):
        if self._closing.is_set():
          return
        next(session)
        if then is not None:
          session.switch(then)
    except Exception as error:
      # Whoever asks for a session is told the same.
      _LOGGER.warning(f"the first chunks cannot be made: {one_line(str(error))}")

  def _play(self, control: Control) -> None:
    """One session, from its first chunk to `session.done`."""
    take, reason = Take(self, control), "failed"
    try:
      take.run()
      reason = control.stopped or "over"
    except Exception as error:
      # Whatever happens to one session, the next one can begin.
      self.numbers.count("failures_total")
      _LOGGER.warning(f"a session has failed: {type(error).__name__}: {one_line(str(error))}")
      self.tell(Item(protocol.error_event(error, control.request)))
    finally:
      take.close()
    told = {"reason": reason, "chunks": take.shown, "seconds": round(take.film.seconds, 4)}
    self.tell(Item(event("session.done", control.request, **told)))


class Take:
  """One session while it is made."""

  def __init__(self, thread: SearchThread, control: Control):
    self._thread, self._control = thread, control
    self._studio, self._numbers = thread.studio, thread.numbers
    self.film = Film(thread.studio.fps, scale=thread.studio.scale)
    self.shown = 0
    self._pace = Pace(thread.lead)
    self._keeper: Keeper = KeepsNothing()
    self._session: Session | None = None
    self._rows: dict[int, tuple[dict[str, Any], dict[int, bytes]]] = {}
    self._applied: list[Asked] = []
    self._made, self._making = 0, 0.0
    self._sent_at: float | None = None

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
    deadline = time.monotonic() + self._thread.most_seconds
    while self._wait(session, deadline):
      self._say_running(session)
      begun = time.monotonic()
      chunk = next(session, None)
      self._making += time.monotonic() - begun
      self._answer()
      if chunk is None:
        break
      self._show(chunk)
    session.stop()
    for chunk in session:
      # What was made and not shown, because beams differed in it.
      self._show(chunk)
    self._save_if_asked(session)
    self._answer()

  def close(self) -> None:
    """Lets go of the session and of what was kept of it."""
    self._control.attach(None)
    self._keeper.close()

  def _wait(self, session: Session, deadline: float) -> bool:
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
      if control.paused:
        self._pace.pause()
        control.wait(left)
        continue
      self._pace.resume()
      wait = max(self._pace.wait, _TICK if self._thread.hold() else 0.0)
      if wait <= 0:
        return True
      control.wait(min(left, wait))

  def _save_if_asked(self, session: Session) -> None:
    control = self._control
    if not control.take_save():
      return
    try:
      control.saved = self._keeper.save(session)
    except (ConfigError, OSError) as error:
      self._tell("error", code="not_saved", message=one_line(f"it cannot be saved: {error}"))
    else:
      self._tell("session.saved", folder=control.saved, chunks=self.shown)

  def _tell(self, kind: str, **fields: Any) -> None:
    self._thread.tell(Item(event(kind, self._control.request, **fields)))

  def _say_start(self, session: Session) -> None:
    search = session.config.search
    config = {
      "fps": self._studio.fps,
      "seed": session.config.seed,
      "search": self._control.start.search or (self._studio.presets or (None,))[0],
      "beam_size": search.beam_size,
      "top_k": search.top_k,
      "given_chunks": session.num_given,
    }
    self._tell("video.start", format="m4s", prompt=session.prompt, config=config)

  def _say_running(self, session: Session) -> None:
    fields = {"generation_chunk_index": self._made, "state": "running"}
    row = event("search.candidates", self._control.request, count=session.config.search.num_candidates, **fields)
    self._thread.tell(Item(row, "preview"))

  def _take_trace(self, trace: ChunkTrace) -> None:
    """Tells what became of the candidates of a chunk."""
    assert self._session is not None
    search, index = self._session.config.search, self._made
    self._made += 1
    row = describe_chunk(index, trace, search)
    strips = _strips(trace, row, self._studio)
    self._rows[index] = row, strips
    names = ("candidate", "parent", "seed", "short", "long", "hybrid", "fate", "rank", "route", "flags")
    candidates = [
      {name: candidate[name] for name in names}
      | ({"strip": pictures.as_data(strips[candidate["candidate"]])} if candidate["candidate"] in strips else {})
      for candidate in row["candidates"]
    ]
    fields = {"generation_chunk_index": index, "state": "judged", "survivors": row["survivors"]}
    told = event("search.candidates", self._control.request, candidates=candidates, **fields)
    self._thread.tell(Item(told, "preview"))

  def _show(self, chunk: Chunk) -> None:
    """Sends a chunk of the video."""
    row, strips = self._rows.pop(chunk.index, (None, {}))
    fragment = self.film.add(self._studio.pictures(chunk.frames))
    self._keeper.add(Shown(chunk, fragment, row, strips))
    now = time.monotonic()
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
    self._thread.tell(Item(told, "media", fragment))

  def _count(self, fragment: Fragment, now: float, on_time: bool) -> float:
    """Returns the seconds that were spent on making video since the chunk before was sent."""
    numbers, (seconds, self._making) = self._numbers, (self._making, 0.0)
    numbers.count("chunks_total")
    numbers.count("chunks_on_time_total", float(on_time))
    numbers.count("media_seconds_total", fragment.num_frames / self.film.fps)
    numbers.count("making_seconds_total", seconds)
    numbers.observe("chunk_seconds", seconds)
    if self._sent_at is None:
      numbers.observe("first_chunk_seconds", now - self._control.at)
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


def _strips(trace: ChunkTrace, row: dict[str, Any], studio: Studio) -> dict[int, bytes]:
  """Small pictures of candidates by number: of all where the trace has previews, else of survivors."""
  if trace.previews is None:
    frames = dict(zip(row["survivors"], np.asarray(trace.frames), strict=True))
  else:
    flat = np.asarray(trace.previews).reshape(-1, *trace.previews.shape[2:])
    frames = {entry["candidate"]: flat[entry["candidate"]] for entry in row["candidates"]}
  return {number: pictures.strip_of(studio.pictures(each)) for number, each in frames.items()}
