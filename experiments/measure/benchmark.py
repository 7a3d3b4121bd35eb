"""Measures a whole search: work per second, against the machine's own matrix-product rate in the same run.

  python -m experiments.measure.benchmark --preset=bench_mid --beam_size=2 --top_k=2 --chunks=7
  python -m experiments.measure.benchmark --preset=bench_mid --mesh=data:2,candidate:4
  python -m experiments.measure.benchmark --preset=bench_mid --top_k=1 --live_bytes
  python -m experiments.measure.benchmark --preset=bench_mid --scaling
  python -m experiments.measure.benchmark --reward_dir=checkpoints/tiny/rewards/hpsv3

The first two print one JSON line, the third a table of what candidates cost in memory (see `memory_rows`), the fourth
tables of what grows with candidates, beams and the length of a video, and what does not (see `measure_scaling`), and a
JSON line of their figures, the last a table of what judging a candidate costs (see `reward_rows`). On a mesh that
divides prompts as many are searched together, and the work is that of all of them.

But for the last: random weights, latents instead of frames, and rewards that cost nothing, so that what is measured is
the search itself: denoising, memory, pruning. Model FLOP are counted from shapes (2 per multiply-add), for the forwards
that the search really makes and the keys that are really visible.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from streamt1_jax import drivers
from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.chunk_step import Models
from streamt1_jax.cli import common, device_flags
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, preset
from streamt1_jax.data import shapes
from streamt1_jax.execution import Execution
from streamt1_jax.io.manifest import CompileCounter, peak_rss_bytes
from streamt1_jax.measuring import reward_calls
from streamt1_jax.measuring.random_model import ConstantReward
from streamt1_jax.noise_propagation import gaussian_noise
from streamt1_jax.parallel.sharding import RULES, tree_shardings
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.base import LoadedReward
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.state import Condition

_PRESET = flags.DEFINE_string("preset", "bench_mid", "Model preset.")
_BEAM_SIZE = common.define_integer("beam_size", 2, "Candidates per beam.")
_TOP_K = common.define_integer("top_k", 2, "Beams.")
_CHUNKS = common.define_integer("chunks", 7, "Chunks of the video.")
_MAX_SINK_FRAMES = common.define_integer("max_sink_frames", 9, "Latent frames the sinks may grow to.")
_REPEATS = common.define_integer("repeats", 2, "Timed searches; the fastest counts.", 1)
_APPEND_ALWAYS = flags.DEFINE_bool("append_always", False, "Route every chunk to a new sink: the largest memory.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
_LIVE_BYTES = flags.DEFINE_bool("live_bytes", False, "Report bytes at 1, 4 and 8 candidates per beam instead.")
_REWARD_DIR = common.define_path("reward_dir", None, "Report what this small reward costs instead.")
_SCALING = flags.DEFINE_bool("scaling", False, "Report what grows with candidates, beams and chunks instead.")
flags.adopt_module_key_flags(device_flags)

# Of the scaling tables: candidates of one beam; chunks (from 1) whose seconds are compared, by which time the memory is
# full; and how many chunks around each are timed.
SCALING_CANDIDATES = (1, 2, 4, 8)
SCALING_CHUNKS = (10, 100, 400)
_AROUND = 5

# Of a chunk, as `--short_frames` leaves them to the image reward, or of a sliding window.
REWARD_FRAMES = {"hpsv3": (12, 6, 3, 1), "videoalign": (117, 57, 9)}


class AlternatingReward:
  """Image scores that rise and video scores that fall, so that every chunk is flagged as a new sink."""

  def __init__(self, slope: float):
    self.slope = slope

  def __call__(self, params, condition, frames, info):
    return self.slope * info.chunk_index.astype(jnp.float32)


def build(
  model: ModelConfig, search: SearchConfig, mesh: Mesh | None, append_always: bool
) -> tuple[Models, dict, Condition]:
  """Random weights in the flag's dtype, and a random prompt, or as many as the mesh searches together."""
  dtype = jnp.dtype(_DTYPE.value)
  graphdef, params = nnx.split(CausalWanDiT(model, nnx.Rngs(0)), nnx.Param)
  backbone = jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(params))
  rewards = (AlternatingReward(1.0), AlternatingReward(-1.0)) if append_always else (ConstantReward(),) * 2
  frame = model.latent_shape[1:]
  draw = gaussian_noise(model.latent_shape, len(model.schedule.denoising_steps))
  models = Models(
    model,
    graphdef,
    LatentCodec(frame),
    *rewards,
    draw,
    Execution(mesh, device_flags.ATTENTION.value, device_flags.DECODING.value or "together"),
  )
  embeddings = jax.random.normal(jax.random.key(1), (model.backbone.text_len, model.backbone.text_dim), dtype)
  text = nnx.merge(graphdef, backbone).text_memory(embeddings)
  params = {"backbone": backbone, "codec": {}, "image_reward": {}, "video_reward": {}}
  condition = Condition(text, (), (), jnp.int32(_CHUNKS.value))
  if mesh is None:
    return models, params, condition
  params = {name: jax.device_put(part, tree_shardings(mesh, name, part)) for name, part in params.items()}
  if mesh.shape[RULES["prompt"]] == 1:
    return models, params, jax.device_put(condition, tree_shardings(mesh, "condition", condition))
  return models, params, drivers.stack_conditions([condition] * mesh.shape[RULES["prompt"]], mesh)


