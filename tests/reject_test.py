"""Early rejection: who goes on is what it would have been, and what a preview decodes nobody remembers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from streamt1_jax import drivers
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.io.named_tuples import fits, named, rebuilt
from streamt1_jax.noise_propagation import NoiseDraws
from streamt1_jax.parallel.mesh import MESH_AXES
from streamt1_jax.policies import Reject, TopK
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import ChunkTrace, Condition
from tests import small_search as small
from tests import toy_generator as toy

NUM_CHUNKS = 5
SEARCH = dataclasses.replace(
  small.SEARCH, noise_sigma=0.0, first_candidate="fresh", policy=Reject(start=6), sliding_window=NUM_CHUNKS
)
CONDITION = Condition((), (), (), jnp.int32(NUM_CHUNKS))


@dataclasses.dataclass(frozen=True)
class Summing(LatentCodec):
  """Its state is the sum of all that it decoded."""

  def init_state(self, params):
    return jnp.zeros(())

  def decode(self, params, latents, state, *, first):
    return latents, state + latents.sum()


@dataclasses.dataclass(frozen=True)
class ThreeSteps(toy.ToyGenerator):
  """Half of what a step predicts and half of the noise between are the next step's input."""

  @property
  def sigmas(self):
    return np.array([1.0, 0.5, 0.5])


def _parts(seed):
  """Whole numbers: the noise a candidate starts from, and what comes after its first and its second step."""
  return seed * 5 % 13, seed % 4, seed % 3


def draw_noise(seed):
  fresh, *between = (jnp.full(toy.SHAPE, part, jnp.float32) for part in _parts(seed))
  return NoiseDraws(fresh, jnp.stack(between))


def draw_start(seed):
  """The same without noise between the steps."""
  return draw_noise(seed)._replace(renoise=jnp.zeros((2, *toy.SHAPE)))


MODELS = dataclasses.replace(toy.MODELS, generator=ThreeSteps(), codec=Summing(toy.SHAPE[1:]), draw_noise=draw_noise)


def _states(search=SEARCH, models=MODELS, condition=CONDITION, **options):
  options = {"num_chunks": NUM_CHUNKS, "seed": 3, **options}
  states = drivers.stream_states(toy.PARAMS, condition, models, search, **options)
  # The next chunk takes the state's buffers.
  return [(jax.tree.map(np.array, state), jax.device_get(trace)) for state, trace in states]


@pytest.fixture(scope="module")
def searched():
  return _states(record=True)


class TestReject:
  def test_by_hand(self, searched):
    """The preview is the first x0, last + noise; the best two of six go on, in the order of their seeds."""
    last = np.zeros(2)
    for chunk, (_, trace) in enumerate(searched):
      seeds = (
        3 + np.arange(12).reshape(2, 6) if chunk == 0 else 3 + 1000 * chunk + 100 * np.arange(2)[:, None] + np.arange(6)
      )
      np.testing.assert_array_equal(trace.inside.seed, seeds)
      preview = last[:, None] + _parts(seeds)[0]
      np.testing.assert_array_equal(trace.inside.preview, preview)
      ancestor = np.sort(np.argsort(-preview, axis=1, kind="stable")[:, :2], axis=1)
      np.testing.assert_array_equal(trace.inside.ancestor, ancestor)
      kept = np.take_along_axis(seeds, ancestor, axis=1)
      np.testing.assert_array_equal(trace.candidates.seed, kept)
      start, first, second = _parts(kept)
      latents = last[:, None] + (last[:, None] + (last[:, None] + start + first) / 2 + second) / 2
      np.testing.assert_array_equal(trace.steps["x0"][:, :, -1].reshape(2, 2), latents)
      np.testing.assert_array_equal(trace.latents.ravel(), latents.ravel()[trace.survivor])
      last = trace.latents.ravel()

  def test_who_goes_on_is_what_it_would_have_been(self, searched):
    """To the bit: against a search that finishes all six, in the first chunk, which begins with the same state."""
    (_, wide), *_ = _states(dataclasses.replace(SEARCH, beam_size=6, policy=None), record=True)
    trace = searched[0][1]
    for beam, ancestors in enumerate(trace.inside.ancestor):
      np.testing.assert_array_equal(trace.steps["x0"][beam], wide.steps["x0"][beam, ancestors])
      np.testing.assert_array_equal(trace.steps["noise"][beam], wide.steps["noise"][beam, ancestors])
      np.testing.assert_array_equal(trace.candidates.hybrid[beam], wide.candidates.hybrid[beam, ancestors])

  def test_a_preview_that_knows_the_end_loses_nothing(self):
    """Without noise between the steps the first x0 ranks as the last one does: the winners are those of all six."""
    few, all_six = (
      _states(search, models=dataclasses.replace(MODELS, draw_noise=draw_start))
      for search in (SEARCH, dataclasses.replace(SEARCH, beam_size=6, policy=None))
    )
    for (state, trace), (other, wide) in zip(few, all_six, strict=True):
      np.testing.assert_array_equal(trace.latents, wide.latents)
      np.testing.assert_array_equal(trace.score, wide.score)
      chex.assert_trees_all_equal(state.beams, other.beams)

  def test_with_as_many_as_are_finished_nothing_is_rejected(self):
    same = _states(dataclasses.replace(SEARCH, policy=Reject(start=2)))
    chex.assert_trees_all_equal(same, _states(dataclasses.replace(SEARCH, policy=TopK())))

  def test_nobody_remembers_a_preview(self, searched):
    """The decoder's state is the sum of what the lineage shows, and of nothing else."""
    path = drivers.lineage([trace.survivor for _, trace in searched], 2)
    shown = [trace.latents.ravel()[beams] for (_, trace), beams in zip(searched, path, strict=True)]
    np.testing.assert_allclose(searched[-1][0].beams.codec, np.sum(shown, axis=0), rtol=1e-6)

  def test_what_is_not_usable_does_not_go_on(self):
    """Seeds 5 and 11 of the first chunk would have the best previews but for their NaN; of one beam all but one are."""

    def spoiled(seed):
      bad = (seed == 5) | ((seed >= 10) & (seed <= 14))
      return draw_noise(seed)._replace(fresh=jnp.where(bad, jnp.nan, draw_noise(seed).fresh))

    _, trace = _states(models=dataclasses.replace(MODELS, draw_noise=spoiled))[0]
    assert 2 not in trace.inside.ancestor[0]
    assert trace.inside.usable.tolist() == [[True, True, False, True, True, True], [True, *[False] * 5]]
    assert trace.inside.ancestor[1].tolist() == [0, 0]

  def test_without_judges_the_preview_decides(self):
    class Refuse(Promptless):
      def __call__(self, params, condition, frames, info):
        raise AssertionError("a reward was called")

    models = dataclasses.replace(MODELS, video_reward=Refuse())
    search = dataclasses.replace(SEARCH, judges=False, beam_size=1)
    for _, trace in _states(search, models=models):
      assert trace.survivor.tolist() == [0, 1]
      np.testing.assert_array_equal(trace.inside.ancestor[:, 0], np.argmax(trace.inside.preview, axis=1))

  def test_one_of_a_chunk_that_is_not_judged(self):
    """Nothing is rejected in the chunks between those that are judged."""
    search = dataclasses.replace(SEARCH, judge_every=2)
    found = [trace.inside is not None for _, trace in _states(search)]
    assert found == [True, False, True, False, True]
    rolled = drivers.rollout(toy.PARAMS, CONDITION, MODELS, search, num_chunks=NUM_CHUNKS, seed=3)
    assert [trace.inside is not None for trace in rolled] == found


