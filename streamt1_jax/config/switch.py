"""What happens to the memory when the prompt of a video changes."""

import dataclasses
from typing import Literal

from streamt1_jax.config.base import require, require_choices
from streamt1_jax.config.search import SearchConfig


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
  """A change of prompt between two chunks. Sources: docs/reference/interactive.md.

  Attributes:
    recache: how keys and values of the window are computed under the new prompt. "released": in one forward, in which
      every chunk sees all others (LongLive 1.0 as it runs); "causal": chunk by chunk, oldest first (what its unused
      mask describes); "none": not at all, only the text changes (its ablation).
    sinks: what becomes of the sinks. "keep": they stay, averages and all, but are rewritten while no chunk has left
      the window (LongLive 1.0 with `global_sink: true`); "recache": computed anew from the latents that they began
      with, which drops averages; "first": those that were appended are forgotten; "move": all are forgotten, and the
      chunk that left the window last becomes the sink (LongLive 1.0 with `global_sink: false`), which takes a recache:
      its keys are gone.
    video: what the video reward reads under the new prompt. "whole": the whole window, so that the seam is judged;
      "since": the chunks made since the switch, in a search that decodes as a stream.
  """

  recache: Literal["released", "causal", "none"] = "released"
  sinks: Literal["keep", "recache", "first", "move"] = "keep"
  video: Literal["whole", "since"] = "whole"

  def __post_init__(self):
    require_choices(self)
    require(
      self.sinks != "move" or self.recache != "none",
      "switch sinks 'move' makes a sink of a chunk whose keys are gone: recache must compute them, got 'none'",
    )

  def validate_for(self, search: SearchConfig) -> None:
    """Raises ConfigError unless `search` can switch like this."""
    require(
      self.video != "since" or search.reward_decode == "streamed",
      "switch video 'since' needs reward_decode 'streamed': a window that is decoded from scratch is always whole",
    )