def forward_flop(model: ModelConfig, visible_chunks: float) -> float:
  """FLOP of one forward of one chunk with cached text, when so many chunks are visible, its own included."""
  c, tokens = model.backbone, model.chunk_tokens
  # Self-attention has four square projections, cross-attention two: its keys and values are cached.
  linear = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
  self_attention = 4 * tokens * visible_chunks * tokens * c.dim
  cross_attention = 4 * tokens * c.text_len * c.dim
  patches = 2 * 2 * tokens * c.latent_channels * c.patch_size**2 * c.dim
  time = 2 * model.chunk_frames * (c.freq_dim * c.dim + c.dim**2 + 6 * c.dim**2)
  return c.num_layers * (linear + self_attention + cross_attention) + patches + time


def search_flop(model: ModelConfig, search: SearchConfig, visible: list[np.ndarray]) -> float:
  """FLOP of a search; `visible[chunk]` [K] is how many chunks each beam's candidates saw, their own included."""
  steps = len(model.schedule.denoising_steps)
  total = 0.0
  for chunks in visible:
    total += sum(search.beam_size * steps * forward_flop(model, n) for n in chunks)
    total += sum(forward_flop(model, n) for n in chunks)
  return total


def gemm_tflops(dtype: jnp.dtype, size: int = 2048, seconds: float = 1.0) -> float:
  """Best rate of a square matrix product on this machine, now."""
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(lambda a, b: a @ b)
  jax.block_until_ready(product(a, a))
  best, until = 0.0, time.perf_counter() + seconds
  while time.perf_counter() < until:
    began = time.perf_counter()
    jax.block_until_ready(product(a, a))
    best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e12)
  return best


def run_search(models: Models, params: dict, condition: Condition, search: SearchConfig) -> list[np.ndarray]:
  """One search; returns how many chunks every beam, of every prompt, saw, chunk by chunk."""
  mesh = models.execution.mesh
  prompts = 1 if mesh is None else mesh.shape[RULES["prompt"]]
  seed = 0 if prompts == 1 else np.arange(prompts, dtype=np.int32)
  state = drivers.jitted_init_state(params, seed, models, search)
  counts = []
  for index in range(_CHUNKS.value):
    state, _ = drivers.jitted_chunk_step(params, state, condition, models, search, first=index == 0)
    # A copy, since the next step takes the state's buffers; waiting keeps one chunk in flight.
    counts.append(np.array(state.beams.memory.count, np.float64).ravel())
  jax.block_until_ready(state)
  return counts


def memory_rows(models: Models, params: dict, condition: Condition, search: SearchConfig) -> list[dict[str, int]]:
  """What 1, 4 and 8 candidates per beam cost, in bytes.

  `live` is everything that exists between two chunks: weights, prompt, state. `temporary` is what one chunk needs
  beside that, by XLA's account of the compiled step. `beam_memory` is the attention memory of one beam and `chunk_kv`
  what one chunk adds to it: were either copied for every candidate, `temporary` would grow by it.
  """
  rows = []
  for beam_size in (1, 4, 8):
    search = dataclasses.replace(search, beam_size=beam_size)
    state = drivers.jitted_init_state(params, 0, models, search)
    lowered = drivers.jitted_chunk_step.lower(params, state, condition, models, search, first=False)
    step = lowered.compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    state = jax.block_until_ready(step(params, state, condition)[0])
    memory = state.beams.memory.k
    beam_memory = 2 * memory.nbytes // search.top_k
    rows.append({
      "candidates": search.num_candidates,
      "live": sum(array.nbytes for array in jax.live_arrays()),
      "temporary": temporary,
      "beam_memory": beam_memory,
      "chunk_kv": beam_memory // memory.shape[2],
    })  # fmt: skip
    del state
  return rows


def print_table(rows: list[dict[str, float]]) -> None:
  show = lambda cell: f"{cell:>17,}" if isinstance(cell, int) else f"{cell:>17.4g}"
  print("  ".join(f"{name:>17}" for name in rows[0]))
  for row in rows:
    print("  ".join(map(show, row.values())), flush=True)


