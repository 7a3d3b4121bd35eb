"""When the next chunk is begun: not long before it is needed, so that a new prompt is felt soon."""

from __future__ import annotations

from collections.abc import Callable


class Pace:
  """The clock of a viewer who plays the video as it comes, and has it stand still when a chunk is late."""

  def __init__(self, lead: float, clock: Callable[[], float]):
    """Nothing was made.

    Args:
      lead: seconds of video that may be ready before the viewer needs them.
      clock: seconds that pass, but for those in which the viewer has stopped the video.
    """
    self._lead, self._clock = lead, clock
    self._began: float | None = None
    self._made = 0.0
    self.stood_still = 0.0

  def add(self, seconds: float) -> bool:
    """`seconds` more of video are ready. Returns whether they came in time; the first always do."""
    now = self._clock()
    if self._began is None:
      self._began = now
      self._made = seconds
      return True
    late = now - self._began - self._made
    if late > 0:
      self._began += late
      self.stood_still += late
    self._made += seconds
    return late <= 0

  @property
  def ahead(self) -> float:
    """Seconds of video that are ready and not played; 0 or less if the viewer waits."""
    if self._began is None:
      return 0.0
    return self._made - (self._clock() - self._began)

  @property
  def wait(self) -> float:
    """Seconds until the next chunk is to be begun; 0 or less if it is time."""
    return self.ahead - self._lead
