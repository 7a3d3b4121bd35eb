"""Work per second of a whole search, against the machine's own rate; and what candidates cost in memory."""

import dataclasses
import time
from typing import Any

import jax
from jax.typing import DTypeLike

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig, required
from streamt1_jax.io.manifest import CompileCounter, peak_rss_bytes
from streamt1_jax.measuring.random_search import RandomSearch
from streamt1_jax.measuring.search_flop import search_flop


def gemm_tflops(dtype: DTypeLike, size: int = 2048, seconds: float = 1.0) -> float:
  """Best rate of a square matrix product on one device of this machine, now."""
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(lambda a, b: a @ b)
  jax.block_until_ready(product(a, a))
  best, until = 0.0, time.perf_counter() + seconds
  while time.perf_counter() < until:
    began = time.perf_counter()
    jax.block_until_ready(product(a, a))
    best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e12)
  return best


def measure(
  built: RandomSearch, search: SearchConfig, dtype: DTypeLike, num_chunks: int, repeats: int
) -> dict[str, Any]:
  """Times whole searches between measurements of the machine's rate; the best of each counts."""
  models, times = built.models, []
  began = time.perf_counter()
  built.run(search, num_chunks)
  warm_up = time.perf_counter() - began
  rates = [gemm_tflops(dtype)]
  compilations = 0
  for _ in range(repeats):
    with CompileCounter() as counter:
      began = time.perf_counter()
      visible = built.run(search, num_chunks)
      times.append(time.perf_counter() - began)
    compilations += counter.count
    rates.append(gemm_tflops(dtype))
  seconds, flop = min(times), search_flop(built.model, search, visible)
  mesh = models.execution.mesh
  tflops, gemm = flop / seconds / 1e12, max(rates) * (1 if mesh is None else mesh.size)
  return {
    "mesh": None if mesh is None else dict(mesh.shape),
    "seconds": seconds,
    "compile_seconds": warm_up - seconds,
    "model_tflop": flop / 1e12,
    "tflops": tflops,
    "gemm_tflops": gemm,
    "gemm_fraction": tflops / gemm,
    "compilations_after_warmup": compilations,
    "peak_rss_bytes": peak_rss_bytes(),
  }


def memory_rows(built: RandomSearch, search: SearchConfig) -> list[dict[str, int]]:
  """What 1, 4 and 8 candidates per beam cost, in bytes.

  `live` is everything that exists between two chunks: weights, prompt, state. `temporary` is what one chunk needs
  beside that, by XLA's account of the compiled step. `beam_memory` is the attention memory of one beam and `chunk_kv`
  what one chunk adds to it: were either copied for every candidate, `temporary` would grow by it.
  """
  rows = []
  for beam_size in (1, 4, 8):
    search = dataclasses.replace(search, beam_size=beam_size)
    state = drivers.jitted_init_state(built.params, 0, built.models, search)
    inputs = built.params, state, built.condition
    step = drivers.jitted_chunk_step.lower(*inputs, built.models, search, first=False).compile()
    temporary = required(step.memory_analysis(), "the compiler's account of memory").temp_size_in_bytes
    state = jax.block_until_ready(step(*inputs)[0])
    del inputs
    memory = state.beams.memory.k
    beam_memory = 2 * memory.nbytes // search.top_k
    rows.append(
      {
        "candidates": search.num_candidates,
        "live": sum(array.nbytes for array in jax.live_arrays()),
        "temporary": temporary,
        "beam_memory": beam_memory,
        "chunk_kv": beam_memory // memory.shape[2],
      }
    )
    del state
  return rows