def measure(models: Models, params: dict, condition: Condition, search: SearchConfig) -> dict[str, float]:
  """Times whole searches between measurements of the machine's rate; the best of each counts."""
  dtype, times = jnp.dtype(_DTYPE.value), []
  began = time.perf_counter()
  run_search(models, params, condition, search)
  warm_up = time.perf_counter() - began
  rates = [gemm_tflops(dtype)]
  compilations = 0
  for _ in range(_REPEATS.value):
    with CompileCounter() as counter:
      began = time.perf_counter()
      visible = run_search(models, params, condition, search)
      times.append(time.perf_counter() - began)
    compilations += counter.count
    rates.append(gemm_tflops(dtype))
  seconds, flop = min(times), search_flop(models.config, search, visible)
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


def reward_rows(spec: RewardSpec, loaded: LoadedReward) -> list[dict[str, float]]:
  """What judging costs: seconds of one call on all candidates divided by their number, by the frames it is given.

  Frames are noise of the shapes world's size, the prompt is its first caption. FLOP are counted from shapes; the
  fraction is that of the rate of matrix products measured beside the calls, and the fastest call counts.
  """
  reward, dtype, rows = loaded.reward, jnp.dtype(_DTYPE.value), []
  tokens = loaded.prompt(shapes.caption(*shapes.all_scenes()[0]))
  condition = reward.init(loaded.params, tokens)
  judge = jax.jit(reward_calls.judge(spec.kind, reward))
  size = (shapes.FRAME_SIZE, shapes.FRAME_SIZE)
  candidates = _TOP_K.value * _BEAM_SIZE.value
  draw = np.random.default_rng(0).integers
  for frames in REWARD_FRAMES[spec.name]:
    structs = reward_calls.clip_shapes(spec.kind, frames, _TOP_K.value, _BEAM_SIZE.value, (*size, 3))
    clips = [jnp.asarray(draw(256, size=struct.shape, dtype=np.uint8)) for struct in structs]
    jax.block_until_ready(judge(loaded.params, condition, *clips))
    times, rates = [], [gemm_tflops(dtype)]
    for _ in range(_REPEATS.value):
      began = time.perf_counter()
      jax.block_until_ready(judge(loaded.params, condition, *clips))
      times.append(time.perf_counter() - began)
    rates.append(gemm_tflops(dtype))
    flop = spec.candidate_flop(reward, frames, size, len(tokens.before) + len(tokens.after))
    seconds = min(times) / candidates
    rows.append(
      {
        "frames": frames,
        "gflop": flop / 1e9,
        "milliseconds": 1e3 * seconds,
        "gemm_fraction": flop / seconds / 1e12 / max(rates),
      }
    )
  return rows


class Scaled:
  """A search of one video on one device, compiled; the first chunk, which only decoders know, is as all others."""

  def __init__(self, parts: tuple[Models, dict, Condition], search: SearchConfig):
    self._models, self._params, self._condition = parts
    self._search = search
    self._state = drivers.jitted_init_state(self._params, 0, self._models, search)
    inputs = self._params, self._state, self._condition, self._models, search
    self._step = drivers.jitted_chunk_step.lower(*inputs, first=False).compile()

  def bytes(self) -> dict[str, int]:
    """Of the state between two chunks, and of what a chunk needs beside it by XLA's account."""
    state = sum(array.nbytes for array in jax.tree.leaves(self._state))
    return {"state": state, "temporary": self._step.memory_analysis().temp_size_in_bytes}

  def time(self, chunks: Sequence[int]) -> list[dict[str, float]]:
    """Searches; for each of `chunks`, counted from 1 and ascending, the seconds of the fastest one around it.

    Other programs may use the machine as well. So its rate is measured before and after them, and their CPU seconds, of
    all threads, are reported beside those of the clock; on an accelerator these say nothing.
    """
    rate = lambda: gemm_tflops(jnp.dtype(_DTYPE.value), seconds=0.3)
    done, rows = 0, []
    for chunk in chunks:
      first = chunk - _AROUND // 2
      self._advance(first - 1 - done)
      earlier = rate()
      times = self._advance(_AROUND)
      done = first - 1 + _AROUND
      gemm, (seconds, cpu_seconds) = (earlier + rate()) / 2, times.min(axis=0).tolist()
      visible = np.asarray(self._state.beams.memory.count, np.float64).ravel() + 1
      tflops = search_flop(self._models.config, self._search, [visible]) / seconds / 1e12
      rows.append({"chunk": chunk, "seconds": seconds, "cpu_seconds": cpu_seconds, "gemm_fraction": tflops / gemm})
    return rows

  def _advance(self, chunks: int) -> np.ndarray:
    """Searches so many chunks; seconds and CPU seconds of each, [chunks, 2]."""
    times = [(time.perf_counter(), time.process_time())]
    for _ in range(chunks):
      self._state = jax.block_until_ready(self._step(self._params, self._state, self._condition)[0])
      times.append((time.perf_counter(), time.process_time()))
    return np.diff(times, axis=0)


