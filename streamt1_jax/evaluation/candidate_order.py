"""Does the score put the candidates of a chunk in the right order? What decides what a search is worth.

  one beam ── N candidates of the next chunk ──┬─ scores
                                               └─ closeness to the nearest ideal clip, with what came before
  the first candidate goes on, as in plain streaming

No reward, and nothing that trains one, may import this: the closeness comes from the verifiers' side.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig
from streamt1_jax.data import closeness, sight, verify, world
from streamt1_jax.evaluation.compare.statistics import interval
from streamt1_jax.io import markdown
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.policies import KeepBeams
from streamt1_jax.state import SearchState

SCORES = ("short", "long", "hybrid")
"""What candidates may be ordered by."""
GAPS = (0.25, 0.5, 1.0, 2.0)
"""dB; pairs of candidates whose PSNR differs by at least so much are counted."""
_SEEN_CHUNKS = 3
"""Chunks before the candidate that the closeness is fitted to."""


def candidates_search(model: Any, candidates: int) -> SearchConfig:
  """Judges `candidates` beams of one candidate each; all of them go on."""
  plain = SearchConfig.streaming(model)
  return dataclasses.replace(plain, top_k=candidates, judges=True, policy=KeepBeams())


def judge_candidates(pipeline: Pipeline, candidates: int, chunks: int, caption: str, seed: int) -> dict[str, Any]:
  """Scores and closeness of the candidates of every chunk of one video, as JSON values.

  Args:
    pipeline: the model, with the rewards that are asked.
    candidates: how many per chunk.
    chunks: of the video.
    caption: of the shapes world.
    seed: base seed.
  """
  search = candidates_search(pipeline.config, candidates)
  description, condition = world.parse(caption), pipeline.condition(caption, chunks)
  state = drivers.jitted_init_state(pipeline.params, np.int32(seed), pipeline.models, search, chunks)
  past: list[np.ndarray] = []
  rows = []
  for chunk in range(chunks):
    state, trace = drivers.jitted_chunk_step(
      pipeline.params, state, condition, pipeline.models, search, first=chunk == 0
    )
    drivers.check_usable(trace, chunk, seed)
    frames = np.asarray(trace.frames)
    scores = {name: np.asarray(getattr(trace.candidates, name)).ravel().tolist() for name in SCORES}
    rows.append({"chunk": chunk, **scores, **_closeness(past, frames, description)})
    past = [*past, frames[0]][-_SEEN_CHUNKS:]
    state = _all_as_the_first(state)
  return {"caption": caption, "seed": seed, "chunks": rows}


def _closeness(past: list[np.ndarray], frames: np.ndarray, description: world.Description) -> dict[str, list[Any]]:
  """PSNR of every candidate's own frames, and the verdicts that it fails, where the fit has seen what came before."""
  psnr, failed = [], []
  for chunk in frames:
    video = np.concatenate([*past, chunk])
    ideal = closeness.closeness(video, [description], [0]).ideal
    target = closeness.drawn(ideal)[-len(chunk) :]
    error = np.square(target - sight.checked(chunk)).mean()
    psnr.append(float(10.0 * np.log10(255.0**2 / max(error, 1e-6))))
    failed.append([name for name, holds in verify.verify(video, description).items() if not holds])
  return {"psnr": psnr, "failed": failed}


@jax.jit
def _all_as_the_first(state: SearchState) -> SearchState:
  """The state in which every beam is the first one."""
  same = lambda x: jnp.broadcast_to(x[:1], x.shape)
  return state._replace(beams=jax.tree.map(same, state.beams))


def is_row(row: Mapping[str, Any]) -> bool:
  """Whether `row`, a JSON object, is what `judge_candidates` returned."""
  chunks = row.get("chunks")
  has_all = lambda chunk: isinstance(chunk, dict) and {*SCORES, "psnr", "failed"} <= set(chunk)
  return isinstance(row.get("caption"), str) and isinstance(chunks, list) and all(map(has_all, chunks))


def pairs(chunk: Mapping[str, Any], score: str, gap: float) -> list[tuple[bool, frozenset[str]]]:
  """For every pair whose PSNR differs by at least `gap` dB: whether the score ranks it as PSNR does, and the verdicts
  that exactly one of both fails."""
  found = []
  for a, b in itertools.combinations(range(len(chunk["psnr"])), 2):
    difference = chunk["psnr"][a] - chunk["psnr"][b]
    if abs(difference) >= gap:
      right = (chunk[score][a] - chunk[score][b]) * difference > 0
      found.append((right, frozenset(chunk["failed"][a]) ^ frozenset(chunk["failed"][b])))
  return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """By score and gap: pairs, the share in the right order with its interval over captions, the same by verdict.

  A verdict's share is of the pairs that only one of both candidates fails.
  """
  result = {}
  for score, gap in itertools.product(SCORES, GAPS):
    found = [(row["caption"], pair) for row in rows for chunk in row["chunks"] for pair in pairs(chunk, score, gap)]
    if not found:
      continue
    captions = [caption for caption, _ in found]
    right = np.array([pair[0] for _, pair in found], float)
    by_verdict = {
      name: _share(pair[0] for _, pair in found if name in pair[1])
      for name in sorted({name for _, pair in found for name in pair[1]})
    }
    result[f"{score}, {gap} dB"] = {
      "pairs": len(found), **interval(right, captions), "by_verdict": by_verdict
    }  # fmt: skip
  return result


def _share(values: Iterable[bool]) -> dict[str, float | int]:
  found = list(values)
  return {"pairs": len(found), "right": round(float(np.mean(found)), 3)}


def table(result: Mapping[str, Mapping[str, Any]]) -> str:
  """The summary in Markdown."""
  cells = lambda of: [str(of["pairs"]), f"{of['mean']:.2f} [{of['low']:.2f}, {of['high']:.2f}]"]
  return markdown.table(
    ["score, gap", "pairs", "in the right order"], ([name, *cells(of)] for name, of in result.items())
  )
