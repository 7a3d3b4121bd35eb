"""One call of a reward on all candidates of a chunk, as a search makes it, for programs that weigh and time it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.spec import RewardSpec

_CHUNK = 12


def clip_shapes(
  spec: RewardSpec, frames: int, top_k: int, beam_size: int, frame: tuple[int, int, int]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Shapes of the frames, uint8, that `top_k` beams share and that their `beam_size` candidates add.

  Args:
    spec: of the reward.
    frames: frames of the chunk for an image reward. For a video reward those of the window, whose newest 12 are the
      candidates' own.
    top_k: beams.
    beam_size: candidates of each.
    frame: [H, W, 3].
  """
  own = frames if spec.on_frames else min(frames, _CHUNK)
  past = jax.ShapeDtypeStruct((top_k, frames - own, *frame), jnp.uint8)
  return past, jax.ShapeDtypeStruct((top_k, beam_size, own, *frame), jnp.uint8)


def judge(spec: RewardSpec, reward: Any) -> Callable[..., Float32[Array, "K B"]]:
  """The call: (params, condition, past, chunk) to scores [top_k, beam_size], float32."""

  def scores(params, condition, past, chunk):
    info = CandidateInfo(jnp.int32(0), jnp.int32(0))
    shown = lambda past, chunk: chunk if spec.on_frames else FrameWindow(past, past.shape[0], chunk)
    score = lambda past, chunk: reward(params, condition, shown(past, chunk), info)
    return jax.vmap(jax.vmap(score, in_axes=(None, 0)))(past, chunk)

  return scores
