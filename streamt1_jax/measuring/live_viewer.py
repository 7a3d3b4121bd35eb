"""A scripted viewer of a live server: it starts a session, changes its prompt now and then, and notes when what comes.

Seconds are those of the viewer, from the moment that it asks to the moment that it has all of a chunk.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

QUANTILES = (0.5, 0.95, 0.99)


@dataclasses.dataclass
class Seen:
  """What a viewer has seen of one session.

  Attributes:
    first: seconds from the start to the first chunk.
    arrivals: when chunks came, in seconds from the start.
    media: seconds of video in each.
    making: seconds that the server took to make each.
    on_time: for each, whether the video did not have to stand still for it.
    switches: seconds from each prompt to its first frame, as a player shows it that stands still where a chunk is late.
    lag: the most chunks that waited until all beams shared an earlier one.
  """

  first: float = 0.0
  arrivals: list[float] = dataclasses.field(default_factory=list)
  media: list[float] = dataclasses.field(default_factory=list)
  making: list[float] = dataclasses.field(default_factory=list)
  on_time: list[bool] = dataclasses.field(default_factory=list)
  switches: list[float] = dataclasses.field(default_factory=list)
  lag: int = 0

  def report(self) -> dict[str, Any]:
    """Figures of the session, in seconds; None where there are too few chunks."""
    gaps = np.diff(self.arrivals)
    quantiles = dict.fromkeys(QUANTILES) if not len(gaps) else dict(zip(QUANTILES, np.quantile(gaps, QUANTILES)))
    return {
      "chunks": len(self.arrivals),
      "first_chunk": self.first,
      **{f"gap_p{round(100 * quantile)}": value for quantile, value in quantiles.items()},
      "real_time_factor": sum(self.making) / sum(self.media) if self.media else None,
      "on_time": sum(self.on_time) / len(self.on_time) if self.on_time else None,
      "switches": len(self.switches),
      "switch_median": float(np.median(self.switches)) if self.switches else None,
      "switch_worst": max(self.switches, default=None),
      "most_lag": self.lag,
    }


async def watch(
  address: str,
  search: str,
  prompts: Sequence[str],
  *,
  seconds: float,
  switch_every: float,
  least_switches: int = 0,
) -> Seen:
  """Plays one session.

  Args:
    address: of the server, as it prints it, without a token.
    search: name of the preset.
    prompts: are shown one after the other, and again from the first.
    seconds: how long it is watched after its first chunk.
    switch_every: seconds between two prompts; a prompt also waits for the one before.
    least_switches: it is watched longer, until at least this many prompts were seen.

  Raises:
    RuntimeError: the server refuses something, the session fails, or a prompt changes nothing.
  """
  seen, asked = Seen(), dict[str, float]()
  async with aiohttp.ClientSession() as web, web.ws_connect(f"{address}v1/realtime/video") as socket:
    began = time.monotonic()
    await socket.send_json({"type": "session.start", "prompt": prompts[0], "search": search})
    told, fps = dict[str, Any](), 1
    async for message in socket:
      now = time.monotonic() - began
      if message.type is aiohttp.WSMsgType.TEXT:
        told = json.loads(message.data)
        if told["type"] == "error":
          raise RuntimeError(told["message"])
        if told["type"] in ("session.interaction.unchanged", "session.interaction.failed"):
          # Its first frame would be waited for without an end.
          raise RuntimeError(told.get("reason", f"the prompt was in force already: {told['prompt']}"))
        if told["type"] == "session.done":
          return seen
        if told["type"] == "video.start":
          fps = told["config"]["fps"]
        continue
      _note(seen, told, fps, now, asked)
      switches = len(seen.switches)
      if now - seen.first >= seconds and switches >= least_switches:
        await socket.send_json({"type": "session.stop"})
      elif now - seen.first >= switch_every * (switches + 1) and len(asked) == switches:
        event_id = str(len(asked) + 1)
        asked[event_id] = now
        change = {"event_id": event_id, "event": {"prompt": prompts[len(asked) % len(prompts)]}}
        await socket.send_json({"type": "session.interaction", "interaction": change})
  raise RuntimeError("the server has closed the connection")


def _note(seen: Seen, told: dict[str, Any], fps: int, now: float, asked: dict[str, float]) -> None:
  """A chunk has come, after the event that describes it."""
  if not seen.arrivals:
    seen.first = now
  elif told["transport_chunk_index"] > 0:
    seen.making.append(told["making_seconds"])
    seen.media.append(told["num_frames"] / fps)
    seen.on_time.append(told["on_time"])
  seen.arrivals.append(now)
  seen.lag = max(seen.lag, told["lag"])
  shown = seen.first + told["begin"] + told["behind_seconds"]
  seen.switches += [shown - asked[event_id] for event_id in told["started_event_ids"]]
