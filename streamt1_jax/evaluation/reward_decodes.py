"""What `reward_decode` changes: chunks decided by rewards that see candidates decoded from scratch, and as a stream.

Both decide from the same beams and noises. The search goes on with the winners of `scratch`, the released way.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

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
    "ema": candidates.flags.ema,
    "append": candidates.flags.append,
  }
  return {name: np.asarray(values).ravel().tolist() for name, values in found.items()}


def summary(rows: Iterable[Mapping[str, Any]], window: int) -> dict[str, dict[str, float]]:
  """Shares of decisions that agree, by place of the chunk in its video, counted from 1.

  The first chunk is decoded alike both ways. From chunk `window` + 1 on, the window of `scratch` begins where no stream
  does.

  Args:
    rows: from `compare`.
    window: chunks of the sliding window.

  Returns:
    By place: the number of `chunks`; the shares of them with the `same_best` candidate and the `same_survivors`, in any
    order; the shares of pairs of candidates in the same order by each score; and the share of candidates with
    `other_flags`.
  """
  places = {"1": (0, 1), f"2 to {window}": (1, window), f"from {window + 1}": (window, None)}
  rows = list(rows)
  report = {}
  for name, (start, end) in places.items():
    found = [_agreement(*(chunk[way] for way in WAYS)) for row in rows for chunk in row["chunks"][start:end]]
    if found:
      means = {share: round(float(np.mean([one[share] for one in found])), 3) for share in _SHARES}
      report[name] = {"chunks": len(found), **means}
  return report


def _agreement(a: Mapping[str, Sequence], b: Mapping[str, Sequence]) -> dict[str, float]:
  order = lambda score: decisions.same_order(np.asarray(a[score]), np.asarray(b[score]))
  differs = (np.asarray(a["ema"]) != np.asarray(b["ema"])) | (np.asarray(a["append"]) != np.asarray(b["append"]))
  return {
    "same_best": a["survivors"][0] == b["survivors"][0],
    "same_survivors": set(a["survivors"]) == set(b["survivors"]),
    "short_order": order("short"),
    "long_order": order("long"),
    "hybrid_order": order("hybrid"),
    "other_flags": float(np.mean(differs)),
  }


def table(report: Mapping[str, Mapping[str, float]]) -> str:
  """The report in Markdown."""
  cells = lambda row: [f"{row[share]:.2f}" for share in _SHARES]
  return markdown.table(_COLUMNS, ([place, str(row["chunks"]), *cells(row)] for place, row in report.items()))
