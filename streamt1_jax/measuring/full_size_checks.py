"""What a converted checkpoint must stand at full size: to be restored, to read a prompt, to be searched with."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig
from streamt1_jax.convert.engine import abstract_params
from streamt1_jax.io import checkpoint, manifest
from streamt1_jax.io.checkpoint import tokenizer_file
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.text import PromptEncoder
from streamt1_jax.text.tokenizer import Tokenizer

_PROMPT = "a small red circle moves quickly left over a dark blue background"


def restore_backbone(folder: pathlib.Path, model: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
  """Loads the backbone; what it took beside the weights themselves, in units of the largest of them."""
  abstract = abstract_params(lambda: CausalWanDiT(model, nnx.Rngs(0)))
  jax.block_until_ready(jnp.zeros(1))
  before, start, work = manifest.peak_rss_bytes(), time.perf_counter(), time.process_time()
  params = jax.block_until_ready(checkpoint.load_params(folder / "backbone", abstract, dtype))
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  on_host = sum(sizes) if jax.default_backend() == "cpu" else 0
  extra = manifest.peak_rss_bytes() - before - on_host
  return {
    "load_seconds": time.perf_counter() - start,
    "load_cpu_seconds": time.process_time() - work,
    "weight_bytes": sum(sizes),
    "host_bytes_beside_weights": extra,
    "in_largest_weights": extra / max(sizes),
  }


def encode_prompt(folder: pathlib.Path, model: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
  """Sends a prompt through the text encoder, layer by layer from disk."""
  start = time.perf_counter()
  tokenizer = Tokenizer(tokenizer_file(folder), model.required_text.max_len)
  encoder = PromptEncoder(folder / "text", model.required_text, tokenizer, model.backbone.text_len, dtype)
  opened = time.perf_counter()
  embeddings = np.asarray(encoder(_PROMPT))
  _require_finite("embeddings", embeddings)
  return {"check_seconds": opened - start, "encode_seconds": time.perf_counter() - opened}


def search(folder: pathlib.Path, dtype: DTypeLike, latent_size: tuple[int, int], num_chunks: int) -> dict[str, Any]:
  """Searches a video as the paper does, 2 beams of 2 candidates."""
  timer, settings, traces = manifest.PhaseTimer(), SearchConfig.released(), []
  with manifest.CompileCounter() as compilations:
    with timer.phase("load"):
      pipeline = Pipeline.load(folder, dtype=dtype, latent_size=latent_size)
    with timer.phase("text"):
      condition = jax.block_until_ready(pipeline.condition(_PROMPT, num_chunks))
    chunks = pipeline.stream(condition, settings, num_chunks=num_chunks, seed=42)
    for index in range(num_chunks):
      with timer.phase(f"chunk_{index}"):
        traces.append(jax.device_get(next(chunks)))
    with timer.phase("assemble"):
      video = pipeline.assemble(condition, settings, traces)
  _require_finite("latents", video.latents)
  return {
    **{f"{name}_seconds": seconds for name, seconds in timer.seconds.items()},
    "compile_seconds": compilations.seconds,
    "usable_candidates": [int(trace.candidates.usable.sum()) for trace in traces],
    "frames": list(video.frames.shape),
    "peak_device_bytes": manifest.peak_device_bytes(),
  }


class Checked(NamedTuple):
  """What is checked, and how.

  Attributes:
    folder: of the converted checkpoint.
    model: sizes.
    dtype: of weights and activations.
    latent_size: rows and columns of a latent frame.
    num_chunks: chunks to search.
  """

  folder: pathlib.Path
  model: ModelConfig
  dtype: DTypeLike
  latent_size: tuple[int, int]
  num_chunks: int


CHECKS: Mapping[str, Callable[[Checked], dict[str, Any]]] = {
  "restore_backbone": lambda what: restore_backbone(what.folder, what.model, what.dtype),
  "encode_prompt": lambda what: encode_prompt(what.folder, what.model, what.dtype),
  "search": lambda what: search(what.folder, what.dtype, what.latent_size, what.num_chunks),
}
"""All of them, in the order in which they run; results are JSON values."""


def _require_finite(what: str, values: np.ndarray) -> None:
  if not np.isfinite(values).all():
    raise ConfigError(f"the {what} are not finite")
