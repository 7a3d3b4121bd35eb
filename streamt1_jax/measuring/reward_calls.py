"""One call of a reward on all candidates of a chunk, as a search makes it: for what weighs and what times it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.hpsv3 import HPSv3
from streamt1_jax.rewards.videoalign import VideoAlign

_CHUNK = 12


def clip_shapes(
  reward: HPSv3 | VideoAlign, frames: int, top_k: int, beam_size: int, frame: tuple[int, int, int]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Shapes of the frames, uint8, that `top_k` beams share and that their `beam_size` candidates add.

  Args:
    reward: the reward.
    frames: of the chunk for HPSv3, of the window for VideoAlign, the newest 12 of which are the candidates' own.
    top_k: beams.
    beam_size: candidates of each.
    frame: [H, W, 3].
  """
  own = frames if isinstance(reward, HPSv3) else min(frames, _CHUNK)
  past = jax.ShapeDtypeStruct((top_k, frames - own, *frame), jnp.uint8)
  return past, jax.ShapeDtypeStruct((top_k, beam_size, own, *frame), jnp.uint8)


def judge(reward: HPSv3 | VideoAlign) -> Callable[..., jax.Array]:
  """The call: (params, embedded prompt, past, chunk) to scores [top_k, beam_size], float32."""

  def scores(params, prompt, past, chunk):
    info = CandidateInfo(jnp.int32(0), jnp.int32(0))
    shown = lambda past, chunk: chunk if isinstance(reward, HPSv3) else FrameWindow(past, past.shape[0], chunk)
    score = lambda past, chunk: reward(params, prompt, shown(past, chunk), info)
    return jax.vmap(jax.vmap(score, in_axes=(None, 0)))(past, chunk)

  return scores
