"""The flags of a search, of what judges it and of its devices, for every program that runs one.

`SearchConfig.released()` gives the defaults of the search.
"""

from __future__ import annotations

import sys
from typing import Any

import jax.numpy as jnp
import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import common, device_flags
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig
from streamt1_jax.drivers import check_length, jitted_chunk_step
from streamt1_jax.executables import StoredSteps
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards.table import DEFAULT_REWARDS, LEARNED_REWARDS, REWARDS

_RELEASED = SearchConfig.released()

_SEARCH = flags.DEFINE_enum("search", "stream_t1", ["stream_t1", "none"], "Search, or plain streaming.")
_SEMANTICS = flags.DEFINE_enum(
  "semantics", "released", ["released", "paper"], "Follow the released code or the paper where they differ."
)
_FIELDS = [
  common.define_integer("beam_size", _RELEASED.beam_size, "Candidates per beam and chunk."),
  common.define_integer("top_k", _RELEASED.top_k, "Beams kept after every chunk."),
  common.define_float("noise_sigma", _RELEASED.noise_sigma, "Weight of the parent's noise, in (-1, 1)."),
  common.define_float("short_threshold", _RELEASED.short_threshold, "Rise of the image score to remember."),
  common.define_float("long_threshold", _RELEASED.long_threshold, "Fall of the video score: a new scene."),
  common.define_float("fusion_cap", _RELEASED.fusion_cap, "Largest weight of the image score, in [0, 1]."),
  common.define_integer("sliding_window", _RELEASED.sliding_window, "Chunks the video reward sees."),
  common.define_integer("max_sink_frames", _RELEASED.max_sink_frames, "Latent frames the sinks may grow to."),
]
_REWARD = flags.DEFINE_string(
  "reward",
  None,
  f"Rewards joined by '+', of: {', '.join(REWARDS)}. By default {'+'.join(LEARNED_REWARDS)} if the checkpoint has both "
  f"and there is a search, else {'+'.join(DEFAULT_REWARDS)}.",
)
_REWARD_WEIGHTS = flags.DEFINE_list("reward_weights", None, "Factors of their scores: hpsv3:0.5,videoalign:1. 1 each.")
_SHORT_FRAMES = common.define_integer("short_frames", None, "Frames of a chunk the image reward sees; all by default.")
_REWARD_DTYPE = flags.DEFINE_enum(
  "reward_dtype",
  None,
  ["float32", "bfloat16", "int8"],
  "Of the rewards' weights and activations; the model's by default. int8: kernels in int8, all else bfloat16.",
)

_EXECUTABLES_DIR = common.define_path(
  "executables_dir", None, "Folder of compiled chunk steps: used if they are of this very search, else made anew."
)
flags.adopt_module_key_flags(device_flags)


def search_config(model: ModelConfig) -> SearchConfig:
  """The search that the flags ask for. Raises ConfigError, naming the flag, if it cannot run on `model`."""
  if _SEARCH.value == "none":
    given = [flag.name for flag in (_SEMANTICS, *_FIELDS) if flags.FLAGS[flag.name].present]
    if given:
      raise ConfigError(f"--search=none takes no search flags, got --{', --'.join(given)}")
    return SearchConfig.streaming(model)
  semantics = SearchConfig.paper if _SEMANTICS.value == "paper" else SearchConfig.released
  search = semantics(**{flag.name: flag.value for flag in _FIELDS})
  search.validate_for(model)
  # Both set the size of what every beam carries; more than the longest video has would only fill the memory.
  frames = model.backbone.max_frames
  for name, limit in (("sliding_window", frames // model.chunk_frames), ("max_sink_frames", frames)):
    if getattr(search, name) > limit:
      raise ConfigError(f"{name} must be at most {limit} (rotary tables), got {getattr(search, name)}")
  return search


def load_pipeline(checkpoint: epath.Path, dtype: str = "float32", num_prompts: int = 1) -> Pipeline:
  """The model of a checkpoint with the rewards and on the devices of the flags.

  Raises ConfigError, naming the flag or the file.
  """
  device_flags.use_compilation_cache()
  step = jitted_chunk_step if _EXECUTABLES_DIR.value is None else _stored_steps(_EXECUTABLES_DIR.value)
  model = load_config(checkpoint)
  # No choice is made in plain streaming, so nothing large is loaded to make it.
  default = "+".join(DEFAULT_REWARDS) if _SEARCH.value == "none" else None
  return Pipeline.load(
    checkpoint,
    dtype=jnp.dtype(dtype),
    reward=default if _REWARD.value is None else _REWARD.value,
    reward_weights=_reward_weights(),
    short_frames=_SHORT_FRAMES.value,
    reward_dtype=None if _REWARD_DTYPE.value is None else jnp.dtype(_REWARD_DTYPE.value),
    mesh=device_flags.make_mesh(model, search_config(model), num_prompts),
    decoding=device_flags.DECODING.value,
    attention=device_flags.ATTENTION.value,
    step=step,
  )


def _stored_steps(folder: str) -> StoredSteps:
  common.make_folder("executables_dir", folder)
  # Beside a progress bar, not into it.
  return StoredSteps(epath.Path(folder), lambda line: tqdm.tqdm.write(line, file=sys.stderr))


def _reward_weights() -> dict[str, float]:
  weights = {}
  for item in _REWARD_WEIGHTS.value or ():
    name, _, number = item.partition(":")
    try:
      weight = float(number)
    except ValueError as error:
      raise ConfigError(f"--reward_weights: {item!r} is not name:number, as in hpsv3:0.5") from error
    if name.strip() in weights:
      raise ConfigError(f"--reward_weights: {name.strip()} is given twice")
    weights[name.strip()] = weight
  return weights


def reward_settings(pipeline: Pipeline, dtype: str) -> dict[str, Any]:
  """What judges, as JSON values; `dtype` is the model's. With the checkpoint it decides all scores."""
  choice = pipeline.rewards.choice
  return {
    "image_rewards": choice.image,
    "video_rewards": choice.video,
    "short_frames": choice.short_frames,
    "reward_dtype": (_REWARD_DTYPE.value or dtype) if choice.stored else None,
  }


def video_chunks(
  pipeline: Pipeline, search: SearchConfig, *, seconds: float | None = None, num_latent_frames: int | None = None
) -> int:
  """The length that the flag of the same name gives, in chunks. Raises ConfigError, naming the flag, if it is none."""
  try:
    chunks = pipeline.num_chunks(seconds=seconds, num_latent_frames=num_latent_frames)
    check_length(pipeline.models, search, chunks)
  except (ConfigError, OverflowError) as error:
    given = f"--seconds={seconds}" if num_latent_frames is None else f"--num_latent_frames={num_latent_frames}"
    raise ConfigError(f"{given}: {error}") from error
  return chunks
