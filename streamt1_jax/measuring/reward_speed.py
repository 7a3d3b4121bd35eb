"""What it costs to judge a candidate of the shapes world."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from streamt1_jax.data import shapes
from streamt1_jax.measuring import reward_calls
from streamt1_jax.measuring.search_speed import gemm_tflops
from streamt1_jax.rewards.base import LoadedReward
from streamt1_jax.rewards.spec import RewardSpec

# Frames of a chunk, as `--short_frames` leaves them to an image reward, or of a sliding window.
_FRAMES = {"image": (12, 6, 3, 1), "video": (117, 57, 9)}


def measure(
  spec: RewardSpec, loaded: LoadedReward, dtype: DTypeLike, top_k: int, beam_size: int, repeats: int
) -> list[dict[str, float]]:
  """Seconds of one call on all candidates divided by their number, by the frames that the reward is given.

  Frames are noise of the shapes world's size, the prompt is its first caption. FLOP are counted from shapes. The
  fraction is that of the rate of matrix products measured beside the calls, and the fastest call counts.
  """
  reward, rows = loaded.reward, []
  tokens = loaded.prompt(shapes.caption(*shapes.all_scenes()[0]))
  condition = reward.init(loaded.params, tokens)
  judge = jax.jit(reward_calls.judge(spec, reward))
  size = (shapes.FRAME_SIZE, shapes.FRAME_SIZE)
  draw = np.random.default_rng(0).integers
  for frames in _FRAMES[spec.kind]:
    structs = reward_calls.clip_shapes(spec, frames, top_k, beam_size, (*size, 3))
    clips = [jnp.asarray(draw(256, size=struct.shape, dtype=np.uint8)) for struct in structs]
    jax.block_until_ready(judge(loaded.params, condition, *clips))
    times, rates = [], [gemm_tflops(dtype)]
    for _ in range(repeats):
      began = time.perf_counter()
      jax.block_until_ready(judge(loaded.params, condition, *clips))
      times.append(time.perf_counter() - began)
    rates.append(gemm_tflops(dtype))
    flop = spec.flop(reward, frames, size, len(tokens.before) + len(tokens.after))
    seconds = min(times) / (top_k * beam_size)
    rows.append(
      {
        "frames": frames,
        "gflop": flop / 1e9,
        "milliseconds": 1e3 * seconds,
        "gemm_fraction": flop / seconds / 1e12 / max(rates),
      }
    )
  return rows
