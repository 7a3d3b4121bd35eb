"""How much a search could gain: pools of plain videos of one prompt, and what a perfect judge would pick of them.

A prompt is a timeline of captions; one caption is the shortest one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.config import SearchConfig
from streamt1_jax.data import closeness, verify_timeline, world
from streamt1_jax.data.world import Description
from streamt1_jax.evaluation.compare.statistics import interval
from streamt1_jax.io import markdown
from streamt1_jax.io.timeline import Entry, Timeline
from streamt1_jax.pipeline import Pipeline

PICKED = (4, 16)
"""How many videos a perfect judge picks the best from."""


class Prompt(NamedTuple):
  """What a video should show: descriptions, and the chunk with which each begins."""

  descriptions: list[Description]
  begins: list[int]


def prompts(split: str, count: int, segments: int, chunks: int, objects: int, seed: int) -> list[Prompt]:
  """`count` prompts of a split.

  Args:
    split: of all captions.
    count: how many.
    segments: captions of each, of equal length.
    chunks: of a video.
    objects: of a prompt with one caption; others begin with one or two.
    seed: draws them.
  """
  rng = np.random.default_rng(seed)
  begins = [round(chunks * number / segments) for number in range(segments)]
  if segments == 1:
    return [Prompt([world.parse(c)], begins) for c in world.held_out_captions(split, count, seed, objects)]
  return [Prompt(world.draw_timeline(rng, split, segments), begins) for _ in range(count)]


def plain_video(pipeline: Pipeline, prompt: Prompt, chunks: int, seed: int) -> UInt8[np.ndarray, "T 64 64 3"]:
  """Frames [T, 64, 64, 3] uint8 of plain streaming, with the recache that a session has."""
  texts = map(world.caption, prompt.descriptions)
  entries = (Entry(pipeline.clock.seconds(begin), text) for begin, text in zip(prompt.begins, texts, strict=True))
  search = SearchConfig.streaming(pipeline.config)
  session = pipeline.session(Timeline(tuple(entries)), search=search, seed=seed, num_chunks=chunks)
  return np.concatenate([chunk.frames for chunk in session])


def judge(frames: UInt8[np.ndarray, "T 64 64 3"], prompt: Prompt, first: int, later: int) -> dict[str, Any]:
  """What the verifiers say of a video, as JSON values; chunks have `first` and then `later` frames."""
  segments = verify_timeline.verify_timeline(frames, prompt.descriptions, prompt.begins, first, later)
  begins = [0 if begin == 0 else first + later * (begin - 1) for begin in prompt.begins]
  found = closeness.closeness(frames, prompt.descriptions, begins)
  return {
    "all_at_once": verify_timeline.all_hold(segments),
    "chunks_until": [segment.chunks_until for segment in segments],
    "failed": sorted({name for segment in segments for name, holds in segment.verdicts.items() if not holds}),
    "psnr": found.psnr,
    "color": found.color,
    "outline": found.outline,
  }


def pool(pipeline: Pipeline, prompt: Prompt, chunks: int, seeds: Sequence[int]) -> dict[str, Any]:
  """The verdicts of videos of one prompt, one for each seed, as JSON values."""
  clock = pipeline.clock
  videos = (plain_video(pipeline, prompt, chunks, seed) for seed in seeds)
  return {
    "captions": list(map(world.caption, prompt.descriptions)),
    "begins": prompt.begins,
    "seeds": list(seeds),
    "videos": [judge(frames, prompt, clock.first, clock.later) for frames in videos],
  }


def oracle(passed: int, videos: int, picked: int) -> float:
  """Probability that a draw of `picked` videos has one that passes, where `passed` of all `videos` pass."""
  return 1.0 - math.comb(videos - passed, picked) / math.comb(videos, picked)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """Mean, what a perfect judge picks, and the gain, each with its interval over prompts."""
  captions = ["; ".join(row["captions"]) for row in rows]
  counts = [(sum(video["all_at_once"] for video in row["videos"]), len(row["videos"])) for row in rows]
  mean = np.array([passed / videos for passed, videos in counts])
  result = {"mean": interval(mean, captions)}
  for picked in (number for number in PICKED if number <= min(videos for _, videos in counts)):
    best = np.array([oracle(*count, picked) for count in counts])
    result[f"oracle_of_{picked}"] = interval(best, captions)
    result[f"oracle_of_{picked} - mean"] = interval(best - mean, captions)
  return result


def table(result: Mapping[str, Mapping[str, float]]) -> str:
  """The summary in Markdown."""
  rows = ([name, f"{of['mean']:.2f} [{of['low']:.2f}, {of['high']:.2f}]"] for name, of in result.items())
  return markdown.table(["", "all at once"], rows)


def by_event(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """How often the captions of timelines hold, by what happens with them and how many objects they have.

  Returns:
    Cells: what happens (`world.kind_of_event`; "begins" for a first caption), objects, captions, share that holds.
  """
  held: dict[tuple[str, int], list[bool]] = {}
  for row in rows:
    descriptions = [world.parse(caption) for caption in row["captions"]]
    before = ["begins", *itertools.starmap(world.kind_of_event, itertools.pairwise(descriptions))]
    for video in row["videos"]:
      for event, description, until in zip(before, descriptions, video["chunks_until"], strict=True):
        held.setdefault((event, len(description.things)), []).append(until is not None)
  return [[event, str(things), str(len(of)), f"{np.mean(of):.2f}"] for (event, things), of in sorted(held.items())]


def failures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Share of all videos that fail each verdict."""
  videos = [video for row in rows for video in row["videos"]]
  names = sorted({name for video in videos for name in video["failed"]})
  return {name: round(float(np.mean([name in video["failed"] for video in videos])), 3) for name in names}
