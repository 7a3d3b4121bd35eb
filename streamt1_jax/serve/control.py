"""The handle of one session that somebody asked for: what it is told from outside, from any thread.

Everything takes effect between two chunks. A session that is stopped before it has begun never begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from streamt1_jax.config import ConfigError
from streamt1_jax.receipts import Receipt
from streamt1_jax.serve.protocol import Start
from streamt1_jax.serve.studio import LiveSession

CLOSED = "closed"
"""Why a session ends with its server."""
_NO_SESSION = "the session has not begun, or it is over"


class Asked(NamedTuple):
  """A prompt that was asked for: the answer, what the client calls it, and when it came, on the session's clock."""

  receipt: Receipt
  event_id: str | None
  at: float


class Control:
  """One session, from the moment it is asked for.

  Attributes:
    request: its name.
    start: what was asked for.
    began: when, on the session's clock.
    saved: folder of the last save, or None.
  """

  def __init__(self, request: str, start: Start):
    self.request, self.start, self.began = request, start, time.monotonic()
    self.saved: str | None = None
    self._lock, self._news = threading.Lock(), threading.Event()
    self._session: LiveSession | None = None
    self._save_asked = False
    self._paused_at: float | None = None
    self._stood = 0.0
    self._stopped: str | None = None
    self._asked: list[Asked] = []

  def switch(self, prompt: str, event_id: str | None = None, queued: Callable[[], object] = lambda: None) -> Receipt:
    """Asks for another prompt, which is read in the caller's thread. `queued` is called before any answer.

    Raises ConfigError for a prompt that cannot be read, before the session has begun, or if it ends meanwhile.
    """
    at, session = self.clock(), self._session
    if session is None:
      raise ConfigError(_NO_SESSION)
    receipt = session.switch(prompt)
    # Only what is in the list is answered: nobody hears of an answer before they hear that it is queued.
    queued()
    with self._lock:
      # Reading may take longer than the session: nobody looks at the list any more.
      if self._session is not session:
        raise ConfigError(_NO_SESSION)
      self._asked.append(Asked(receipt, event_id, at))
    return receipt

  def pause(self) -> None:
    """No further chunk is begun until `resume`; once more changes nothing."""
    with self._lock:
      self._paused_at = time.monotonic() if self._paused_at is None else self._paused_at
    self._news.set()

  def resume(self) -> None:
    """Chunks are made again."""
    with self._lock:
      if self._paused_at is not None:
        self._stood += time.monotonic() - self._paused_at
      self._paused_at = None
    self._news.set()

  def clock(self) -> float:
    """The session's clock, in seconds. It stands still while the session is paused, as the video does."""
    with self._lock:
      return (time.monotonic() if self._paused_at is None else self._paused_at) - self._stood

  def stop(self, reason: str = "stopped") -> None:
    """No further chunk is begun. The first reason counts, unless the server ends: then nothing is waited for."""
    with self._lock:
      self._stopped = reason if reason == CLOSED else self._stopped or reason
    self._news.set()

  def save(self) -> None:
    """What there is is saved before the next chunk, or at the end."""
    with self._lock:
      self._save_asked = True
    self._news.set()

  def attach(self, session: LiveSession | None) -> None:
    """The session has begun; None: it is over."""
    with self._lock:
      self._session = session

  @property
  def stopped(self) -> str | None:
    """Why no further chunk is begun, or None."""
    return self._stopped

  @property
  def paused(self) -> bool:
    """Whether no chunk is begun for now."""
    return self._paused_at is not None

  def take_save(self) -> bool:
    """Whether a save was asked for since this was called last."""
    with self._lock:
      asked, self._save_asked = self._save_asked, False
      return asked

  def take_decided(self) -> list[Asked]:
    """Prompts that were decided since this was called last."""
    with self._lock:
      decided = [asked for asked in self._asked if asked.receipt.status != "queued"]
      self._asked = [asked for asked in self._asked if asked not in decided]
      return decided

  def look(self) -> None:
    """What is told from now on ends the next `wait`."""
    self._news.clear()

  def wait(self, seconds: float) -> None:
    """Returns after `seconds`, or as soon as something is told."""
    self._news.wait(max(0.0, seconds))
