"""Who steers, who waits, and who looks.

One session at a time belongs to the connection that asked for it. Others that ask wait in a line and are told their
place. Every connection sees the video. All of it runs in the thread of the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from streamt1_jax.config import ConfigError
from streamt1_jax.serve import protocol
from streamt1_jax.serve.control import Control
from streamt1_jax.serve.numbers import Numbers
from streamt1_jax.serve.protocol import Message, Refused, Start, event
from streamt1_jax.serve.studio import Item
from streamt1_jax.serve.viewers import Viewer

MOST_VIEWERS, MOST_WAITING = 256, 32
MOST_PENDING = 8
"""Prompts of one client that are being read."""


class Orders(Protocol):
  """What makes sessions: a `SearchThread`."""

  def order(self, request: str, start: Start) -> Control: ...

  def is_warm(self, search: str | None) -> bool: ...


class _Waiting(NamedTuple):
  viewer: Viewer
  start: Start


class Hub:
  """The connections of one server."""

  def __init__(self, presets: tuple[str, ...], numbers: Numbers):
    """`presets` are the searches that a client may choose. `orders` is to be set before the first message."""
    self.orders: Orders | None = None
    self._presets, self._numbers = presets, numbers
    self._viewers: list[Viewer] = []
    self._line: list[_Waiting] = []
    self._places: dict[Viewer, int] = {}
    self._owner: Viewer | None = None
    self._control: Control | None = None
    self._begin: Item | None = None
    self._closed = self._ready = False
    self._pending: dict[Viewer, int] = {}
    self._tasks: set[asyncio.Task[None]] = set()
    self._viewer_numbers, self._requests = itertools.count(1), itertools.count(1)

  @property
  def is_held(self) -> bool:
    """Whether the one who steers cannot follow. May be asked from any thread."""
    owner = self._owner
    return owner is not None and owner.is_slow

  def join(self) -> Viewer:
    """A new connection, which looks. Raises Refused if there are too many."""
    if len(self._viewers) >= MOST_VIEWERS:
      raise Refused("busy", f"there are {MOST_VIEWERS} viewers already")
    viewer = Viewer(next(self._viewer_numbers), self._numbers)
    self._viewers.append(viewer)
    self._numbers.set("viewers", len(self._viewers))
    running = None if self._control is None else self._control.request
    limits = {"most_image_bytes": protocol.MOST_IMAGE_BYTES}
    known = {"presets": list(self._presets), "viewers": len(self._viewers), "ready": self._ready, **limits}
    viewer.put(Item(event("session.hello", running, **known)))
    if self._begin is not None:
      viewer.put(self._begin)
    if self._control is not None and self._control.paused:
      viewer.put(Item(event("session.paused", running)))
    return viewer

  def leave(self, viewer: Viewer) -> None:
    """A connection is gone. A session that it steered ends; a place in the line becomes free."""
    viewer.close()
    if viewer in self._viewers:
      self._viewers.remove(viewer)
    self._numbers.set("viewers", len(self._viewers))
    self._line = [waiting for waiting in self._line if waiting.viewer is not viewer]
    self._tell_places()
    self._pending.pop(viewer, None)
    if viewer is self._owner:
      self._owner = None
      if self._control is not None:
        self._control.stop("the client has left")

  def close(self) -> None:
    """No further session begins."""
    self._closed = True
    self._line = []

  def drop_all(self) -> None:
    """All connections end when they have got what waits for them."""
    for viewer in self._viewers:
      viewer.close()

  def tell(self, item: Item) -> None:
    """Something happened in a session."""
    kind = item.event["type"]
    if kind == "video.start":
      self._begin = item
    self._ready |= kind == "server.ready"
    for viewer in list(self._viewers):
      viewer.put(item)
    if kind == "session.done":
      self._begin = self._owner = self._control = None
      self._next()

  def handle(self, viewer: Viewer, message: Message) -> None:
    """Does what a client asks for. Raises Refused."""
    _HANDLERS[type(message)](self, viewer, message)

  def _ping(self, viewer: Viewer, message: Message) -> None:
    viewer.put(Item(event("session.pong")))

  def _start(self, viewer: Viewer, message: protocol.Start) -> None:
    if message.search is not None and message.search not in self._presets:
      raise Refused("invalid", f"search must be one of {', '.join(self._presets)}, got {message.search[:60]!r}")
    if viewer is self._owner or any(waiting.viewer is viewer for waiting in self._line):
      raise Refused("busy", "this client has a session or waits for one: stop it first")
    if self._closed:
      raise Refused("busy", "the server is closing")
    if len(self._line) >= MOST_WAITING:
      raise Refused("busy", f"{MOST_WAITING} clients wait already")
    self._line.append(_Waiting(viewer, message))
    self._next()

  def _next(self) -> None:
    """The first of the line gets the session, if it is free."""
    assert self.orders is not None
    if self._control is None and self._line and not self._closed:
      first = self._line.pop(0)
      self._owner = first.viewer
      self._control = self.orders.order(f"session-{next(self._requests)}", first.start)
      warm = self.orders.is_warm(first.start.search)
      first.viewer.put(Item(event("session.accepted", self._control.request, warm=warm)))
    self._tell_places()

  def _tell_places(self) -> None:
    """Everybody in the line whose place is another than before is told."""
    places = {waiting.viewer: place for place, waiting in enumerate(self._line, start=1)}
    for viewer, place in places.items():
      if self._places.get(viewer) != place:
        viewer.put(Item(event("session.queued", place=place)))
    self._places = places
    self._numbers.set("waiting", len(self._line))

  def _owned(self, viewer: Viewer) -> Control:
    if viewer is not self._owner or self._control is None:
      raise Refused("not_yours", "this client has no session")
    return self._control

  def _interaction(self, viewer: Viewer, message: protocol.Interaction) -> None:
    try:
      control = self._owned(viewer)
    except Refused as refused:
      raise Refused(refused.code, str(refused), message.event_id) from refused
    if self._pending.get(viewer, 0) >= MOST_PENDING:
      raise Refused("rate", f"{MOST_PENDING} prompts are being read already", message.event_id)
    self._pending[viewer] = self._pending.get(viewer, 0) + 1
    task = asyncio.get_running_loop().create_task(self._switch(viewer, control, message))
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  async def _switch(self, viewer: Viewer, control: Control, message: protocol.Interaction) -> None:
    """A prompt takes a while to be read, and the loop does not wait for it."""
    loop = asyncio.get_running_loop()
    told = Item(event("session.interaction.queued", control.request, event_id=message.event_id))
    queued = lambda: loop.call_soon_threadsafe(viewer.put, told)
    try:
      await asyncio.to_thread(control.switch, message.prompt, message.event_id, queued)
    except Exception as error:
      code = "invalid" if isinstance(error, ConfigError) else "failed"
      refused = Refused(code, str(error), message.event_id)
      viewer.put(Item(protocol.error_event(refused, control.request)))
    finally:
      if viewer in self._pending:
        self._pending[viewer] -= 1

  def _pause(self, viewer: Viewer, message: Message) -> None:
    control = self._owned(viewer)
    control.pause()
    self.tell(Item(event("session.paused", control.request)))

  def _resume(self, viewer: Viewer, message: Message) -> None:
    control = self._owned(viewer)
    control.resume()
    self.tell(Item(event("session.resumed", control.request)))

  def _stop(self, viewer: Viewer, message: Message) -> None:
    waiting = [entry for entry in self._line if entry.viewer is viewer]
    if waiting:
      self._line.remove(waiting[0])
      viewer.put(Item(event("session.done", reason="stopped", chunks=0, seconds=0.0)))
      self._tell_places()
      return
    self._owned(viewer).stop()

  def _save(self, viewer: Viewer, message: Message) -> None:
    self._owned(viewer).save()


_HANDLERS: Mapping[type, Callable[[Hub, Viewer, Any], None]] = {
  protocol.Start: Hub._start,
  protocol.Interaction: Hub._interaction,
  protocol.Pause: Hub._pause,
  protocol.Resume: Hub._resume,
  protocol.Stop: Hub._stop,
  protocol.Save: Hub._save,
  protocol.Ping: Hub._ping,
}
