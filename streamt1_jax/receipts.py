"""What somebody who steers a video is answered: at once that it is queued, later what became of it."""

from __future__ import annotations

import threading
from typing import Literal

Status = Literal["queued", "applied", "superseded", "unchanged", "failed", "dropped"]


class Receipt:
  """The answer to one event of a session. Other threads may read it at any time.

  Attributes:
    prompt: the new prompt; None for a stop.
    number: events of a session count from 0, in order of arrival.
    status: "queued"; then "applied", "superseded" by a newer prompt, "unchanged" because the prompt was in force
      already, "failed" (the video goes on under the old prompt), or "dropped" because the session had ended.
    chunk: the chunk that it was applied before, or that it would have been; None while it is queued.
    superseded_by: the receipt of the newer prompt, or None.
    reason: why it failed or was dropped; empty otherwise.
  """

  def __init__(self, prompt: str | None, number: int):
    self.prompt, self.number = prompt, number
    self.status: Status = "queued"
    self.chunk: int | None = None
    self.superseded_by: Receipt | None = None
    self.reason = ""
    self._decided = threading.Event()

  def wait(self, timeout: float | None = None) -> bool:
    """Returns when it is no longer queued, or after `timeout` seconds; says whether it is not queued."""
    return self._decided.wait(timeout)

  def decide(
    self, status: Status, chunk: int | None, *, superseded_by: Receipt | None = None, reason: str = ""
  ) -> Receipt:
    """Called once, by the session."""
    self.chunk, self.superseded_by, self.reason = chunk, superseded_by, reason
    self.status = status
    self._decided.set()
    return self

  def __repr__(self) -> str:
    what = "stop" if self.prompt is None else f"switch to {self.prompt!r}"
    return f"Receipt({what}: {self.status}{'' if self.chunk is None else f', chunk {self.chunk}'})"
