"""A search in plain numbers: what every candidate scored, what became of it, where the winner came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from streamt1_jax import memory_sinking
from streamt1_jax.config import SearchConfig
from streamt1_jax.drivers import FinalBeams, lineage
from streamt1_jax.state import ChunkTrace

ROUTE_NAMES = {
  memory_sinking.NOTHING: "nothing",
  memory_sinking.DISCARD: "discard",
  memory_sinking.EMA: "ema",
  memory_sinking.APPEND: "append",
  memory_sinking.APPEND_AT_MAXIMUM: "append_at_maximum",
}


def describe_trace(
  traces: Sequence[ChunkTrace],
  beams: FinalBeams | None,
  search: SearchConfig,
  *,
  given_chunks: int = 0,
  segments: Sequence[tuple[int, str]] = (),
) -> dict[str, Any]:
  """Everything a search decided, for `manifest.write_json`.

  Candidates are numbered n = parent * beam_size + i. A candidate's `route` is what happened to the chunk that
  left its parent's window before it was drawn; its `flags` say how its own chunk will be routed then. Scores of
  candidates are None where nothing judges them.

  Args:
    traces: the chunks in order; a search that failed has fewer than the video.
    beams: the finished videos; None if the search failed.
    search: the configuration they were searched with.
    given_chunks: chunks that the video began with and that were not searched.
    segments: first chunk and prompt of every segment.

  Returns:
    `beam_size`, `top_k`; `given_chunks`; `segments` (`chunk`, `prompt`); `chunks`, each with `evictions` (per parent),
    `candidates`, `survivors` (candidates, best first) and their `scores`; and `final` (whole-video `scores`, `best`
    beam, its `lineage`: survivor and candidate of every chunk), None without `beams`.
  """
  final = None
  if beams is not None:
    survivors = [jax.device_get(trace.survivor) for trace in traces]
    path = lineage(survivors, search.beam_size)[:, beams.best].tolist()
    steps = enumerate(zip(path, survivors, strict=True), start=given_chunks)
    final = describe_scores(beams.scores, beams.best)
    final["lineage"] = [describe_step(chunk, beam, int(survivor[beam])) for chunk, (beam, survivor) in steps]
  return describe_video(search, given_chunks, segments) | {
    "chunks": [describe_chunk(index, trace, search) for index, trace in enumerate(traces, start=given_chunks)],
    "final": final,
  }


def describe_video(search: SearchConfig, given_chunks: int, segments: Sequence[tuple[int, str]]) -> dict[str, Any]:
  """What `describe_trace` says of a video as a whole."""
  return {
    "beam_size": search.beam_size,
    "top_k": search.top_k,
    "given_chunks": given_chunks,
    "segments": [{"chunk": chunk, "prompt": prompt} for chunk, prompt in segments],
  }


def describe_scores(scores: np.ndarray, best: int) -> dict[str, Any]:
  """What it says of the finished videos, but for their lineage."""
  return {"scores": np.asarray(scores).tolist(), "best": best}


def describe_step(chunk: int, beam: int, candidate: int) -> dict[str, Any]:
  """What it says of one chunk of the lineage."""
  return {"chunk": chunk, "beam": beam, "candidate": candidate}


def describe_chunk(index: int, trace: ChunkTrace, search: SearchConfig) -> dict[str, Any]:
  """What it says of chunk `index` of the video."""
  trace = jax.device_get(trace._replace(latents=None, frames=None, steps=None))
  evictions = [_describe_eviction(trace, parent) for parent in range(search.top_k)]
  survivors, judged = trace.survivor.tolist(), search.judges_chunk(index)
  drawn = range(0, search.num_candidates, 1 if index % search.judge_every == 0 else search.beam_size)
  return {
    "chunk": index,
    "evictions": evictions,
    "candidates": [
      _describe_candidate(trace, candidate, search, evictions, survivors, judged=judged) for candidate in drawn
    ],
    "survivors": survivors,
    "scores": trace.score.tolist() if judged else [None] * search.top_k,
  }


def _describe_eviction(trace: ChunkTrace, parent: int) -> dict[str, Any]:
  frame, sink_frame = int(trace.eviction.frame[parent]), int(trace.eviction.sink_frame[parent])
  return {
    "parent": parent,
    "route": ROUTE_NAMES[int(trace.eviction.route[parent])],
    "frame": None if frame < 0 else frame,
    "sink_frame": None if sink_frame < 0 else sink_frame,
  }


def _describe_candidate(
  trace: ChunkTrace, candidate: int, search: SearchConfig, evictions: list[dict], survivors: list[int], *, judged: bool
) -> dict[str, Any]:
  parent, position = divmod(candidate, search.beam_size)
  values = trace.candidates
  score = lambda scores: float(scores[parent, position]) if judged else None
  return {
    "candidate": candidate,
    "parent": parent,
    "seed": int(values.seed[parent, position]),
    "short": score(values.short),
    "long": score(values.long),
    "hybrid": score(values.hybrid),
    "route": evictions[parent]["route"],
    "flags": {
      "ema": bool(values.flags.ema[parent, position]),
      "append": bool(values.flags.append[parent, position]),
    },
    "usable": bool(values.usable[parent, position]),
    "survivor": candidate in survivors,
    "rank": survivors.index(candidate) if candidate in survivors else None,
  }
