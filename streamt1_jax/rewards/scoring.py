"""Whole videos scored by a reward, one at a time: any length, size and speed.

  number of frames, fps ── look_at ── indices ── decoded by the caller ── frames uint8 ── scores by column

The search scores candidates inside its own compiled step. Here everything that differs from file to file is an
argument. XLA compiles once per frame size, and on top of it once per number of frames that VideoAlign looks at, once
per length for coherence, and once per 64 tokens of prompt. The frame rate decides on the host which frames are looked
at, and compiles nothing.
"""

from typing import Any

import jax.numpy as jnp
from etils import epath

from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards import window_codecs
from streamt1_jax.rewards.scorers import EVERY_FRAME, FrameScorer, ScoringOptions, VideoScorer, WindowScorer
from streamt1_jax.rewards.spec import RewardTable
from streamt1_jax.rewards.table import REWARDS


def make_scorer(
  name: str,
  folder: epath.PathLike,
  *,
  dtype: Any = jnp.bfloat16,
  options: ScoringOptions = EVERY_FRAME,
  reward_codec: str = "none",
  table: RewardTable = REWARDS,
) -> VideoScorer:
  """A reward that scores whole videos.

  Args:
    name: a reward of the table without weights, or any name for the one in `folder`.
    folder: what `convert.reward_part` or `folder.save_reward` wrote. It need not exist for a reward without weights.
    dtype: dtype of the backbone.
    options: how an image reward goes through a video.
    reward_codec: what a video goes through before a video reward sees it, a name of `window_codecs.REWARD_CODECS`.
    table: the rewards there are.

  Raises:
    ConfigError: a file of the reward is missing, damaged or does not fit the others.
  """
  spec = table.get(name)
  if spec is not None and not spec.is_stored:
    loaded = reward_folder.without_weights(spec, folder, fps=1.0)
  else:
    spec, _ = reward_folder.load_config(folder, table)
    loaded = reward_folder.load_reward(folder, fps=1.0, dtype=dtype, table=table)
  parts = (name, loaded.reward, loaded.params, loaded.prompt, spec.reads_prompt)
  if spec.scorer is not None:
    scorer = spec.scorer(name, loaded, options)
  else:
    scorer = FrameScorer(*parts, options) if spec.on_frames else WindowScorer(*parts)
  return scorer if spec.on_frames else window_codecs.find(reward_codec).scorer(scorer)
