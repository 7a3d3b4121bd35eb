"""A searched video in plain numbers, and what it costs, all chunks at once; programs tell both chunk by chunk."""

from collections.abc import Sequence
from typing import Any

import jax

from streamt1_jax import cost
from streamt1_jax.config import SearchConfig
from streamt1_jax.cost import Cost
from streamt1_jax.drivers import FinalBeams, lineage
from streamt1_jax.generator import Models
from streamt1_jax.methods.tries import Try, describe_tries
from streamt1_jax.state import ChunkTrace
from streamt1_jax.trace import describe_chunk, describe_scores, describe_step, describe_video


def describe_trace(
  traces: Sequence[ChunkTrace],
  beams: FinalBeams | None,
  search: SearchConfig,
  *,
  segments: Sequence[tuple[int, str]] = (),
  method: str | None = None,
  costs: Sequence[Cost] | None = None,
  tries: Sequence[Try] = (),
) -> dict[str, Any]:
  """The document of `docs/trace.md`.

  Args:
    traces: the chunks in order.
    beams: the finished videos; None if the search failed.
    search: the configuration they were searched with.
    segments: first chunk and prompt of every segment.
    method: name of the search, if it has one.
    costs: of every chunk, where they were counted.
    tries: what a driver tried on the host.
  """
  final = None
  if beams is not None:
    survivors = [jax.device_get(trace.survivor) for trace in traces]
    path = lineage(survivors, search.beam_size)[:, beams.best].tolist()
    final = describe_scores(beams.scores, beams.best)
    steps = enumerate(zip(path, survivors, strict=True))
    final["lineage"] = [describe_step(chunk, beam, int(survivor[beam])) for chunk, (beam, survivor) in steps]
  rows = enumerate(zip(traces, costs or [None] * len(traces), strict=True))
  return describe_video(search, 0, segments, method) | {
    "tries": describe_tries(tries),
    "chunks": [describe_chunk(index, trace, search, cost) for index, (trace, cost) in rows],
    "final": final,
  }


def video_cost(models: Models, search: SearchConfig, num_chunks: int) -> Cost:
  """What a whole video under one prompt costs, its last verdict included."""
  chunks = (cost.chunk_cost(models, search, index, num_chunks) for index in range(num_chunks))
  return cost.total([*chunks, cost.whole_video_cost(models, search, num_chunks)])
