"""A world whose best video is known: what a choice chunk by chunk finds, and what only shows at the end of a video.

The first chunk's noise is -3 to 3, whose sign every later chunk keeps, and later noise is 0 to 0.6.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.config import preset
from streamt1_jax.methods import METHODS
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import Condition
from tests import toy_generator as toy

_CHUNKS, _SEED = 4, 6
_NUMBERS = {"particles": {"alpha": 1.0}}


def _draw_noise(seed):
  value = jnp.where(seed < 1000, seed % 7 - 3.0, 0.1 * (seed % 7))
  return toy.draw_noise(seed)._replace(fresh=jnp.full(toy.SHAPE, value, jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Nothing(Promptless):
  def __call__(self, params, condition, chunk, info):
    return jnp.float32(0)


@dataclasses.dataclass(frozen=True)
class _World(Promptless):
  """Locally the sum of all chunks. Otherwise a little for positive chunks, and in the last one much for a negative one.

  Which of the two is said by the condition, so that both worlds share their programs.
  """

  def __call__(self, params, condition, window, info):
    far = jnp.where(info.chunk_index == _CHUNKS - 1, -10 * jnp.sign(window.chunk.mean()), 0.1 * window.chunk.mean())
    return jnp.where(condition, toy.WindowSum()(params, (), window, info), far)


_MODELS = dataclasses.replace(toy.MODELS, image_reward=_Nothing(), video_reward=_World(), draw_noise=_draw_noise)


def _score(name, *, local):
  """What the reward gives the video that a search of four candidates or beams shows."""
  search = METHODS[name].settings(preset("tiny"), numbers=_NUMBERS.get(name))
  assert search.num_candidates == 4
  condition = Condition((), (), jnp.bool_(local), jnp.int32(_CHUNKS))
  made = drivers.stream(toy.PARAMS, condition, _MODELS, search, num_chunks=_CHUNKS, seed=_SEED)
  traces = [jax.device_get(trace) for trace in made]
  beams = drivers.final_beams(toy.PARAMS, condition, _MODELS, search, traces)
  return beams.scores[beams.best]


def test_where_chunks_speak_for_themselves_greedy_finds_the_best_video():
  """Among its candidates is the largest noise there is, in every chunk."""
  chunks = [0.5 * 3]
  for _ in range(1, _CHUNKS):
    chunks.append(1.5 * chunks[-1] + 0.5 * 0.6)
  greedy = _score("greedy", local=True)
  assert greedy == pytest.approx(np.sum(chunks), rel=1e-6)
  assert all(_score(name, local=True) < greedy for name in ("best_of_n", "particles"))


def test_where_the_end_decides_best_of_n_and_particles_find_it_and_greedy_does_not():
  """Three of four first chunks are negative, and the one that is not looks best until the last chunk."""
  assert _score("greedy", local=False) == -10
  assert [_score(name, local=False) for name in ("best_of_n", "particles")] == [10, 10]
