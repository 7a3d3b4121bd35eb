"""A search in plain numbers: what every candidate scored, what became of it, where the winner came from.

One tree for all searches: a chunk's candidates are its nodes, a node's parent is a survivor of the chunk before, and
`docs/trace.md` says what every field means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from streamt1_jax import memory_sinking
from streamt1_jax.config import SearchConfig
from streamt1_jax.cost import Cost
from streamt1_jax.policies import inside_event
from streamt1_jax.state import ChunkTrace

VERSION = 1
"""The version of the format of trace.json. It goes up when a field changes its meaning; new fields change nothing."""
ROUTE_NAMES = {
  memory_sinking.NOTHING: "nothing",
  memory_sinking.DISCARD: "discard",
  memory_sinking.EMA: "ema",
  memory_sinking.APPEND: "append",
  memory_sinking.APPEND_AT_MAXIMUM: "append_at_maximum",
}


def describe_video(
  search: SearchConfig, given_chunks: int, segments: Sequence[tuple[int, str]], method: str | None = None
) -> dict[str, Any]:
  """What a trace says of a video as a whole."""
  return {
    "version": VERSION,
    "method": method,
    "beam_size": search.beam_size,
    "top_k": search.top_k,
    "given_chunks": given_chunks,
    "segments": [{"chunk": chunk, "prompt": prompt} for chunk, prompt in segments],
  }


def describe_scores(scores: Float[np.ndarray, " K"], best: int) -> dict[str, Any]:
  """What a trace says of the finished videos, but for their lineage."""
  return {"scores": np.asarray(scores).tolist(), "best": best}


def describe_step(chunk: int, beam: int, candidate: int) -> dict[str, Any]:
  """What a trace says of one chunk of the lineage."""
  return {"chunk": chunk, "beam": beam, "candidate": candidate}


def describe_chunk(index: int, trace: ChunkTrace, search: SearchConfig, cost: Cost | None = None) -> dict[str, Any]:
  """What a trace says of chunk `index` of the video, which took `cost`.

  Candidates are numbered n = parent * beam_size + i. A candidate's `route` is what happened to the chunk that
  left its parent's window before it was drawn; its `flags` say how its own chunk will be routed then. Scores of
  candidates are None where nothing judges them.
  """
  trace = jax.device_get(trace._replace(latents=None, frames=None, steps=None, previews=None))
  evictions = [_describe_eviction(trace, parent) for parent in range(search.top_k)]
  survivors, judged = trace.survivor.tolist(), search.judges_chunk(index)
  drawn = range(0, search.num_candidates, 1 if index % search.judge_every == 0 else search.beam_size)
  if trace.rounds is not None:
    drawn = [number for number in drawn if number % search.beam_size < int(trace.rounds) * search.round_size]
  return {
    "chunk": index,
    "evictions": evictions,
    "candidates": [
      _describe_candidate(trace, candidate, search, evictions, survivors, judged=judged) for candidate in drawn
    ],
    "rejected": _describe_rejected(trace, search),
    "survivors": survivors,
    "scores": trace.score.tolist() if judged else [None] * search.top_k,
    "judged": judged,
    "rounds": None if trace.rounds is None else int(trace.rounds),
    "events": [*_describe_inside(trace, search), _describe_selection(trace, search, survivors)],
    "cost": None if cost is None else cost._asdict(),
  }


def _describe_inside(trace: ChunkTrace, search: SearchConfig) -> list[dict[str, Any]]:
  """The event inside of denoising, if there was one: which candidates every beam went on with."""
  event = inside_event(search)
  if trace.inside is None or event is None:
    return []
  ancestors = trace.inside.ancestor.tolist()
  unweighted = {"ess": None, "resampled": None}
  return [{"step": event.step, "ancestors": ancestors, "distinct_parents": len(ancestors), **unweighted}]


def _describe_rejected(trace: ChunkTrace, search: SearchConfig) -> list[dict[str, Any]]:
  """Candidates that were not finished."""
  inside, event = trace.inside, inside_event(search)
  if inside is None or event is None:
    return []
  return [
    {
      "parent": parent,
      "place": place,
      "seed": int(inside.seed[parent, place]),
      "preview": _finite(inside.preview[parent, place]),
      "fate": "rejected" if inside.usable[parent, place] else "unusable",
      "step": event.step,
    }
    for parent, place in np.ndindex(*inside.seed.shape)
    if place not in inside.ancestor[parent]
  ]


def _describe_selection(trace: ChunkTrace, search: SearchConfig, survivors: list[int]) -> dict[str, Any]:
  """The event at the end of a chunk: who goes on. Weights tell more of it, where the policy has some."""
  parents = {candidate // search.beam_size for candidate in survivors}
  event = {"step": "final", "ancestors": None, "distinct_parents": len(parents)}
  if trace.log_weight is None:
    return event | {"ess": None, "resampled": None}
  in_place = list(range(search.top_k)) if search.beam_size == 1 else None
  return event | {"ess": _effective_size(trace.log_weight), "resampled": survivors != in_place}


def _effective_size(log_weight: Any) -> float | None:
  """How many equal weights would be as uneven as these; None if all are zero."""
  log_weight = np.asarray(log_weight, np.float64).ravel()
  if not np.isfinite(log_weight.max()):
    return None
  weight = np.exp(log_weight - log_weight.max())
  return float(weight.sum() ** 2 / (weight**2).sum())


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
  preview = None if trace.inside is None else trace.inside.preview[parent, trace.inside.ancestor[parent, position]]
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
    "fate": _fate(bool(values.usable[parent, position]), survivors.count(candidate)),
    "copies": survivors.count(candidate),
    "log_weight": None if trace.log_weight is None else _finite(trace.log_weight[parent, position]),
    "preview": None if preview is None else _finite(preview),
    "ahead": None if trace.ahead is None else _finite(trace.ahead[parent, position]),
  }


def _fate(usable: bool, copies: int) -> str:
  """What became of a candidate that goes on in `copies` beams."""
  if not copies:
    return "pruned" if usable else "unusable"
  return "survived" if copies == 1 else "duplicated"


def _finite(value: Any) -> float | None:
  return float(value) if np.isfinite(value) else None
