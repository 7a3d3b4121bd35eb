"""Stream-T1 in JAX/Flax: test-time scaling for streaming video generation (arXiv 2605.04461).

import streamt1_jax as st1

pipeline = st1.Pipeline.load()
video = pipeline.generate("a red circle moves left over a dark blue background", seconds=5)
video.save("circle.mp4")
"""

from streamt1_jax.chunk_step import chunk_step
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, SwitchConfig, preset
from streamt1_jax.drivers import FinalBeams, SearchError, final_beams, rollout, stream
from streamt1_jax.generator import Generator, Models
from streamt1_jax.io.timeline import Timeline
from streamt1_jax.models import make_models
from streamt1_jax.pipeline import Pipeline, Video
from streamt1_jax.policies import KeepBeams, Policy, TopK
from streamt1_jax.receipts import Receipt
from streamt1_jax.rewards.base import FrameWindow, ImageReward, VideoReward
from streamt1_jax.rewards.folder import save_reward
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.sampling import Sampler
from streamt1_jax.session import Chunk, Session
from streamt1_jax.state import ChunkTrace, Condition, SearchState

__version__ = "0.2.0"

__all__ = [
  "Chunk",
  "ChunkTrace",
  "Condition",
  "ConfigError",
  "FinalBeams",
  "FrameWindow",
  "Generator",
  "ImageReward",
  "KeepBeams",
  "ModelConfig",
  "Models",
  "Pipeline",
  "Policy",
  "REWARDS",
  "Receipt",
  "RewardSpec",
  "Sampler",
  "SearchConfig",
  "SearchError",
  "SearchState",
  "Session",
  "SwitchConfig",
  "Timeline",
  "TopK",
  "Video",
  "VideoReward",
  "chunk_step",
  "final_beams",
  "make_models",
  "preset",
  "rollout",
  "save_reward",
  "stream",
]
