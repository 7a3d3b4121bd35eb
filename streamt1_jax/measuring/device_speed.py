"""How fast a device is: plain streaming, the search, the video decoder and the rewards, with random weights."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from streamt1_jax import drivers
from streamt1_jax.config import SearchConfig
from streamt1_jax.io import manifest
from streamt1_jax.measuring import reward_calls
from streamt1_jax.measuring.device_sizes import NotHere, RandomVideo, Sizes, random_like, random_video
from streamt1_jax.measuring.search_speed import gemm_tflops
from streamt1_jax.models import abstract_codec, make_models
from streamt1_jax.rewards.qwen2_vl.model import PromptEmbedding
from streamt1_jax.rewards.table import DEFAULT_REWARDS, REWARDS
from streamt1_jax.typing import Implementation

_REPEATS = 3


def machine(sizes: Sizes) -> dict[str, Any]:
  """The best rate of a product of matrices, and the bytes that the device gives."""
  statistics = jax.devices()[0].memory_stats() or {}
  rates = {f"{name}_tflops": gemm_tflops(jnp.dtype(name), sizes.product, 1.0) for name in ("bfloat16", "float32")}
  return rates | {"bytes_limit": statistics.get("bytes_limit")}


def streaming(
  sizes: Sizes, attention: Implementation | None = None, *, decodes: bool = True, platform: str | None = None
) -> dict[str, Any]:
  """Plain streaming. Raises NotHere on another platform than `platform`, if it is given."""
  if platform not in (None, jax.default_backend()):
    raise NotHere(f"{attention} is not compiled for a {jax.default_backend()}")
  return _time_video(sizes, random_video(sizes, SearchConfig.streaming(sizes.video), attention, decodes=decodes))


def search(sizes: Sizes) -> dict[str, Any]:
  """Two beams of two, decoded and judged by the built-in rewards."""
  return _time_video(sizes, random_video(sizes, SearchConfig.released()))


def _time_video(sizes: Sizes, made: RandomVideo) -> dict[str, Any]:
  """Seconds of a chunk until its frames are on the host, once nothing is compiled and the window is full."""
  with manifest.CompileCounter() as compilations:
    began = time.perf_counter()
    traces = drivers.stream(made.params, made.condition, made.models, made.search, num_chunks=sizes.chunks, seed=0)
    seconds, last = [], time.perf_counter()
    for trace in traces:
      frames = np.asarray(trace.frames)
      seconds.append(time.perf_counter() - last)
      last = time.perf_counter()
    whole = time.perf_counter() - began
  chunk = float(np.median(seconds[-sizes.timed :]))
  # A latent stands for as many frames whether it is decoded or not.
  per_chunk = sizes.video.required_codec.temporal_stride * sizes.video.chunk_frames
  return {
    "seconds_per_chunk": chunk,
    "frames_per_second": per_chunk / chunk,
    "seconds_of_the_video": whole,
    "compile_seconds": compilations.seconds,
    "decoding": made.models.execution.decoding,
    "peak_bytes": manifest.peak_device_bytes(),
    "frames": "x".join(map(str, frames.shape[1:])),
  }


def decoder(sizes: Sizes) -> dict[str, Any]:
  """The video decoder alone: one later chunk of one video, latent frame after latent frame and all at once."""
  found: dict[str, Any] = {}
  model = sizes.video
  params = random_like(abstract_codec(model.required_codec)[1]["decoder"], sizes.dtype)
  rewards = (cast(Any, REWARDS[name].make(None, model.fps)) for name in DEFAULT_REWARDS)
  models = make_models(model, *rewards)
  latents = jnp.zeros(model.latent_shape)
  for name, at_once in (("frame_by_frame", False), ("at_once", True)):
    codec = dataclasses.replace(cast(Any, models.codec), frame_by_frame=not at_once)
    decode = jax.jit(functools.partial(codec.decode, first=False), donate_argnums=2)
    state = jax.jit(codec.init_state)(params)
    seconds, _ = _time_with_state(functools.partial(decode, params, latents), state)
    frames = model.required_codec.temporal_stride * model.chunk_frames
    found |= {f"{name}_seconds_per_chunk": seconds, f"{name}_frames_per_second": frames / seconds}
  return found | {"peak_bytes": manifest.peak_device_bytes()}


def _time_with_state(step: Callable[[Any], tuple[Any, Any]], state: Any) -> tuple[float, Any]:
  """Seconds of the fastest of a few calls after the first, each with the state that the one before left."""
  result, state = jax.block_until_ready(step(state))
  times = []
  for _ in range(_REPEATS):
    began = time.perf_counter()
    result, state = jax.block_until_ready(step(state))
    times.append(time.perf_counter() - began)
  return min(times), result


def reward(sizes: Sizes, name: str, dtype: DTypeLike) -> dict[str, Any]:
  """One call of a large reward on one candidate, with random weights: a whole chunk, or the longest window."""
  spec, config = REWARDS[name], sizes.rewards[name]
  judge = cast(Any, spec.make(config, sizes.video.fps))
  params = random_like(spec.searched(spec.weight_shapes(config, dtype)))
  activations = jnp.bfloat16 if dtype == jnp.int8 else dtype
  text = lambda length: jnp.zeros((length, config.backbone.decoder.dim), activations)
  before, after = sizes.text or spec.required_text.length
  condition = PromptEmbedding(text(before), text(after), jnp.arange(len(spec.required_text.reward_tokens)))
  structs = reward_calls.clip_shapes(spec, 12 if spec.on_frames else 117, 1, 1, (*sizes.frame, 3))
  draw = np.random.default_rng(0).integers
  clips = [jnp.asarray(draw(256, size=struct.shape, dtype=np.uint8)) for struct in structs]
  call = jax.jit(reward_calls.judge(spec, judge))
  began = time.perf_counter()
  score = jax.block_until_ready(call(params, condition, *clips))
  first = time.perf_counter() - began
  seconds, _ = _time_with_state(lambda state: (call(params, condition, *clips), state), None)
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  return {
    "seconds": seconds,
    "first_call_seconds": first,
    "weight_bytes": weights,
    "finite": bool(np.isfinite(np.asarray(score)).all()),
    "peak_bytes": manifest.peak_device_bytes(),
  }


def compilation(sizes: Sizes) -> dict[str, Any]:
  """Seconds that XLA spends on both programs of plain streaming. The second run of two finds them in the cache."""
  made = random_video(sizes, SearchConfig.streaming(sizes.video))
  state = drivers.jitted_init_state(made.params, 0, made.models, made.search)
  found = {}
  for name, first in (("first_chunk", True), ("later_chunk", False)):
    lowered = drivers.jitted_chunk_step.lower(made.params, state, made.condition, made.models, made.search, first=first)
    began = time.perf_counter()
    lowered.compile()
    found[f"{name}_seconds"] = time.perf_counter() - began
  return found
