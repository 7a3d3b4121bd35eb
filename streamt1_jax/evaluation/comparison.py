"""Does the search choose well? Videos of one caption made in several ways, and what verifiers say of many captions."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from streamt1_jax.config import SearchConfig
from streamt1_jax.data import verify, world
from streamt1_jax.io import markdown
from streamt1_jax.pipeline import Pipeline, Video

METHODS = ("plain", "best_of_n", "search", "oracle_of_n")
DIFFERENCES = (("search", "plain"), ("search", "best_of_n"), ("best_of_n", "plain"))

_RESAMPLES = 10_000


def plain_seeds(seed: int, search: SearchConfig) -> list[int]:
  """Seeds of the N plain videos: those of the candidates of the search's first chunk."""
  return list(range(seed, seed + search.num_candidates))


def compare(pipeline: Pipeline, search: SearchConfig, chunks: int, caption: str, seed: int) -> dict[str, Any]:
  """Verdicts of every method, and the scores of the video reward, of one caption, as JSON values.

  A score that is not finite is None.
  """
  description = world.parse(caption)
  frames = chunks * pipeline.config.chunk_frames
  generate = lambda how, seed: pipeline.generate(caption, num_latent_frames=frames, search=how, seed=seed)
  streaming = SearchConfig.streaming(pipeline.config)
  plain: list[Video] = [generate(streaming, plain_seed) for plain_seed in plain_seeds(seed, search)]
  searched = generate(search, seed)
  scores = [video.score for video in plain]
  best = int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))
  verdicts = [verify.verify(video.frames, description) for video in plain]
  finite = lambda score: score if math.isfinite(score) else None
  return {
    "caption": caption,
    "seed": seed,
    "plain_scores": [finite(score) for score in scores],
    "search_score": finite(searched.score),
    "verdicts": {
      "plain": verdicts[0],
      "best_of_n": verdicts[best],
      "search": verify.verify(searched.frames, description),
      "oracle_of_n": {name: any(verdict[name] for verdict in verdicts) for name in verify.VERDICTS},
    },
  }


def is_row(row: Mapping[str, Any]) -> bool:
  """Whether `row`, a JSON object, has what `summary` reads of what `compare` returned."""
  verdicts = row.get("verdicts")
  has_all = lambda of: isinstance(of, dict) and all(type(of.get(name)) is bool for name in verify.VERDICTS)
  return (
    isinstance(row.get("caption"), str)
    and isinstance(verdicts, dict)
    and all(has_all(verdicts.get(method)) for method in METHODS)
  )


def interval(values: np.ndarray, captions: Sequence[Hashable] | np.ndarray, seed: int = 0) -> dict[str, float]:
  """Mean of [prompts] values and its 95 % percentile bootstrap interval.

  The bootstrap draws different captions, each with all of its prompts, since those are not independent. Where all
  values are the same it has no width; the usual bound after n equal verdicts is 3 / n.
  """
  _, which = np.unique(np.asarray(captions), return_inverse=True)
  sums, counts = np.bincount(which, values), np.bincount(which)
  drawn = np.random.default_rng(seed).integers(0, len(sums), (_RESAMPLES, len(sums)))
  low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
  return {name: round(float(x), 3) for name, x in (("mean", values.mean()), ("low", low), ("high", high))}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
  """Mean and interval, by method or difference and then by verdict."""
  captions = [row["caption"] for row in rows]
  values = {
    method: {name: np.array([row["verdicts"][method][name] for row in rows], float) for name in verify.VERDICTS}
    for method in METHODS
  }
  result = {method: {name: interval(found, captions) for name, found in of.items()} for method, of in values.items()}
  for first, second in DIFFERENCES:
    paired = {name: values[first][name] - values[second][name] for name in verify.VERDICTS}
    result[f"{first} - {second}"] = {name: interval(found, captions) for name, found in paired.items()}
  return result


def table(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """The summary in Markdown."""
  cell = lambda x: f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"
  rows = ([name, *(cell(of[verdict]) for verdict in verify.VERDICTS)] for name, of in result.items())
  return markdown.table(["", *verify.VERDICTS], rows)
