"""The flags of a search, for every program that runs one; `SearchConfig.released()` gives their defaults."""

from __future__ import annotations

from absl import flags

from experiments import common
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig
from streamt1_jax.drivers import check_length
from streamt1_jax.pipeline import Pipeline

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
