"""Result folders of searches whose scores and pictures are drawn by a die: no model runs, but the real writer writes.

A candidate's picture is a bar as long as its number, so that a test can tell whose frames it sees.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from streamt1_jax.cli import results
from streamt1_jax.cli.growing_result import GrowingResult
from streamt1_jax.config import SearchConfig, preset
from streamt1_jax.drivers import lineage
from streamt1_jax.finishing import Choice, FinalChunk, Scored
from streamt1_jax.generator import Eviction
from streamt1_jax.io import manifest
from streamt1_jax.measuring.ledger import Ledger
from streamt1_jax.memory_sinking import APPEND, DISCARD, EMA, NOTHING
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.state import CandidateTrace, ChunkTrace
from streamt1_jax.trace import describe_video
from tests import toy_generator

FPS, CHUNK_FRAMES, FIRST, LATER = 16, 3, 9, 12
WINDOW = 3
"""Chunks in the window, the one that is made included."""
PROMPT = "a red circle moves left over a dark blue background"


@dataclasses.dataclass(frozen=True)
class Searched:
  """A search to be written.

  Attributes:
    chunks: that were made.
    search: its configuration.
    given: chunks that the video begins with.
    segments: first chunk and prompt of every segment.
    size: rows and columns of a frame.
    routes: what becomes of a chunk that leaves the window; the others are discarded.
    unusable: chunk and candidate that are NaN.
    fails: whether the search ends without a video.
    pictures: whether small frames are kept.
    losers: whether traces have frames of those that did not survive.
  """

  chunks: int = 6
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
  given: int = 0
  segments: Sequence[tuple[int, str]] = ((0, PROMPT),)
  size: tuple[int, int] = (16, 24)
  routes: Mapping[int, int] = dataclasses.field(default_factory=lambda: {2: EMA, 3: APPEND})
  unusable: Sequence[tuple[int, int]] = ()
  fails: bool = False
  pictures: bool = True
  losers: bool = True

  def write(self, folder: pathlib.Path) -> pathlib.Path:
    """Makes the folder and fills it as `streamt1 generate` does."""
    folder.mkdir(parents=True)
    traces = self.traces()
    with GrowingResult(
      epath.Path(folder),
      self.search,
      Ledger(toy_generator.MODELS, preset("tiny"), self.search, capacity=self._end, given_chunks=self.given),
      fps=FPS,
      # As if frames were large: they are not enlarged for the video, which would take most of a test's time.
      height=256,
      num_frames=FIRST + max(self._end - 1, 0) * LATER,
      num_latent_frames=max(self._end, 1) * CHUNK_FRAMES,
      given_chunks=self.given,
      model_sha256="0" * 64,
      pictures=self.pictures,
    ) as result:
      for trace in traces:
        result.add_trace(trace)
      head = {"image_rewards": {"quality": 1.0}, "video_rewards": {"coherence": 1.0}}
      head |= describe_video(self.search, self.given, self.segments)
      run: dict[str, Any] = {"settings": {"prompt": self.segments[0][1], **_plain(self.search)}}
      if self.fails:
        chunk = result.fail(head, RuntimeError("every candidate is NaN or Inf"))
        error = {"error": f"prompt {self.segments[0][1]!r}: every candidate is NaN or Inf", "chunk": chunk}
        manifest.write_json(folder / results.FAILURE, run | error)
        return folder
      for chunk in self._final_chunks(traces):
        result.add(chunk)
      scores = np.arange(self.search.top_k, 0, -1, np.float32)
      run |= result.finish(head, Scored(scores, 0), 7)
    run["wall_seconds"] = {"load": 1.5, "first_chunk": 4.0, "search": 12.25}
    manifest.write_json(folder / results.MANIFEST, run)
    return folder

  @property
  def _end(self) -> int:
    return self.given + self.chunks

  def traces(self) -> list[ChunkTrace]:
    """The chunks in order."""
    die = np.random.default_rng(0)
    return [self._trace(chunk, die) for chunk in range(self.given, self._end)]

  def _trace(self, chunk: int, die: np.random.Generator) -> ChunkTrace:
    shape = self.search.top_k, self.search.beam_size
    number = np.arange(self.search.num_candidates).reshape(shape)
    short, long = die.normal(size=(2, *shape)).astype(np.float32)
    usable = np.array([(chunk, each) not in self.unusable for each in number.ravel()]).reshape(shape)
    hybrid = np.where(usable, 0.4 * short + 0.6 * long, -np.inf)
    survivor = np.argsort(-hybrid, axis=None, kind="stable")[: self.search.top_k]
    leaving = chunk - WINDOW
    route = self.routes.get(leaving, DISCARD) if leaving >= 1 else NOTHING
    sink = max([0, *(kept for kept, way in self.routes.items() if way == APPEND and kept < leaving)])
    flags = Flags(np.full(shape, self.routes.get(chunk) == EMA), np.full(shape, self.routes.get(chunk) == APPEND))
    everywhere = lambda value: np.full(self.search.top_k, value, np.int32)
    return ChunkTrace(
      candidates=CandidateTrace(
        1000 * chunk + 100 * (number // shape[1]) + number % shape[1], short, long, hybrid, usable, flags
      ),
      eviction=Eviction(
        everywhere(route),
        everywhere(CHUNK_FRAMES * leaving if route != NOTHING else -1),
        everywhere(CHUNK_FRAMES * sink if route == EMA else -1),
      ),
      survivor=survivor.astype(np.int32),
      score=hybrid.ravel()[survivor],
      latents=np.zeros((self.search.top_k, CHUNK_FRAMES, 1, 1, 1), np.float32),
      frames=np.stack([self.frames_of(chunk, int(each)) for each in survivor]),
      steps=None,
      previews=self._previews(chunk) if self.losers else None,
    )

  def _previews(self, chunk: int) -> np.ndarray:
    frames = np.stack([self.frames_of(chunk, number)[:3] for number in range(self.search.num_candidates)])
    return frames.reshape(self.search.top_k, self.search.beam_size, *frames.shape[1:])

  def frames_of(self, chunk: int, number: int) -> np.ndarray:
    """Frames of a candidate, uint8 `[Q, H, W, 3]`: a bar that fills one part of the width for each number, from 1."""
    rows, columns = self.size
    frames = np.zeros((FIRST if chunk == 0 else LATER, rows, columns, 3), np.uint8)
    frames[:, :, : (number + 1) * columns // (self.search.num_candidates + 1)] = 255
    return frames

  def _final_chunks(self, traces: Sequence[ChunkTrace]) -> list[FinalChunk]:
    latents = np.zeros((CHUNK_FRAMES, 1, 1, 1), np.float32)
    given = [FinalChunk(self.frames_of(chunk, 0) // 2, latents) for chunk in range(self.given)]
    path = lineage([trace.survivor for trace in traces], self.search.beam_size)[:, 0]
    made = []
    for trace, beam in zip(traces, path.tolist(), strict=True):
      candidate = int(trace.survivor[beam])
      seed = int(trace.candidates.seed.ravel()[candidate])
      made.append(FinalChunk(trace.frames[beam], latents, Choice(beam, candidate, seed)))
    return given + made


def _plain(search: SearchConfig) -> dict[str, Any]:
  return {name: value for name, value in dataclasses.asdict(search).items() if name != "policy"}