class TestDrivers:
  def test_rollout(self, searched):
    rolled = drivers.rollout(toy.PARAMS, CONDITION, MODELS, SEARCH, num_chunks=NUM_CHUNKS, seed=3)
    for (_, trace), other in zip(searched, rolled, strict=True):
      chex.assert_trees_all_close(trace._replace(steps=None), other, rtol=1e-6)
      np.testing.assert_array_equal(trace.survivor, other.survivor)

  def test_across_a_stop(self):
    usual = _states()
    with CompileCounter() as compiles:
      again = _states(state=jax.tree.map(np.array, usual[1][0]))
      _states(seed=4)
    assert compiles.count == 0
    chex.assert_trees_all_equal(again, usual[2:])

  def test_prompts_in_lockstep_on_several_devices(self, searched):
    mesh = jax.make_mesh((1, 2, 2, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:4])
    models = dataclasses.replace(MODELS, execution=Execution(mesh=mesh, decoding="in_turn"))
    together = _states(models=models, condition=drivers.stack_conditions([CONDITION] * 2, mesh), seed=[11, 3])
    for (_, traces), (_, trace) in zip(together, searched, strict=True):
      np.testing.assert_array_equal(traces.survivor[1], trace.survivor)
      np.testing.assert_array_equal(traces.inside.ancestor[1], trace.inside.ancestor)
      np.testing.assert_array_equal(traces.latents[1], trace.latents)

  def test_saved_traces_have_it(self, searched):
    trace = searched[0][1]._replace(steps=None)
    assert fits(ChunkTrace, named(trace))
    chex.assert_trees_all_equal(rebuilt(ChunkTrace, named(trace)), trace)
    without = trace._replace(inside=None)
    assert fits(ChunkTrace, named(without))
    chex.assert_trees_all_equal(rebuilt(ChunkTrace, named(without)), without)
    part = {name: leaf for name, leaf in named(trace).items() if name != "inside/seed"}
    assert not fits(ChunkTrace, part)
    assert not fits(ChunkTrace, {**named(without), "inside/more": 0})


class TestRefusal:
  @pytest.mark.parametrize(
    ("policy", "message"),
    [
      (Reject(start=1), "start must be at least beam_size 2, got 1"),
      (Reject(step=2), r"step must be before the last of the 3 denoising steps, in 0\.\.1: got 2"),
      (Reject(latent_frames=2), r"latent_frames must be in 1\.\.1, those of a chunk, got 2"),
    ],
  )
  def test_searches(self, policy, message):
    with pytest.raises(ConfigError, match=message):
      _states(dataclasses.replace(SEARCH, policy=policy))

  def test_mesh(self):
    mesh = jax.make_mesh((1, 1, 4, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:4])
    models = dataclasses.replace(MODELS, execution=Execution(mesh=mesh))
    with pytest.raises(ConfigError, match="start must be a multiple of the 4 devices of a beam's candidates, got 6"):
      _states(models=models)

  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"start": 101}, r"start must be in 1\.\.100, got 101"),
      ({"step": -1}, "step must be at least 0, got -1"),
      ({"frames": 0}, "frames must be at least 1, got 0"),
    ],
  )
  def test_values(self, fields, message):
    with pytest.raises(ConfigError, match=message):
      Reject(**fields)


def test_plain_streaming_of_one():
  """One beam that begins with one candidate: as without judges and policy, to the bit."""
  plain = SearchConfig.streaming(small.MODEL)
  judged = dataclasses.replace(plain, judges=True, policy=Reject(start=1))
  for (_, trace), (_, other) in zip(_states(judged), _states(plain), strict=True):
    np.testing.assert_array_equal(trace.latents, other.latents)
