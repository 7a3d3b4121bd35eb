"""What grows with candidates, beams and the length of a video, and what does not; on one device."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from streamt1_jax import drivers
from streamt1_jax.config import ModelConfig, SearchConfig, required
from streamt1_jax.execution import Execution
from streamt1_jax.measuring import random_search
from streamt1_jax.measuring.random_search import RandomSearch
from streamt1_jax.measuring.search_flop import search_flop
from streamt1_jax.measuring.search_speed import gemm_tflops

CANDIDATES = (1, 2, 4, 8)
"""Candidates of one beam."""
CHUNKS = (10, 100, 400)
"""Chunks, counted from 1, whose seconds are compared; by then the memory is full."""
_AROUND = 5  # chunks around each that are timed

Rows = list[dict[str, float]]


class _Scaled:
  """A search of one video on one device, compiled. The first chunk, which only decoders know, is as all others."""

  def __init__(self, built: RandomSearch, search: SearchConfig, dtype: DTypeLike):
    self._built, self._search, self._dtype = built, search, dtype
    self._state = drivers.jitted_init_state(built.params, 0, built.models, search)
    inputs = built.params, self._state, built.condition, built.models, search
    self._step = drivers.jitted_chunk_step.lower(*inputs, first=False).compile()

  def bytes(self) -> dict[str, int]:
    """Bytes of the state between two chunks, and what a chunk needs beside it by XLA's account."""
    memory = required(self._step.memory_analysis(), "the compiler's account of memory")
    state = sum(array.nbytes for array in jax.tree.leaves(self._state))
    return {"state": state, "temporary": memory.temp_size_in_bytes}

  def time(self, chunks: Sequence[int]) -> Rows:
    """Searches; for each of `chunks`, counted from 1 and ascending, the seconds of the fastest one around it.

    Other programs may use the machine as well. So its rate is measured before and after them, and their CPU seconds, of
    all threads, are reported beside those of the clock; on an accelerator these say nothing.
    """
    rate = lambda: gemm_tflops(self._dtype, seconds=0.3)
    done, rows = 0, []
    for chunk in chunks:
      first = chunk - _AROUND // 2
      self._advance(first - 1 - done)
      earlier = rate()
      times = self._advance(_AROUND)
      done = first - 1 + _AROUND
      gemm, (seconds, cpu_seconds) = (earlier + rate()) / 2, times.min(axis=0).tolist()
      visible = np.asarray(self._state.beams.memory.count, np.float64).ravel() + 1
      tflops = search_flop(self._built.model, self._search, [visible]) / seconds / 1e12
      rows.append({"chunk": chunk, "seconds": seconds, "cpu_seconds": cpu_seconds, "gemm_fraction": tflops / gemm})
    return rows

  def _advance(self, chunks: int) -> np.ndarray:
    """Searches `chunks` more chunks; seconds and CPU seconds of each, [chunks, 2]."""
    times = [(time.perf_counter(), time.process_time())]
    for _ in range(chunks):
      inputs = self._built.params, self._state, self._built.condition
      self._state = jax.block_until_ready(self._step(*inputs)[0])
      times.append((time.perf_counter(), time.process_time()))
    return np.diff(times, axis=0)


def measure(
  model: ModelConfig, execution: Execution, dtype: DTypeLike, max_sink_frames: int
) -> Iterator[tuple[str, Rows]]:
  """Tables by name. Every chunk is kept as a sink until there is no room, so the memory is as large as it gets.

  Yields:
    `candidates`: for 1, 2, 4, 8 candidates of one beam the seconds of a chunk, the work per second as a fraction of the
      machine's rate then, the bytes of state and temporaries, and the seconds over those of 1 candidate.
    `beams`: for 1 and 2 beams that share 2 candidates these bytes.
    `chunks`: for chunks 10, 100 and 400 of a video with one candidate the seconds, the fraction, and the seconds over
      those of chunk 10.
  """
  longest = CHUNKS[-1] + _AROUND
  frames = max(model.backbone.max_frames, model.chunk_frames * longest)
  model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, max_frames=frames))
  built = random_search.build(model, execution, dtype, longest, append_always=True)

  def scaled(beam_size: int, top_k: int) -> _Scaled:
    search = SearchConfig.released(beam_size=beam_size, top_k=top_k, max_sink_frames=max_sink_frames)
    return _Scaled(built, search, dtype)

  candidates = []
  for count in CANDIDATES:
    one = scaled(count, 1)
    size = one.bytes()
    candidates.append({"candidates": count, **one.time(CHUNKS[:1])[0], **size})
  yield "candidates", _with_ratios(candidates)
  yield "beams", [{"beams": beams, **scaled(2 // beams, beams).bytes()} for beams in (1, 2)]
  yield "chunks", _with_ratios(scaled(1, 1).time(CHUNKS))


def _with_ratios(rows: Rows) -> Rows:
  """`rows` with their seconds over those of the first."""
  names = ("seconds", "cpu_seconds")
  return [row | {f"{name}_ratio": row[name] / rows[0][name] for name in names} for row in rows]
