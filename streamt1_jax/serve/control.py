"""The handle of one session that somebody asked for: what it is told from outside, from any thread.

Everything takes effect between two chunks. Whoever is told to stop before it has begun never begins.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from streamt1_jax.config import ConfigError
from streamt1_jax.receipts import Receipt
from streamt1_jax.serve.protocol import Start
from streamt1_jax.session import Session


class Asked(NamedTuple):
  """A prompt that was asked for: the answer, what the client calls it, and when it came."""

  receipt: Receipt
  event_id: str | None
  at: float


class Control:
  """One session, from the moment it is asked for.

  Attributes:
    request: its name.
    start: what was asked for.
    at: when, in seconds of `time.monotonic`.
    saved: folder of the last save, or None.
  """

  def __init__(self, request: str, start: Start):
    self.request, self.start, self.at = request, start, time.monotonic()
    self.saved: str | None = None
    self._lock, self._news = threading.Lock(), threading.Event()
    self._session: Session | None = None
    self._paused = self._save_asked = False
    self._stopped: str | None = None
    self._asked: list[Asked] = []

  def switch(self, prompt: str, event_id: str | None = None) -> Receipt:
    """Asks for another prompt, which is read in the caller's thread.

    Raises ConfigError for a prompt that cannot be read, or before the session has begun.
    """
    at, session = time.monotonic(), self._session
    if session is None:
      raise ConfigError("the session has not begun, or it is over")
    receipt = session.switch(prompt)
    with self._lock:
      self._asked.append(Asked(receipt, event_id, at))
    return receipt

  def pause(self) -> None:
    """No further chunk is begun until `resume`."""
    with self._lock:
      self._paused = True
    self._news.set()

  def resume(self) -> None:
    """Chunks are made again."""
    with self._lock:
      self._paused = False
    self._news.set()

  def stop(self, reason: str = "stopped") -> None:
    """No further chunk is begun. The first reason counts."""
    with self._lock:
      self._stopped = self._stopped or reason
    self._news.set()

  def save(self) -> None:
    """What there is is saved before the next chunk, or at the end."""
    with self._lock:
      self._save_asked = True
    self._news.set()

  def attach(self, session: Session | None) -> None:
    """The session has begun; None: it is over."""
    self._session = session

  @property
  def stopped(self) -> str | None:
    """Why no further chunk is begun, or None."""
    return self._stopped

  @property
  def paused(self) -> bool:
    """Whether no chunk is begun for now."""
    return self._paused

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
    """Whoever is told something from now on ends the next `wait`."""
    self._news.clear()

  def wait(self, seconds: float) -> None:
    """Returns after `seconds`, or as soon as something is told."""
    self._news.wait(max(0.0, seconds))
