"""Configuration: frozen dataclasses, and the presets that name complete models.

Every size here is static: it is part of what XLA compiles. Two kinds of object:

* `ModelConfig` describes a model as it was trained (backbone, codec, text encoder, schedule, attention window).
* `SearchConfig` describes one test-time search over it (candidates, beams, noise, pruning, sinks).

Units: a *latent frame* is one time step of the VAE's latent; a *chunk* is `chunk_frames` latent frames; a *token* is
one patch of a latent frame.
"""

from streamt1_jax.config.base import LATER, MAX_SIZE, ConfigError, choices, require, require_sizes, required
from streamt1_jax.config.model import (
  BackboneConfig,
  CodecConfig,
  ModelConfig,
  ScheduleConfig,
  SearchDefaults,
  TextConfig,
  require_video_model,
  video_chunks,
)
from streamt1_jax.config.presets import PRESETS, preset
from streamt1_jax.config.search import SearchConfig
from streamt1_jax.config.session import SINK_DISTANCE, SessionConfig
from streamt1_jax.config.switch import SwitchConfig

__all__ = [
  "LATER",
  "MAX_SIZE",
  "PRESETS",
  "SINK_DISTANCE",
  "BackboneConfig",
  "CodecConfig",
  "ConfigError",
  "ModelConfig",
  "ScheduleConfig",
  "SearchConfig",
  "SearchDefaults",
  "SessionConfig",
  "SwitchConfig",
  "TextConfig",
  "choices",
  "preset",
  "require",
  "require_sizes",
  "require_video_model",
  "required",
  "video_chunks",
]
