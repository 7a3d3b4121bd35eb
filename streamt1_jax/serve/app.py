"""The web application: a page, a websocket, and what machines read.

/                      the page
/v1/realtime/video     the websocket
/healthz, /metrics     for machines
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import time
from collections.abc import Sequence

from aiohttp import WSCloseCode, WSMsgType, web

from streamt1_jax.report import write as report
from streamt1_jax.serve import doors, protocol
from streamt1_jax.serve.hub import Hub
from streamt1_jax.serve.numbers import Numbers
from streamt1_jax.serve.protocol import Refused
from streamt1_jax.serve.search_thread import SearchThread
from streamt1_jax.serve.studio import Item, Studio
from streamt1_jax.serve.viewers import Viewer

_PAGE = pathlib.Path(__file__).with_name("page")
_FILES = {
  "/": (_PAGE / "live.html", "text/html"),
  "/live.css": (_PAGE / "live.css", "text/css"),
  "/live.js": (_PAGE / "live.js", "text/javascript"),
  "/report.css": (report.PAGE / "report.css", "text/css"),
}
"""By path: no other file is ever read."""
_BURST, _PER_SECOND = 20, 10.0
"""Messages of a client: at once, and in the long run."""
_MOST_REFUSED = 200
"""Refused messages of a connection; one that sends more is closed."""
_MOST_SENDING = 30.0
"""Seconds that a client may take for one frame, or for the answer to a ping: the ping may wait behind that frame."""
_HEARTBEAT = 2 * _MOST_SENDING
"""Seconds after which a client that says nothing is sent a ping. For the answer aiohttp waits half as long."""


class Rate:
  """A bucket of messages that fills with time."""

  def __init__(self, burst: float = _BURST, per_second: float = _PER_SECOND):
    self._left, self._burst, self._per_second, self._at = burst, burst, per_second, time.monotonic()

  def take(self) -> bool:
    """Whether another message may come now."""
    now = time.monotonic()
    self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
    self._at = now
    if self._left < 1:
      return False
    self._left -= 1
    return True


class Server:
  """Everything that one server consists of; `app` is to be served by aiohttp.

  Attributes:
    hub: the connections.
    numbers: what is counted.
    thread: makes sessions; it begins with the application.
    app: the application.
  """

  def __init__(
    self,
    studio: Studio,
    *,
    token: str | None = None,
    most_seconds: float = 600.0,
    warm_up: Sequence[str] = (),
    lead: float | None = None,
    rate: tuple[float, float] = (_BURST, _PER_SECOND),
  ):
    """Nothing begins yet.

    Args:
      studio: what sessions are made with.
      token: what clients must know; None on this machine alone.
      most_seconds: of a session.
      warm_up: see `SearchThread`.
      lead: see `SearchThread`.
      rate: messages of a client, at once and per second.
    """
    self.numbers = Numbers()
    self.hub = Hub(studio.presets, self.numbers)
    options = {} if lead is None else {"lead": lead}
    self.thread = SearchThread(
      studio,
      self._tell,
      self.numbers,
      most_seconds=most_seconds,
      hold=lambda: self.hub.is_held,
      warm_up=warm_up,
      **options,
    )
    self.hub.orders = self.thread
    self._rate = rate
    self._loop: asyncio.AbstractEventLoop | None = None
    self._sockets: set[web.WebSocketResponse] = set()
    self.app = web.Application(middlewares=[doors.guard(token)])
    self.app.on_response_prepare.append(doors.add_headers)
    for path in _FILES:
      self.app.router.add_get(path, self._file)
    self.app.router.add_get("/v1/realtime/video", self._socket)
    self.app.router.add_get("/healthz", self._health)
    self.app.router.add_get("/metrics", self._metrics)
    self.app.on_startup.append(self._begin)
    self.app.on_shutdown.append(self._end)

  async def close(self, *, save: bool = False) -> str | None:
    """Ends the session, which is saved first if `save` is set. Returns the folder of the save, or None."""
    self.hub.close()
    control = self.thread.close(save=save)
    if self.thread.is_alive():
      await asyncio.to_thread(self.thread.join)
    return None if control is None else control.saved

  def _tell(self, item: Item) -> None:
    """From the thread of the search to that of the loop."""
    assert self._loop is not None
    with contextlib.suppress(RuntimeError):  # The loop is closed: nobody listens.
      self._loop.call_soon_threadsafe(self.hub.tell, item)

  async def _begin(self, app: web.Application) -> None:
    self._loop = asyncio.get_running_loop()
    self.thread.start()

  async def _end(self, app: web.Application) -> None:
    await self.close()
    self.hub.drop_all()
    for socket in list(self._sockets):
      with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
        await asyncio.wait_for(socket.close(code=WSCloseCode.GOING_AWAY), 2)

  async def _file(self, request: web.Request) -> web.Response:
    file, kind = _FILES[request.path]
    return web.Response(body=file.read_bytes(), content_type=kind, charset="utf-8")

  async def _health(self, request: web.Request) -> web.Response:
    if not self.thread.is_alive():
      return web.json_response({"status": "failed"}, status=503)
    if not self.thread.ready.is_set():
      return web.json_response({"status": "starting"}, status=503)
    return web.json_response({"status": "ok"})

  async def _metrics(self, request: web.Request) -> web.Response:
    return web.Response(text=self.numbers.prometheus(), content_type="text/plain", charset="utf-8")

  async def _socket(self, request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(max_msg_size=protocol.MOST_BYTES, heartbeat=_HEARTBEAT, compress=False)
    await socket.prepare(request)
    try:
      viewer = self.hub.join()
    except Refused as refused:
      await socket.send_json(protocol.error_event(refused))
      await socket.close(code=WSCloseCode.TRY_AGAIN_LATER)
      return socket
    self._sockets.add(socket)
    sender = asyncio.create_task(_send(socket, viewer, request.transport))
    try:
      await self._listen(socket, viewer)
    finally:
      self._sockets.discard(socket)
      self.hub.leave(viewer)
      sender.cancel()
      with contextlib.suppress(asyncio.CancelledError, ConnectionError):
        await sender
    return socket

  async def _listen(self, socket: web.WebSocketResponse, viewer: Viewer) -> None:
    """What a client says, until it is gone."""
    rate, refusals = Rate(*self._rate), 0
    async for message in socket:
      if message.type is WSMsgType.ERROR:
        # The connection is closed: a frame was no frame or too large, or no answer to a ping has come.
        return
      try:
        if not rate.take():
          raise Refused("rate", f"at most {self._rate[1]:g} messages a second")
        if message.type is not WSMsgType.TEXT:
          raise Refused("invalid", "a message must be text")
        self.hub.handle(viewer, protocol.parse(message.data))
      except Refused as refused:
        refusals += 1
        self.numbers.count("refused_total")
        viewer.put(Item(protocol.error_event(refused)))
        if refusals > _MOST_REFUSED:
          await socket.close(code=WSCloseCode.POLICY_VIOLATION)


async def _send(socket: web.WebSocketResponse, viewer: Viewer, transport: asyncio.Transport | None) -> None:
  """Sends what waits for a viewer, as fast as it takes it. One that takes nothing is cut off."""
  try:
    async for frame in viewer.frames():
      async with asyncio.timeout(_MOST_SENDING):
        await socket.send_str(frame.text)
        if frame.binary is not None:
          await socket.send_bytes(frame.binary)
  except ConnectionError:
    return
  except TimeoutError:
    if transport is not None:
      transport.abort()
    return
  await socket.close(code=WSCloseCode.TRY_AGAIN_LATER if viewer.lost else WSCloseCode.GOING_AWAY)
