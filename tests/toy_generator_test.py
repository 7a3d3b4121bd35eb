"""The search knows no model: a generator of forty lines is searched by the same functions, and by hand."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from streamt1_jax import drivers
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.parallel.mesh import MESH_AXES
from streamt1_jax.policies import KeepBeams
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import Condition
from tests import toy_generator as toy

SEARCH = SearchConfig(noise_sigma=0.0, first_candidate="fresh", sliding_window=2, fusion_cap=0.5)


def _by_stream(num_chunks, search):
  condition = Condition((), (), (), jnp.int32(num_chunks))
  traces = drivers.stream(toy.PARAMS, condition, toy.MODELS, search, num_chunks=num_chunks, seed=0)
  return [jax.device_get(trace) for trace in traces]


def _by_rollout(num_chunks, search):
  condition = Condition((), (), (), jnp.int32(num_chunks))
  traces = drivers.rollout(toy.PARAMS, condition, toy.MODELS, search, num_chunks=num_chunks, seed=0)
  return [jax.device_get(trace) for trace in traces]


def _on_devices(num_chunks, search):
  """By stream, every beam on a device of its own."""
  mesh = jax.make_mesh(
    (1, search.top_k, 1, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[: search.top_k]
  )
  models = dataclasses.replace(toy.MODELS, execution=Execution(mesh=mesh))
  condition = Condition((), (), (), jnp.int32(num_chunks))
  traces = drivers.stream(toy.PARAMS, condition, models, search, num_chunks=num_chunks, seed=0)
  return [jax.device_get(trace) for trace in traces]


drivers_of_a_search = pytest.mark.parametrize(
  "run", [_by_stream, _by_rollout, _on_devices], ids=["stream", "rollout", "devices"]
)


@drivers_of_a_search
def test_two_chunks_by_hand(run):
  first, second = run(2, SEARCH)
  # Seeds 0 to 3 are the noise; a chunk is half of it, and both rewards see nothing but the chunk.
  np.testing.assert_array_equal(first.candidates.seed, [[0, 1], [2, 3]])
  np.testing.assert_array_equal(first.candidates.short, [[0.0, 0.5], [1.0, 1.5]])
  np.testing.assert_array_equal(first.survivor, [3, 2])
  # The beams remember 1.5 and 1.0. Seeds 1000, 1001, 1100 and 1101 leave 6, 0, 1 and 2.
  np.testing.assert_array_equal(second.candidates.short, [[5.25, 2.25], [2.0, 2.5]])
  # The window holds both chunks, and the weight of the short-term score is 1/2 at the end.
  np.testing.assert_array_equal(second.candidates.long, [[6.75, 3.75], [3.0, 3.5]])
  np.testing.assert_array_equal(second.candidates.hybrid, [[6.0, 3.0], [2.5, 3.0]])
  # Candidates 1 and 3 are equal, and the earlier one survives.
  np.testing.assert_array_equal(second.survivor, [0, 1])
  np.testing.assert_array_equal(second.latents.ravel(), [5.25, 2.25])
  np.testing.assert_array_equal(second.score, [6.0, 3.0])


@drivers_of_a_search
def test_beams_that_stay_apart(run):
  """One candidate each: two videos that never meet, whatever they score."""
  first, second = run(2, dataclasses.replace(SEARCH, beam_size=1, policy=KeepBeams()))
  np.testing.assert_array_equal(first.latents.ravel(), [0.0, 0.5])
  # Seeds 1000 and 1100 leave 6 and 1: 0 + (0 + 6) / 2 and 0.5 + (0.5 + 1) / 2.
  np.testing.assert_array_equal(second.latents.ravel(), [3.0, 1.25])
  np.testing.assert_array_equal(second.survivor, [0, 1])


def _in_python(num_chunks: int, search: SearchConfig) -> list[list[float]]:
  """The chunks of the surviving beams, searched without arrays."""
  beams = [[] for _ in range(search.top_k)]
  for chunk in range(num_chunks):
    weight = min(chunk / (num_chunks - 1), search.fusion_cap)
    candidates = []
    for k, video in enumerate(beams):
      for i in range(search.beam_size):
        seed = 1000 * chunk + 100 * k + i if chunk else k * search.beam_size + i
        last = video[-1] if video else 0.0
        latent = last + (last + seed % 7) / 2
        window = sum([*video, latent][-search.sliding_window :])
        candidates.append((weight * latent + (1 - weight) * window, [*video, latent]))
    # Sorting is stable: of equals the earlier one comes first.
    beams = [video for _, video in sorted(candidates, key=lambda candidate: -candidate[0])[: search.top_k]]
  return beams


@drivers_of_a_search
@pytest.mark.parametrize("changes", [{}, {"beam_size": 3, "top_k": 1}, {"sliding_window": 4}], ids=str)
def test_longer_searches(run, changes):
  search = dataclasses.replace(SEARCH, **changes)
  traces = run(6, search)
  path = drivers.lineage([trace.survivor for trace in traces], search.beam_size)
  videos = [[float(trace.latents[k].item()) for trace, k in zip(traces, path[:, beam])] for beam in range(search.top_k)]
  assert videos == _in_python(6, search)


@dataclasses.dataclass(frozen=True)
class PerFrame(Promptless):
  """One score for each frame, where one for all of them is asked for."""

  def __call__(self, params, condition, frames, info):
    return getattr(frames, "chunk", frames).mean(axis=(1, 2, 3))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_reward_that_gives_several_scores(kind):
  """They would broadcast against the candidates, and the search would go on among candidates that do not exist."""
  models = dataclasses.replace(toy.MODELS, **{f"{kind}_reward": PerFrame()})
  condition = Condition((), (), (), jnp.int32(2))
  with pytest.raises(ConfigError, match=rf"the {kind} reward must give a candidate one score, got .* shape \(1,\)"):
    next(drivers.stream(toy.PARAMS, condition, models, SEARCH, num_chunks=2, seed=0))


class Numbers(NamedTuple):
  """A memory that calls its numbers as keys are called that have heads."""

  k: jax.Array


class Ascending(toy.ToyGenerator):
  """Adds the largest of four numbers to all of them whenever a chunk begins, and shows their sum."""

  def init_memory(self, params, search):
    return Numbers(jnp.arange(4.0).reshape(1, 1, 4))

  def open(self, memory, search):
    return Numbers(memory.k + memory.k.max(axis=-1, keepdims=True)), super().open(memory, search)[1]

  def view(self, memory, chunk_index, search):
    return memory.k.sum().reshape(toy.SHAPE)

  def commit(self, memory, chunk, flags, chunk_index):
    return memory

  def gather(self, memories, parents):
    return Numbers(memories.k[parents])


def test_a_memory_is_divided_as_its_generator_says():
  """By beams alone, on two devices that share the heads of a Wan model: each of them needs all four numbers."""
  mesh = jax.make_mesh((1, 1, 1, 2, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:2])
  models = dataclasses.replace(toy.MODELS, generator=Ascending(), execution=Execution(mesh=mesh))
  condition = Condition((), (), (), jnp.int32(2))
  first, second = drivers.stream(toy.PARAMS, condition, models, SEARCH, num_chunks=2, seed=0)
  # The sums are 6 + 4 * 3 = 18, then 18 + 4 * 6 = 42. A chunk is 1.5 times the sum and half of the noise. The noise is
  # that of seeds 3 and 2, then that of seeds 1000 and 1101, which leave 6 and 2.
  np.testing.assert_array_equal(first.latents.ravel(), [28.5, 28.0])
  np.testing.assert_array_equal(second.latents.ravel(), [66.0, 64.0])


def test_longest_video():
  with pytest.raises(ConfigError, match=r"number of chunks must be in 1\.\.8"):
    _by_stream(9, SEARCH)
