"""A reward with weights from outside the package: do the frames have the colours that the prompt names?

prompt ── which words it has ── the colours of these words (weights) ──┐
window ── mean colour of each of its newest frames ────────────────────┴── how close they are
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from streamt1_jax.rewards.folder import save_reward
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.table import REWARDS

COLORS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9)}


@dataclasses.dataclass(frozen=True)
class ColorMatchConfig:
  """Sizes: what decides the shapes of weights, or what is compiled. Stored in `reward.json`."""

  num_words: int
  frames: int = 4


@dataclasses.dataclass(frozen=True)
class ColorMatch:
  """`VideoReward`: minus the mean distance, in RGB of 0..1, between frames and the colour of the prompt."""

  config: ColorMatchConfig

  def init(self, params, prompt_features):
    """The mean colour [3] of the words of the prompt; once per video."""
    return prompt_features @ params["color"] / jnp.maximum(prompt_features.sum(), 1.0)

  def __call__(self, params, condition, window, info):
    """Score of a window, float32 scalar; vmapped over candidates and beams."""
    newest = window.take(window.num_frames - 1 - jnp.arange(self.config.frames))
    color = newest.astype(jnp.float32).mean(axis=(1, 2)) / 255.0
    return -jnp.linalg.norm(color - condition[None], axis=-1).mean()


def abstract_params(config: ColorMatchConfig, dtype) -> dict:
  """Shapes of the weights."""
  return {"color": jax.ShapeDtypeStruct((config.num_words, 3), dtype)}


def read_prompt(folder, config: ColorMatchConfig):
  """What turns a prompt into `prompt_features`: which of the words in `words.txt` it has, [num_words]."""
  words = (folder / "words.txt").read_text().split()
  return lambda prompt: np.array([word in prompt.split() for word in words], np.float32)


SPEC = RewardSpec(
  "color_match",
  "video",
  make=lambda config, fps: ColorMatch(config),
  config_type=ColorMatchConfig,
  abstract_params=abstract_params,
  read_prompt=read_prompt,
)

WITH_COLOR_MATCH = {**REWARDS, SPEC.name: SPEC}
"""What `Pipeline.load(..., reward="quality+color_match", reward_table=WITH_COLOR_MATCH)` and `make_scorer` take."""


def save(checkpoint: pathlib.Path) -> pathlib.Path:
  """Writes the reward into a checkpoint."""
  folder = checkpoint / "rewards" / SPEC.name
  params = {"color": np.array(list(COLORS.values()), np.float32)}
  save_reward(folder, SPEC, ColorMatchConfig(len(COLORS)), params, {"words.txt": " ".join(COLORS).encode()})
  return folder
