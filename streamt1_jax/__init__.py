"""Stream-T1 in JAX/Flax: test-time scaling for streaming video generation (arXiv 2605.04461).

import streamt1_jax as st1

pipeline = st1.Pipeline.load("checkpoints/tiny")
video = pipeline.generate("a red circle moves left over a dark blue background", seconds=5)
video.save("circle.mp4")
"""

from streamt1_jax.chunk_step import chunk_step
from streamt1_jax.config import (
  BackboneConfig,
  CodecConfig,
  ConfigError,
  ModelConfig,
  ScheduleConfig,
  SearchConfig,
  TextConfig,
  preset,
)
from streamt1_jax.drivers import FinalBeams, SearchError, final_beams, rollout, stream
from streamt1_jax.generator import Generator, Models
from streamt1_jax.pipeline import Pipeline, Video
from streamt1_jax.rewards.base import FrameWindow, ImageReward, VideoReward
from streamt1_jax.state import ChunkTrace, Condition, SearchState, init_state

__version__ = "0.1.0"

__all__ = [
  "BackboneConfig",
  "ChunkTrace",
  "CodecConfig",
  "Condition",
  "ConfigError",
  "FinalBeams",
  "FrameWindow",
  "Generator",
  "ImageReward",
  "ModelConfig",
  "Models",
  "Pipeline",
  "ScheduleConfig",
  "SearchConfig",
  "SearchError",
  "SearchState",
  "TextConfig",
  "Video",
  "VideoReward",
  "chunk_step",
  "final_beams",
  "init_state",
  "preset",
  "rollout",
  "stream",
]
