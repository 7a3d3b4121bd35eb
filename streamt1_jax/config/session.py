"""A video that is steered while it is made."""

from __future__ import annotations

import dataclasses
from typing import Literal

from streamt1_jax.config.base import require
from streamt1_jax.config.search import SearchConfig
from streamt1_jax.config.switch import SwitchConfig

SINK_DISTANCE = 90
"""Latent frames, in a video without an end: below 132, the first distance at which LongLive falls back to its sink."""


MAX_HORIZON = 2**20
"""Chunks, more than a week of video."""


@dataclasses.dataclass(frozen=True)
class SessionConfig:
  """What decides a session, beside the model and what it is told.

  Attributes:
    search: how to search. By default one beam with four candidates: no chunk then waits for later ones.
    seed: base seed, int32.
    switch: how prompts change.
    num_chunks: chunks to make, beside those that are given; None for a video without an end.
    horizon: chunks over which the weight of the image reward grows in a video without an end, 30 s of Wan's.
    emit: when a chunk is shown. "settled": when all beams share it; "commit": at once, and all beams go on from the
      best. With one beam both are the same.
  """

  search: SearchConfig = SearchConfig(beam_size=4, top_k=1)
  seed: int = 0
  switch: SwitchConfig = SwitchConfig()
  num_chunks: int | None = None
  horizon: int = 40
  emit: Literal["settled", "commit"] = "settled"

  def __post_init__(self):
    require(self.emit in ("settled", "commit"), f"emit must be 'settled' or 'commit', got {self.emit!r}")
    require(-(2**31) <= self.seed < 2**31, f"seed must be a whole number of 32 bits, got {self.seed}")
    require(1 <= self.horizon <= MAX_HORIZON, f"horizon must be in 1..{MAX_HORIZON} chunks, got {self.horizon}")
    require(self.num_chunks is None or self.num_chunks >= 1, f"num_chunks must be at least 1, got {self.num_chunks}")

  def end(self, given: int) -> int | None:
    """Chunks of a video that begins with `given` chunks; None if it has no end."""
    return None if self.num_chunks is None else given + self.num_chunks

  def length(self, given: int) -> int:
    """What the search takes for the video's length: `end`, or `horizon`."""
    return self.end(given) or self.horizon

  def capacity(self, given: int) -> int:
    """Chunks that the windows of the state are made for: of a video without an end, all that a window may have."""
    return self.end(given) or max(self.horizon, self.search.sliding_window)
