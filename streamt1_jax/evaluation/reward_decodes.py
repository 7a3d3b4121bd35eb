"""What `reward_decode` changes: chunks decided by rewards that see candidates decoded from scratch, and as a stream.

Both decide from the same beams and noises. The search goes on with the winners of `scratch`, the released way. What is
to be remembered depends on earlier scores of the lineage as well: each way has its own.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from streamt1_jax import reward_pruning
from streamt1_jax.config import SearchConfig
from streamt1_jax.evaluation import decisions
from streamt1_jax.io import markdown
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.state import ChunkTrace

WAYS = ("scratch", "streamed")

_SHARES = ("same_best", "same_survivors", "short_order", "long_order", "hybrid_order", "other_flags")
_COLUMNS = (
  "chunk", "decisions", "same best", "same survivors", "same order by the image reward", "by the video reward",
  "by both", "other routing flags",
)  # fmt: skip


def compare(pipeline: Pipeline, search: SearchConfig, chunks: int, caption: str, seed: int) -> dict[str, Any]:
  """Every chunk's decision both ways, as JSON values: {"caption", "seed", "chunks": [{way: decision}]}."""
  ways = [decisions.Way(pipeline.models, dataclasses.replace(search, reward_decode=way)) for way in WAYS]
  decided = decisions.decide_ways(pipeline, ways, chunks, caption, seed)
  return {
    "caption": caption,
    "seed": seed,
    "chunks": [dict(zip(WAYS, map(_decision, traces), strict=True)) for traces in decided],
  }


def _decision(trace: ChunkTrace) -> dict[str, list]:
  candidates = trace.candidates
  found = {
    "survivors": trace.survivor,
    "short": candidates.short,
    "long": candidates.long,
    "hybrid": candidates.hybrid,
  }
  return {name: np.asarray(values).ravel().tolist() for name, values in found.items()}


def flags(chunks: Iterable[Mapping[str, Any]], way: str, search: SearchConfig) -> Iterator[Bool[np.ndarray, "2 N"]]:
  """What becomes of every candidate when it leaves the window, by the scores of one way alone.

  Args:
    chunks: of a row from `compare`.
    way: whose scores count.
    search: the search.

  Yields:
    For every chunk bool [2, N]: the flags `ema` and `append` of all candidates.
  """
  empty = reward_pruning.empty_history(search)
  history = jax.tree.map(lambda x: np.stack([x] * search.top_k), empty)
  for chunk in chunks:
    scores = (np.asarray(chunk[way][name], np.float32) for name in ("short", "long"))
    found, history = _remember(*scores, history, np.asarray(chunk[WAYS[0]]["survivors"]), search)
    yield np.stack([np.asarray(flag).ravel() for flag in found])


@functools.partial(jax.jit, static_argnames="search")
def _remember(short, long, history, survivors, search):
  """Flags [K, B] of the candidates, and the histories of the beams after them."""
  by_beam = lambda scores: scores.reshape(search.top_k, search.beam_size)
  route = jax.vmap(lambda short, long, history: reward_pruning.route_flags(short, long, history, search), (0, 0, None))
  found = jax.vmap(route)(by_beam(short), by_beam(long), history)
  parents = jax.tree.map(lambda x: x[survivors // search.beam_size], history)
  return found, jax.vmap(reward_pruning.extend_history)(parents, short[survivors], long[survivors])


def summary(rows: Iterable[Mapping[str, Any]], search: SearchConfig) -> dict[str, dict[str, float]]:
  """Shares of decisions that agree, by place of the chunk in its video, counted from 1.

  The first chunk is decoded alike both ways. Behind the first sliding window, the window of `scratch` begins where no
  stream does.

  Args:
    rows: from `compare`.
    search: the search.

  Returns:
    By place: the number of `chunks`; the shares of them with the `same_best` candidate and the `same_survivors`, in any
    order; the shares of pairs of candidates in the same order by each score; and the share of candidates with
    `other_flags`.
  """
  window = search.sliding_window
  places = {"1": (0, 1), f"2 to {window}": (1, window), f"from {window + 1}": (window, None)}
  compared = [_agreements(row["chunks"], search) for row in rows]
  report = {}
  for name, (start, end) in places.items():
    found = [one for chunks in compared for one in chunks[start:end]]
    if found:
      means = {share: round(float(np.mean([one[share] for one in found])), 3) for share in _SHARES}
      report[name] = {"chunks": len(found), **means}
  return report


def _agreements(chunks: Sequence[Mapping[str, Any]], search: SearchConfig) -> list[dict[str, float]]:
  """Shares of one video, chunk by chunk."""
  both = zip(*(flags(chunks, way, search) for way in WAYS), strict=True)
  return [
    _agreement(*(chunk[way] for way in WAYS)) | {"other_flags": float(np.mean((a != b).any(axis=0)))}
    for chunk, (a, b) in zip(chunks, both, strict=True)
  ]


def _agreement(a: Mapping[str, Sequence], b: Mapping[str, Sequence]) -> dict[str, float]:
  order = lambda score: decisions.same_order(np.asarray(a[score]), np.asarray(b[score]))
  return {
    "same_best": a["survivors"][0] == b["survivors"][0],
    "same_survivors": set(a["survivors"]) == set(b["survivors"]),
    "short_order": order("short"),
    "long_order": order("long"),
    "hybrid_order": order("hybrid"),
  }


def table(report: Mapping[str, Mapping[str, float]]) -> str:
  """The report in Markdown."""
  cells = lambda row: [f"{row[share]:.2f}" for share in _SHARES]
  return markdown.table(_COLUMNS, ([place, str(row["chunks"]), *cells(row)] for place, row in report.items()))
