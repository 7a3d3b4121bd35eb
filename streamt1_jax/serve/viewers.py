"""A viewer: a queue of what is yet to be sent to one connection, of bounded size.

A viewer who is slow loses candidate previews first. One who is slower still loses chunks of the video, and goes on with
the next one that there is room for: every chunk begins with a keyframe.
"""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import AsyncIterator
from typing import NamedTuple

from streamt1_jax.serve.numbers import Numbers
from streamt1_jax.serve.studio import Item

MOST = {"media": 6, "preview": 4, "news": 1000}
"""How much of each kind waits for one viewer. One who has more news is gone."""
_BUSY = 2
"""Chunks that wait for a viewer who gets no previews."""


class Frame(NamedTuple):
  """What is sent: a text frame, and the binary frame that follows it, or None."""

  text: str
  binary: bytes | None


class Viewer:
  """One connection. All of it runs in the thread of the event loop.

  Attributes:
    number: connections are counted from 1.
    lost: whether it is so far behind that it should be closed.
  """

  def __init__(self, number: int, numbers: Numbers):
    self.number, self.lost = number, False
    self._numbers = numbers
    self._queue: collections.deque[Item] = collections.deque()
    self._waiting: collections.Counter[str] = collections.Counter()
    self._skipped = 0
    self._news = asyncio.Event()
    self._has_init = self._closed = False

  @property
  def is_slow(self) -> bool:
    """Whether it holds back a session that it steers."""
    return self._waiting["media"] >= MOST["media"] - 1

  def put(self, item: Item) -> None:
    """Sends something, or leaves it out."""
    if self._closed:
      return
    busy = item.kind == "preview" and self._waiting["media"] >= _BUSY
    if busy or self._waiting[item.kind] >= MOST[item.kind]:
      _LEAVE_OUT[item.kind](self)
      return
    if item.fragment is not None and self._skipped:
      item = item._replace(event={**item.event, "skipped": self._skipped})
      self._skipped = 0
    self._waiting[item.kind] += 1
    self._queue.append(item)
    self._news.set()

  def leave_out_preview(self) -> None:
    """A preview is not sent."""
    self._numbers.count("previews_dropped_total")

  def leave_out_media(self) -> None:
    """A chunk is not sent; the next one says so."""
    self._numbers.count("fragments_skipped_total")
    self._skipped += 1

  def lose(self) -> None:
    """Without some news the rest makes no sense."""
    self.lost = True
    self._queue.clear()
    self.close()

  def close(self) -> None:
    """Nothing more is sent."""
    self._closed = True
    self._news.set()

  async def frames(self) -> AsyncIterator[Frame]:
    """What is to be sent, until the viewer is closed."""
    while True:
      while self._queue and not self.lost:
        item = self._queue.popleft()
        yield self._frame(item)
        self._waiting[item.kind] -= 1
      if self._closed:
        return
      self._news.clear()
      await self._news.wait()

  def _frame(self, item: Item) -> Frame:
    if item.event["type"] == "video.start":
      self._has_init = False
    if item.fragment is None:
      return Frame(json.dumps(item.event), None)
    # The first chunk that a viewer gets brings what a player must have read before any.
    binary = item.fragment.media if self._has_init else item.fragment.init + item.fragment.media
    event = {**item.event, "byte_length": len(binary), "has_init": not self._has_init}
    self._has_init = True
    return Frame(json.dumps(event), binary)


_LEAVE_OUT = {"media": Viewer.leave_out_media, "preview": Viewer.leave_out_preview, "news": Viewer.lose}
"""What there is no room for."""
