"""Videos that are finished chunk by chunk, in memory that does not grow with their length.

  traces of K beams ── wait until all beams share a chunk ── final chunk ── what keeps it
                                                                 └── parts of a minute ── video reward ── score

A chunk is final when all beams descend from it; the last chunks are final when the video has ended and the best beam is
known. The score of the whole video is the mean of its parts' scores, weighted by their frames. A part is a segment
under one prompt, or a minute of it where it is longer: no reward sees more frames at once, however long a video is.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Shaped

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig
from streamt1_jax.cost import Cost, total
from streamt1_jax.drivers import Given, Segment
from streamt1_jax.generator import Models
from streamt1_jax.state import ChunkTrace
from streamt1_jax.typing import HostArray, SearchParams


def shared_ancestor(survivors: Sequence[Int[HostArray, " K"]], beam_size: int) -> int | None:
  """The survivor of the first of these chunks that all beams descend from; None if later chunks decide.

  Args:
    survivors: per chunk, surviving candidates n = parent * B + i.
    beam_size: B.
  """
  ancestors = drivers.lineage(survivors, beam_size)[0]
  # Two survivors may be the same candidate.
  return int(ancestors[0]) if len(set(np.asarray(survivors[0])[ancestors].tolist())) == 1 else None


class Choice(NamedTuple):
  """Which chunk it is: its place among the survivors, its number among the candidates, and the seed of its noise."""

  beam: int
  candidate: int
  seed: int


class FinalChunk(NamedTuple):
  """A chunk of the finished video.

  Attributes:
    frames: decoded.
    latents: the chunk.
    choice: which it is; None for a chunk that was given.
  """

  frames: Shaped[np.ndarray, "Q ..."]
  latents: Float32[np.ndarray, "F C H W"]
  choice: Choice | None = None


class Scored(NamedTuple):
  """What the video reward gives the whole videos of all beams [K], and which is shown (`drivers.winner`)."""

  scores: Float32[np.ndarray, " K"]
  best: int


class Finishing:
  """One video on its way from traces to final chunks.

  With several processes all make the same calls: they judge together.
  """

  def __init__(
    self, params: SearchParams, models: Models, search: SearchConfig, take: Callable[[FinalChunk], None] | None
  ):
    """`take` receives the final chunks in order."""
    self._search, self._take = search, take or (lambda chunk: None)
    self._waiting: collections.deque[tuple[ChunkTrace, Segment]] = collections.deque()
    self._judge = _Judge(params, models, search)
    self._begins, self._chunks = set(), 0
    self._last: ChunkTrace | None = None
    self._has_given = False

  def give(self, given: Given, segment: Segment) -> None:
    """The chunks that the video begins with."""
    self._has_given = True
    for latents, frames in zip(*given, strict=True):
      self._judge.add(frames[None], segment)
      self._take(FinalChunk(frames, latents))

  def add(self, trace: ChunkTrace, segment: Segment) -> None:
    """The next chunk that was made, on the host, and the part of the video that it belongs to."""
    self._waiting.append((trace, segment))
    self._begins.add(segment.begin)
    self._chunks, self._last = self._chunks + 1, trace
    while self._waiting:
      beam = shared_ancestor([trace.survivor for trace, _ in self._waiting], self._search.beam_size)
      if beam is None:
        return
      trace, segment = self._waiting.popleft()
      # A copy: those of the other beams are no longer needed.
      self._judge.add(np.array(trace.frames[beam])[None], segment)
      self._take(_chosen(trace, beam, self._search))

  def end(self) -> Scored:
    """Judges the videos; `take` receives the last chunks of the best."""
    assert self._last is not None
    path = self._paths()
    alone = len(self._begins) == 1 and not self._has_given
    scores = drivers.known_scores(self._search, self._chunks, self._last) if alone else None
    if scores is None:
      for (trace, segment), beams in zip(self._waiting, path, strict=True):
        self._judge.add(np.asarray(trace.frames)[beams], segment)
      scores = self._judge.scores(len(self._last.survivor))
    best = drivers.winner(self._search, scores, self._last)
    for (trace, _), beams in zip(self._waiting, path, strict=True):
      self._take(_chosen(trace, int(beams[best]), self._search))
    self._waiting.clear()
    return Scored(scores, best)

  @property
  def cost(self) -> Cost:
    """What judging the videos has taken so far."""
    return self._judge.cost

  def _paths(self) -> list[Int[np.ndarray, " K"]]:
    """Which survivor of every chunk that waits each beam descends from."""
    survivors = [trace.survivor for trace, _ in self._waiting]
    return list(drivers.lineage(survivors, self._search.beam_size)) if survivors else []


def _chosen(trace: ChunkTrace, beam: int, search: SearchConfig) -> FinalChunk:
  candidate = int(trace.survivor[beam])
  seed = int(trace.candidates.seed[divmod(candidate, search.beam_size)])
  return FinalChunk(np.asarray(trace.frames[beam]), np.asarray(trace.latents[beam]), Choice(beam, candidate, seed))


class _Judge:
  """Scores videos part by part, and keeps the frames of one part."""

  def __init__(self, params: SearchParams, models: Models, search: SearchConfig):
    self._given = params, models, search
    self._segment: Segment | None = None
    self._frames: list[np.ndarray] = []
    self._scores: list[np.ndarray] = []
    self._lengths: list[int] = []
    self.cost = Cost()

  def add(self, frames: Shaped[np.ndarray, "videos Q ..."], segment: Segment) -> None:
    """A chunk: of one video where all beams share it, and else of every beam."""
    if self._segment is not None and (segment.begin != self._segment.begin or len(self._frames) == drivers.PART_CHUNKS):
      self._close()
    self._segment = segment
    self._frames.append(frames)

  def scores(self, videos: int) -> Float32[np.ndarray, " K"]:
    """The scores of the whole videos."""
    self._close()
    return drivers.mean_score([np.broadcast_to(score, videos) for score in self._scores], self._lengths)

  def _close(self) -> None:
    assert self._segment is not None
    videos, last = max(len(chunk) for chunk in self._frames), self._frames[-1].shape[1]
    whole = np.concatenate([np.broadcast_to(chunk, (videos, *chunk.shape[1:])) for chunk in self._frames], axis=1)
    self._scores.append(drivers.judged(*self._given, self._segment.condition, whole, last))
    self._lengths.append(whole.shape[1])
    self.cost = total([self.cost, Cost(video_calls=videos, video_frames=videos * whole.shape[1])])
    self._frames = []
