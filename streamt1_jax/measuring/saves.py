"""What saving a search costs: seconds with and without saves, and bytes by shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from etils import epath

from streamt1_jax.config import SearchConfig, preset
from streamt1_jax.execution import Execution
from streamt1_jax.io import paths
from streamt1_jax.models import abstract_params, make_models
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards.table import DEFAULT_REWARDS, REWARDS
from streamt1_jax.saved_search import SavedSearch
from streamt1_jax.state import Condition, init_state

COMPILING = 2
"""First chunks of a search, which compile and are not timed."""
PRESETS = {"tiny": jnp.float32, "wan_1_3b": jnp.bfloat16}
"""Models whose bytes are counted, with the dtype of their states."""


def state_bytes(name: str) -> dict[str, int]:
  """Bytes of weights, of a state and of a later chunk's trace, by shapes.

  The search has 2 beams of 2 candidates. All sinks are allocated, but in `memory_without_added_sinks`.
  """
  model, search = preset(name), SearchConfig.released()
  image, video = (cast(Any, REWARDS[name].make(None, model.fps)) for name in DEFAULT_REWARDS)
  models = make_models(model, image, video, execution=Execution(decoding="in_turn"))
  params = abstract_params(model, PRESETS[name])
  init = lambda search: jax.eval_shape(lambda params: init_state(params, models, search, 0), params)
  state, alone = init(search), init(dataclasses.replace(search, max_sink_frames=model.sink_frames))
  count = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  codec = models.codec
  frames = codec.num_frames(model.chunk_frames, first=False) * math.prod(codec.frame_shape())
  trace = search.top_k * (frames * jnp.dtype(codec.frame_dtype()).itemsize + 4 * math.prod(model.latent_shape))
  beams = state.beams
  return {
    **{f"{part}_weights": count(weights) for part, weights in params.items()},
    "state": count(state),
    "memory": count(beams.memory),
    "memory_without_added_sinks": count(alone.beams.memory),
    "past_frames": count(beams.past),
    "decoder": count(beams.codec),
    "trace_of_a_chunk": trace,
  }


def search_once(
  pipeline: Pipeline, condition: Condition, num_chunks: int, every: int, folder: epath.Path | None
) -> Iterator[tuple[float, float]]:
  """Searches a video, saved every `every` chunks in `folder`, or never where that is None.

  Yields:
    Seconds and CPU seconds of each chunk after those that compile, with what is left to write after the last.
  """
  traces: list[Any] = []
  states = pipeline.stream_states([condition], SearchConfig.released(), num_chunks=num_chunks, seeds=[0])
  with SavedSearch(folder, {}) if folder else contextlib.nullcontext() as saved:
    for index in range(num_chunks):
      began = _now()
      state, (trace,) = next(states)
      traces.append(trace)
      if saved and (index + 1) % every == 0:
        saved.save(state, [traces])
        traces.clear()
      if saved and index == num_chunks - 1:
        saved.wait()
      if index >= COMPILING:
        yield _passed(began)


def time_saves(pipeline: Pipeline, condition: Condition, num_chunks: int, every: int) -> dict[str, Any]:
  """Seconds and CPU seconds of a save and of its copy, medians, with nothing beside; and the bytes of the last one."""
  times, written = [], 0
  states = pipeline.stream_states([condition], SearchConfig.released(), num_chunks=num_chunks, seeds=[0])
  traces: list[Any] = []
  with tempfile.TemporaryDirectory() as folder, SavedSearch(folder, {}) as saved:
    for index, (state, (trace,)) in enumerate(states):
      traces.append(trace)
      if (index + 1) % every == 0:
        began = _now()
        saved.save(state, [traces])
        traces.clear()
        copied = _passed(began)
        saved.wait()
        times.append((*copied, *_passed(began)))
    written = sum(path.stat().length for path in paths.files_below(saved.folder / f"{saved.saved:06}"))
  copy, copy_cpu, save, save_cpu = (statistics.median(each) for each in zip(*times, strict=True))
  return {
    "copy": {"seconds": copy, "cpu_seconds": copy_cpu},
    "save": {"seconds": save, "cpu_seconds": save_cpu},
    "stored_bytes": written,
  }


def time_searches(
  pipeline: Pipeline, condition: Condition, num_chunks: int, every: int, repeats: int, default_seconds: float
) -> dict[str, dict[str, float]]:
  """Seconds and CPU seconds of a chunk with and without saves, medians, and the share that the saves add.

  `default_seconds` is the time between two saves where no number of chunks is given.
  """
  once = lambda folder: list(search_once(pipeline, condition, num_chunks, every, folder))
  once(None)
  totals: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
  for repeat in range(repeats):
    # Whichever is first may find a quieter machine.
    for saves in (False, True) if repeat % 2 else (True, False):
      with tempfile.TemporaryDirectory() as folder:
        chunks = once(epath.Path(folder) if saves else None)
        totals[saves].append(tuple(sum(seconds) / len(chunks) for seconds in zip(*chunks, strict=True)))
  chunks_per_save = (num_chunks - COMPILING) / (num_chunks // every)
  report = {}
  for which, name in enumerate(("seconds", "cpu_seconds")):
    plain, saving = (statistics.median(total[which] for total in totals[saves]) for saves in (False, True))
    by_default = (saving - plain) * chunks_per_save / default_seconds
    shares = {"overhead": saving / plain - 1, "overhead_by_default": by_default}
    report[name] = {"without": plain, "with": saving, **shares}
  return report


def _now() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


def _passed(since: tuple[float, float]) -> tuple[float, float]:
  now = _now()
  return now[0] - since[0], now[1] - since[1]
