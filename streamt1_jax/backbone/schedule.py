"""Few-step flow-matching schedule and the sinusoidal timestep features.

All tables are built with numpy in float64 and cast once: computed in float32 the angles `t * w` are off by up to 4e-5.
Source: docs/reference/wan_dit.md (schedule, time embedding).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, Float64

from streamt1_jax.config import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class DenoisingSchedule:
  """Static tables of one schedule; S is the number of denoising steps.

  Attributes:
    timesteps: on the 0..1000 scale, largest first.
    sigmas: noise levels in (0, 1] of the same entries.
    features: sinusoids of `timesteps`.
    context_features: sinusoids of the clean pass's timestep.
  """

  timesteps: Float64[np.ndarray, " S"]
  sigmas: Float64[np.ndarray, " S"]
  features: Float32[np.ndarray, "S freq_dim"]
  context_features: Float32[np.ndarray, " freq_dim"]


def sigma_table(config: ScheduleConfig) -> Float64[np.ndarray, " num_train_timesteps"]:
  """Noise levels of the training timesteps, descending.

  s_i = 1 - i / n,   sigma_i = shift * s_i / (1 + (shift - 1) * s_i),   t_i = n * sigma_i
  """
  s = 1.0 - np.arange(config.num_train_timesteps) / config.num_train_timesteps
  return config.shift * s / (1.0 + (config.shift - 1.0) * s)


def time_features(timesteps: Float[np.ndarray, "*axes"], freq_dim: int) -> Float32[np.ndarray, "*axes {freq_dim}"]:
  """Sinusoids `[cos(t w) | sin(t w)]` with w_i = 10000^(-2 i / freq_dim)."""
  half = freq_dim // 2
  w = 10000.0 ** (-np.arange(half) / half)
  angles = np.asarray(timesteps, np.float64)[..., None] * w
  return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def denoising_schedule(config: ScheduleConfig, freq_dim: int) -> DenoisingSchedule:
  """The tables of the sampler: entry s of `denoising_steps` is the training timestep at index n - s."""
  index = config.num_train_timesteps - np.asarray(config.denoising_steps)
  sigmas = sigma_table(config)[index]
  # The published sampler carries timesteps in float32 and builds their sinusoids from the rounded value.
  timesteps = (config.num_train_timesteps * sigmas).astype(np.float32).astype(np.float64)
  return DenoisingSchedule(
    timesteps=timesteps,
    sigmas=sigmas,
    features=time_features(timesteps, freq_dim),
    context_features=time_features(np.asarray(config.context_timestep), freq_dim),
  )
