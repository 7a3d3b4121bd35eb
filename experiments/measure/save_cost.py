"""What saving a search costs: time on this machine, and bytes by shapes for the models of the presets.

  python -m experiments.measure.save_cost --save_every=5

searches the same video with and without saves, in turn, and prints one JSON line: seconds and CPU seconds (of all
threads) of a chunk both ways and what the saves add, as a share (`overhead`), and as the share it is where searches are
saved once a minute, as they are without the flag (`overhead_by_default`); the same of one save that nothing runs beside
(`save`, of which `copy` is the part that a search waits for); and bytes. On a machine that others use, CPU seconds say
more.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.chunk_step import Models, init_state
from streamt1_jax.cli import common, stopped_searches
from streamt1_jax.codec.streaming import StreamingDecoder
from streamt1_jax.codec.vae import VideoDecoder
from streamt1_jax.config import ConfigError, SearchConfig, preset
from streamt1_jax.io import paths
from streamt1_jax.noise_propagation import gaussian_noise
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards.coherence import TemporalCoherence
from streamt1_jax.rewards.quality import ImageQuality
from streamt1_jax.saved_search import SavedSearch

_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder of the model whose searches are timed.")
_CHUNKS = common.define_integer("chunks", 21, "Chunks of a search; the first two compile.", 3)
_REPEATS = common.define_integer("repeats", 5, "Searches with saves, and as many without.", 1)
flags.adopt_module_key_flags(stopped_searches)

_PROMPT = "a red circle moves left over a dark blue background"
_COMPILING = 2
PRESETS = {"tiny": jnp.float32, "wan_1_3b": jnp.bfloat16}


def state_bytes(name: str) -> dict[str, int]:
  """Bytes of a state and of a later chunk's trace, by shapes: 2 beams of 2 candidates, all sinks allocated."""
  model, search, dtype = preset(name), SearchConfig.released(), PRESETS[name]
  split = lambda build: nnx.split(nnx.eval_shape(build), nnx.Param)
  cast = lambda state: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.to_pure_dict(state))
  backbone, weights = split(lambda: CausalWanDiT(model, nnx.Rngs(0)))
  decoder, decoder_weights = split(lambda: VideoDecoder(model.codec, rngs=nnx.Rngs(0)))
  size = model.latent_height, model.latent_width
  codec = StreamingDecoder(decoder, model.codec, size, frame_by_frame=True)
  noise = gaussian_noise(model.latent_shape, len(model.schedule.denoising_steps))
  models = Models(model, backbone, codec, ImageQuality(), TemporalCoherence(), noise)
  params = {"backbone": cast(weights), "codec": cast(decoder_weights)}
  state = jax.eval_shape(lambda params: init_state(models, params, search, 0), params)
  count = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  frames = codec.num_frames(model.chunk_frames, first=False) * math.prod(codec.frame_shape())
  trace = search.top_k * (frames * jnp.dtype(codec.frame_dtype()).itemsize + 4 * math.prod(model.latent_shape))
  beams = state.beams
  return {
    "state": count(state),
    "memory": count(beams.memory),
    "past_frames": count(beams.past),
    "decoder": count(beams.codec),
    "trace_of_a_chunk": trace,
  }


def _save_every() -> int:
  return 5 if stopped_searches.SAVE_EVERY.value is None else stopped_searches.SAVE_EVERY.value


def search_once(pipeline: Pipeline, condition: Any, folder: epath.Path | None) -> Iterator[tuple[float, float]]:
  """Seconds and CPU seconds of the chunks after those that compile, and of what is left to write after the last."""
  traces: list[Any] = []
  options = {"num_chunks": _CHUNKS.value, "seeds": [0]}
  states = pipeline.stream_states([condition], SearchConfig.released(), **options)
  with SavedSearch(folder, {}) if folder else contextlib.nullcontext() as saved:
    for index in range(_CHUNKS.value):
      began = _now()
      state, (trace,) = next(states)
      traces.append(trace)
      if saved and (index + 1) % _save_every() == 0:
        saved.save(state, [traces])
      if saved and index == _CHUNKS.value - 1:
        saved.wait()
      if index >= _COMPILING:
        yield _passed(began)


def time_saves(pipeline: Pipeline, condition: Any) -> dict[str, Any]:
  """Seconds and CPU seconds of a save and of its copy, medians, with nothing beside; and the bytes of the last one."""
  search, times, written = SearchConfig.released(), [], 0
  states = pipeline.stream_states([condition], search, num_chunks=_CHUNKS.value, seeds=[0])
  traces: list[Any] = []
  with tempfile.TemporaryDirectory() as folder, SavedSearch(folder, {}) as saved:
    for index, (state, (trace,)) in enumerate(states):
      traces.append(trace)
      if (index + 1) % _save_every() == 0:
        began = _now()
        saved.save(state, [traces])
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


def _now() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


def _passed(since: tuple[float, float]) -> tuple[float, float]:
  return tuple(now - then for now, then in zip(_now(), since))


def main() -> None:
  every = _save_every()
  if not every:
    raise ConfigError("--save_every=0 saves nothing, so there is nothing to measure")
  if every > _CHUNKS.value:
    raise ConfigError(f"--save_every={every} is more than --chunks={_CHUNKS.value}: nothing would be saved")
  pipeline = Pipeline.load(common.find_folder(_CHECKPOINT.value))
  condition = pipeline.condition(_PROMPT, _CHUNKS.value)
  for _ in search_once(pipeline, condition, None):
    pass
  totals: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
  for repeat in range(_REPEATS.value):
    # Whichever is first may find a quieter machine.
    for saves in (False, True) if repeat % 2 else (True, False):
      with tempfile.TemporaryDirectory() as folder:
        chunks = list(search_once(pipeline, condition, epath.Path(folder) if saves else None))
        totals[saves].append(tuple(sum(seconds) / len(chunks) for seconds in zip(*chunks, strict=True)))
  report: dict[str, Any] = {"save_every": every, "chunks": _CHUNKS.value}
  chunks_per_save = (_CHUNKS.value - _COMPILING) / (_CHUNKS.value // every)
  for which, name in enumerate(("seconds", "cpu_seconds")):
    plain, saving = (statistics.median(total[which] for total in totals[saves]) for saves in (False, True))
    by_default = (saving - plain) * chunks_per_save / stopped_searches.DEFAULT_SECONDS
    shares = {"overhead": saving / plain - 1, "overhead_by_default": by_default}
    report[name] = {"without": plain, "with": saving, **shares}
  report |= time_saves(pipeline, condition)
  print(json.dumps(report | {"bytes_by_shapes": {name: state_bytes(name) for name in PRESETS}}), flush=True)


if __name__ == "__main__":
  common.run(main)
