"""Temporal coherence without a model: what is seen stays, and moves evenly."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class TemporalCoherence:
  """Prompt-free `VideoReward`: one minus the change of colour spread between consecutive frames of the chunk."""

  def init(self, params: Params, prompt_features: Any) -> dict:
    """Nothing depends on the prompt."""
    return {}

  def __call__(self, params: Params, condition: Any, window: FrameWindow, info: CandidateInfo) -> jax.Array:
    """Score of the window, float32 scalar, finite, higher is better."""
    frames = window.chunk.astype(jnp.float32) / 255.0
    spread = jnp.log(jnp.sqrt(jnp.var(frames, axis=(1, 2)).sum(-1) + 1e-3))
    return 1.0 - jnp.mean(jnp.abs(jnp.diff(spread)))