def measure_scaling(model: ModelConfig) -> Iterator[tuple[str, list[dict[str, float]]]]:
  """What grows with candidates, beams and chunks, on one device.

  Every chunk is kept as a sink until there is no room for another, so that the memory is as large as it gets.

  Yields:
    `candidates`: for 1, 2, 4, 8 candidates of one beam the seconds of a chunk, the work per second as a fraction of the
      machine's rate then, the bytes of `Scaled.bytes`, and the seconds over those of 1 candidate.
    `beams`: for 1 and 2 beams that share 2 candidates these bytes.
    `chunks`: for chunks 10, 100 and 400 of a video with one candidate the seconds, the fraction, and the seconds over
      those of chunk 10.
  """
  longest = SCALING_CHUNKS[-1] + _AROUND
  frames = max(model.backbone.max_frames, model.chunk_frames * longest)
  model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, max_frames=frames))
  searched = lambda beam_size, top_k: SearchConfig.released(
    beam_size=beam_size, top_k=top_k, max_sink_frames=_MAX_SINK_FRAMES.value
  )
  parts = build(model, searched(1, 1), None, append_always=True)
  candidates = []
  for count in SCALING_CANDIDATES:
    scaled = Scaled(parts, searched(count, 1))
    size = scaled.bytes()
    candidates.append({"candidates": count, **scaled.time(SCALING_CHUNKS[:1])[0], **size})
  yield "candidates", with_ratios(candidates)
  yield "beams", [{"beams": beams, **Scaled(parts, searched(2 // beams, beams)).bytes()} for beams in (1, 2)]
  yield "chunks", with_ratios(Scaled(parts, searched(1, 1)).time(SCALING_CHUNKS))


def with_ratios(rows: list[dict[str, float]]) -> list[dict[str, float]]:
  """`rows` with their seconds over those of the first."""
  names = ("seconds", "cpu_seconds")
  return [row | {f"{name}_ratio": row[name] / rows[0][name] for name in names} for row in rows]


def refuse_ignored_flags() -> None:
  """Raises ConfigError for flags that have no say in what was asked for."""
  tables = (
    (_REWARD_DIR, (_SCALING, _LIVE_BYTES, _PRESET, _CHUNKS, _MAX_SINK_FRAMES, _APPEND_ALWAYS)),
    (_SCALING, (_LIVE_BYTES, _BEAM_SIZE, _TOP_K, _CHUNKS, _REPEATS, _APPEND_ALWAYS)),
    (_LIVE_BYTES, (_BEAM_SIZE, _CHUNKS, _REPEATS)),
  )
  for table, ignored in tables:
    given = [flag.name for flag in ignored if flags.FLAGS[flag.name].present]
    if table.value and given:
      raise ConfigError(f"--{table.name} takes no --{', --'.join(given)}")


def main() -> None:
  refuse_ignored_flags()
  if _REWARD_DIR.value is not None:
    where = common.find_folder(_REWARD_DIR.value)
    spec, _ = folder.load_config(where)
    print_table(reward_rows(spec, folder.load_reward(where, fps=shapes.FPS, dtype=jnp.dtype(_DTYPE.value))))
    return
  model = preset(_PRESET.value)
  search = SearchConfig.released(beam_size=_BEAM_SIZE.value, top_k=_TOP_K.value, max_sink_frames=_MAX_SINK_FRAMES.value)
  search.validate_for(model)
  longest = drivers.max_chunks(model)
  if not 1 <= _CHUNKS.value <= longest:
    raise ConfigError(f"--chunks must be in 1..{longest} (rotary tables), got {_CHUNKS.value}")
  device_flags.use_compilation_cache()
  mesh = device_flags.make_mesh(model, search)
  for flag in (_LIVE_BYTES, _SCALING):
    if flag.value and mesh is not None:
      raise ConfigError(f"--{flag.name} takes one device: --mesh=data:1")
  if _SCALING.value:
    tables = {}
    for name, rows in measure_scaling(model):
      tables[name] = rows
      print_table(rows)
    print(json.dumps({"preset": model.name} | tables), flush=True)
    return
  models, params, condition = build(model, search, mesh, _APPEND_ALWAYS.value)
  if _LIVE_BYTES.value:
    print_table(memory_rows(models, params, condition, search))
    return
  report = {"preset": model.name, "candidates": search.num_candidates, "chunks": _CHUNKS.value}
  print(json.dumps(report | measure(models, params, condition, search)), flush=True)


if __name__ == "__main__":
  common.run(main)
