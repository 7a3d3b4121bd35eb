"""The account of one video while it is made: what every chunk cost, and what its beams could see."""

from __future__ import annotations

import collections
import copy
from typing import Any

import jax
import numpy as np

from streamt1_jax import cost, memory_sinking
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.cost import Cost
from streamt1_jax.generator import Models
from streamt1_jax.measuring import search_flop
from streamt1_jax.measuring.search_flop import Flop, Prices
from streamt1_jax.methods.tries import Try
from streamt1_jax.state import ChunkTrace

_LEAVES_NO_SLOT = (memory_sinking.NOTHING, memory_sinking.APPEND)


class Ledger:
  """Counts chunks as their traces come."""

  def __init__(
    self,
    models: Models,
    model: ModelConfig,
    search: SearchConfig,
    *,
    capacity: int | None,
    length: int | None = None,
    given_chunks: int = 0,
    short_frames: int | None = None,
  ):
    """Has counted nothing yet.

    Args:
      models: static half of the chunk step.
      model: sizes.
      search: how the video is searched.
      capacity: chunks that the windows of the state are made for, as in `init_state`.
      length: what the search takes for the video's length, as `Condition.num_chunks`; `capacity` by default.
      given_chunks: chunks that the video begins with.
      short_frames: frames of a chunk that the image reward sees; all by default.
    """
    self._models, self._model, self._search = models, model, search
    self._capacity, self._given, self._length = capacity, given_chunks, length or capacity
    self._options: dict[str, Any] = {"short_frames": short_frames, "length": self._length}
    # Chunks that have left every beam's memory.
    self._gone = np.full(search.top_k, max(0, given_chunks - search_flop.most_seen(model) - 1))
    # A video may run for days: chunks of one cost are counted together. Beside it, streams that its decodes began.
    self._chunks: collections.Counter[tuple[Cost, int]] = collections.Counter()
    # Chunks that all forwards saw, their own included.
    self._seen = 0.0
    # Work that is not in the video: its cost, streams begun, and chunks that a forward saw.
    self._tried: collections.Counter[tuple[Cost, int, int]] = collections.Counter()
    self.tries: list[Try] = []

  def copy(self) -> Ledger:
    """One that has counted the same, and does not see what comes later."""
    made = copy.copy(self)
    made._chunks, made._tried, made.tries = self._chunks.copy(), self._tried.copy(), [*self.tries]
    return made

  @property
  def num_chunks(self) -> int:
    """Chunks so far."""
    return self._chunks.total()

  def add(self, trace: ChunkTrace) -> Cost:
    """The cost of the next chunk that was made; `trace` is what it left behind."""
    index = self._given + self.num_chunks
    route, survivor, rounds = jax.device_get((trace.eviction.route, trace.survivor, trace.rounds))
    self._gone = self._gone + ~np.isin(route, _LEAVES_NO_SLOT)
    parents = np.asarray(survivor) // self._search.beam_size
    seen, self._gone = index + 1 - self._gone, self._gone[parents]
    rounds = None if rounds is None else int(rounds)
    found = cost.chunk_cost(self._models, self._search, index, self._capacity, **self._options, rounds=rounds)
    # All beams draw equally many candidates, and a survivor's clean pass sees what its parent saw.
    self._seen += (found.denoise + found.look_ahead) * seen.mean() + found.commit * seen[parents].mean()
    self._chunks[found, self._begun(index, rounds)] += 1
    return found

  def add_try(self, tried: Try) -> None:
    """Counts what a driver tried on the host: chunks that are not in the video, and what judging them took."""
    self.tries.append(tried)
    for index in () if tried.kept else range(tried.begin, tried.begin + tried.chunks):
      found = cost.chunk_cost(self._models, self._search, index, self._capacity, **self._options)
      seen = min(index, search_flop.most_seen(self._model)) + 1
      self._tried[found, self._begun(index), seen] += 1
    if tried.judged_frames:
      self._tried[Cost(video_calls=1, video_frames=tried.judged_frames), 0, 1] += 1

  def _begun(self, index: int, rounds: int | None = None) -> int:
    return cost.streams_begun(self._models, self._search, index, self._length, rounds)

  @property
  def cost(self) -> Cost:
    """The cost of all chunks and tries so far."""
    return cost.total([*(found for found, _ in self._chunks.elements()), *(each[0] for each in self._tried.elements())])

  def flop(self, prices: Prices) -> Flop:
    """The FLOP of all chunks and tries so far."""
    seen = self._seen / max(sum(found.forwards for found, _ in self._chunks.elements()), 1)
    chunks = [prices.of(found, begun, seen) for found, begun in self._chunks.elements()]
    return search_flop.add([*chunks, *(prices.of(*each) for each in self._tried.elements())])

  def describe(self, prices: Prices, whole_video: Cost, search_seconds: float) -> dict[str, Any]:
    """What the manifest says, as JSON values.

    Args:
      prices: of the model and its rewards.
      whole_video: what judging the finished videos cost.
      search_seconds: what the search took on the clock of the wall, as far as that is known.
    """
    flop = search_flop.add([self.flop(prices), prices.of(whole_video)])
    counted = cost.total([self.cost, whole_video])
    plain = search_flop.plain_flop(prices, self.num_chunks, self._given)
    return {
      **counted._asdict(),
      "forwards": counted.forwards,
      "search_seconds": search_seconds,
      "tflop": {**{name: value / 1e12 for name, value in flop._asdict().items()}, "total": flop.tflop},
      "plain_tflop": plain.tflop,
      "times_plain": flop.tflop / plain.tflop,
      "uncounted_rewards": list(prices.uncounted),
    }


def sentence(described: dict[str, Any], since_chunk: int = 0) -> str:
  """One line of what `Ledger.describe` gave; the seconds are of the chunks from `since_chunk` on."""
  count = lambda name: f"{described[name]:,}"
  return (
    f"cost: {count('forwards')} forwards, {count('decoded')} latent frames decoded"
    + (f" and {count('previewed')} previewed" if described["previewed"] else "")
    + f", {count('image_calls')} image reward calls on {count('image_frames')} frames, {count('video_calls')} video "
    f"reward calls on {count('video_frames')}; {described['tflop']['total']:.4g} TFLOP, "
    f"{described['times_plain']:.2f} times plain streaming ({described['plain_tflop']:.4g}); "
    f"{described['search_seconds']:,.1f} s of search" + (f" from chunk {since_chunk} on" if since_chunk else "")
  )
