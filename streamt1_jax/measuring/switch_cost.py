"""What a new prompt in the middle of a video costs, in chunks."""

import dataclasses
import time
from typing import Any

import jax

from streamt1_jax import drivers
from streamt1_jax.between_chunks import switch_prompt
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.measuring.random_search import RandomSearch
from streamt1_jax.state import SearchState


def measure(built: RandomSearch, search: SearchConfig, switches: list[SwitchConfig], repeats: int) -> dict[str, Any]:
  """Seconds of a chunk with a full memory and of every kind of switch, taken in turn; the fastest of each counts.

  Args:
    built: a search with random weights on one device.
    search: its sizes.
    switches: what is measured.
    repeats: rounds after a first one, which compiles.
  """
  inputs = built.params, built.condition, built.models, search
  # The window is full and has rolled, and the sinks of a model that appends are there.
  chunks = search.max_sink_frames // built.model.chunk_frames + built.model.window_chunks + 2
  state = _state_after(built, search, chunks)
  seconds: dict[str, list[float]] = {"chunk": []} | {_name(switch): [] for switch in switches}
  compilations = 0
  for round_number in range(1 + repeats):
    with CompileCounter() as counter:
      for name, times in seconds.items():
        before = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
        began = time.perf_counter()
        if name == "chunk":
          after = drivers.jitted_chunk_step(built.params, before, *inputs[1:], first=False)
        else:
          switch = next(switch for switch in switches if _name(switch) == name)
          after = switch_prompt(built.params, before, *inputs[1:], switch)
        jax.block_until_ready(after)
        times.append(time.perf_counter() - began)
    compilations += counter.count if round_number else 0
  best = {name: min(times[1:]) for name, times in seconds.items()}
  return {
    "chunks_before": chunks,
    "seconds": best,
    "in_chunks": {name: best[name] / best["chunk"] for name in best if name != "chunk"},
    "compilations_after_warmup": compilations,
  }


def _name(switch: SwitchConfig) -> str:
  return " ".join(str(value) for value in dataclasses.asdict(switch).values() if value != "whole")


def _state_after(built: RandomSearch, search: SearchConfig, chunks: int) -> SearchState:
  state = drivers.jitted_init_state(built.params, 0, built.models, search)
  for index in range(chunks):
    inputs = built.params, state, built.condition, built.models, search
    state, _ = drivers.jitted_chunk_step(*inputs, first=index == 0)
  return state
