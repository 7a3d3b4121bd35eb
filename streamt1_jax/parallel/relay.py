"""A local stand-in for the coordinator's address, which says when the coordinator is gone.

  JAX's client ── 127.0.0.1 ── relay ── network ── coordinator, in process 0

JAX's client aborts its process, with exit code 134 and a stack trace, as soon as its connection breaks, and nothing in
Python is asked before. Behind a relay the connection does not break: the relay notices, and there is time for a word.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

_BUFFER_BYTES = 1 << 16
_RETRY_SECONDS = 0.2


class Relay:
  """Passes on whatever is sent to `address`, in both directions, until the coordinator goes away.

  Attributes:
    address: host and port to give to JAX, on this machine.
  """

  def __init__(self, coordinator: str, silence_seconds: float, on_loss: Callable[[], None]):
    """Begins to listen.

    Args:
      coordinator: host:port; nobody needs to listen there yet.
      silence_seconds: how long the network may swallow everything before the coordinator counts as gone.
      on_loss: called, in a thread, when a connection that once stood is lost; the local one stays open meanwhile.
    """
    host, _, port = coordinator.rpartition(":")
    self._coordinator = host.strip("[]"), int(port)
    self._silence_seconds, self._on_loss = silence_seconds, on_loss
    listener = socket.create_server(("127.0.0.1", 0))
    self.address = f"127.0.0.1:{listener.getsockname()[1]}"
    _in_thread(self._accept, listener)

  def _accept(self, listener: socket.socket) -> None:
    while True:
      local, _ = listener.accept()
      _in_thread(self._serve, local)

  def _serve(self, local: socket.socket) -> None:
    remote, hung_up = self._connect(), threading.Event()

    def send() -> None:
      if _pass_on(local, remote):
        hung_up.set()
        # Closing alone says nothing to the coordinator while the other thread waits for an answer of it.
        with contextlib.suppress(OSError):
          remote.shutdown(socket.SHUT_RDWR)

    _in_thread(send)
    if _pass_on(remote, local) and not hung_up.is_set():
      self._on_loss()

  def _connect(self) -> socket.socket:
    """Tries until somebody listens: who starts first waits for process 0, as long as the caller gives it."""
    while True:
      try:
        remote = socket.create_connection(self._coordinator, self._silence_seconds)
      except OSError:
        time.sleep(_RETRY_SECONDS)
        continue
      remote.settimeout(None)
      _notice_silence(remote, self._silence_seconds)
      return remote


def _notice_silence(connection: socket.socket, seconds: float) -> None:
  """A machine that loses its power says no goodbye: the system asks for signs of life where it knows how to."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  probe = max(1, int(seconds / 4))
  for name, value in (
    ("TCP_KEEPIDLE", probe),
    ("TCP_KEEPINTVL", probe),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", int(seconds * 1000)),
  ):
    if hasattr(socket, name):
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _pass_on(source: socket.socket, target: socket.socket) -> bool:
  """Copies until one of them ends; whether that was `source`."""
  while True:
    try:
      content = source.recv(_BUFFER_BYTES)
    except OSError:
      return True
    if not content:
      return True
    try:
      target.sendall(content)
    except OSError:
      return False


def _in_thread(work: Callable, *arguments: object) -> None:
  threading.Thread(target=work, args=arguments, daemon=True).start()
