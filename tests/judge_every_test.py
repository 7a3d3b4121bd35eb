"""Searches that judge only some chunks: what the others leave alone, and that all drivers agree on which those are."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from streamt1_jax import drivers
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.memory_sinking import DISCARD, NOTHING
from streamt1_jax.parallel.mesh import MESH_AXES
from streamt1_jax.policies import Particles, TopK
from streamt1_jax.state import Condition
from tests import small_search as small
from tests import toy_generator as toy
from tests.whole_video import describe_trace

NUM_CHUNKS = 8
SEARCH = dataclasses.replace(
  small.SEARCH, beam_size=3, noise_sigma=0.0, first_candidate="fresh", judge_every=3, policy=TopK(cumulative=True)
)
"""Chunks 0, 3 and 6 are judged; the last one is not."""
CONDITION = Condition((), (), (), jnp.int32(NUM_CHUNKS))


def _states(search=SEARCH, models=toy.MODELS, condition=CONDITION, **options):
  options = {"num_chunks": NUM_CHUNKS, "seed": 3, **options}
  states = drivers.stream_states(toy.PARAMS, condition, models, search, **options)
  # The next chunk takes the state's buffers.
  return [(jax.tree.map(np.array, state), jax.device_get(trace)) for state, trace in states]


@pytest.fixture(scope="module")
def searched():
  return _states()


def _is_judged(chunk):
  return chunk in (0, 3, 6)


class TestUnjudgedChunks:
  def test_one_candidate_per_beam_goes_on(self, searched):
    """By hand: a chunk is last + (last + noise) / 2, and its noise is seed % 7, of seed 3 + 1000 chunk + 100 beam."""
    for chunk, ((_, before), (_, trace)) in enumerate(zip(searched, searched[1:]), start=1):
      if _is_judged(chunk):
        continue
      assert trace.survivor.tolist() == [0, 3]
      seeds = [3 + 1000 * chunk + 100 * beam for beam in range(2)]
      assert trace.candidates.seed[:, 0].tolist() == seeds
      last = before.latents.ravel()
      np.testing.assert_array_equal(trace.latents.ravel(), last + (last + np.array(seeds) % 7) / 2)
      assert trace.candidates.usable.tolist() == [[True, False, False]] * 2
      assert not np.any([*trace.candidates.hybrid, *trace.candidates.flags.ema, *trace.candidates.flags.append])

  def test_a_beam_without_a_usable_candidate_goes_on_from_another(self, searched):
    """In chunk 1 beam 0 has none: both beams are then beam 1, with its scores and what the policy remembers of it."""
    bad = lambda seed: toy.draw_noise(seed)._replace(
      fresh=toy.draw_noise(seed).fresh + jnp.where(seed == 1003, jnp.nan, 0.0)
    )
    made = _states(models=dataclasses.replace(toy.MODELS, draw_noise=bad))
    assert made[1][1].survivor.tolist() == [3, 3]
    assert made[1][1].candidates.usable[:, 0].tolist() == [False, True]
    for kept in (lambda state: state.beams, lambda state: state.policy):
      expected = jax.tree.map(lambda x: x[[1, 1]], kept(searched[1][0]))
      chex.assert_trees_all_equal(kept(made[1][0]), expected)
    assert made[2][1].survivor.tolist() == [0, 3]
    none = dataclasses.replace(toy.MODELS, draw_noise=lambda seed: bad(jnp.where(seed // 1000 == 1, 1003, seed)))
    with pytest.raises(drivers.SearchError, match="chunk 1, seed 3: every candidate is NaN or Inf"):
      _states(models=none)

  def test_scores_and_carry_stay(self, searched):
    for chunk, ((before, _), (after, _)) in enumerate(zip(searched, searched[1:]), start=1):
      kept = [(state.beams.history, state.policy) for state in (before, after)]
      same = jax.tree.all(jax.tree.map(np.array_equal, *kept))
      assert same != _is_judged(chunk)

  def test_the_window_goes_on(self, searched):
    """Judged chunks see the unjudged ones: the long-term score is the sum of the window's three chunks."""
    path = drivers.lineage([trace.survivor for _, trace in searched[:7]], 3)
    for beam in range(2):
      window = [searched[chunk][1].latents[path[chunk, beam]].item() for chunk in (4, 5, 6)]
      trace = searched[6][1]
      assert trace.candidates.long.ravel()[trace.survivor[beam]] == sum(window)

  def test_judged_chunks_choose(self, searched):
    for chunk in (0, 3, 6):
      trace = searched[chunk][1]
      assert trace.candidates.usable.all()
      assert len(set(trace.candidates.hybrid.ravel().tolist())) > 1

  def test_they_are_not_worth_remembering(self):
    """Every chunk that is judged is, by this threshold, and what it leaves when it is evicted is not discarded."""
    search = dataclasses.replace(small.SEARCH, short_threshold=-10.0, judge_every=2)
    arguments = small.params(), small.condition(NUM_CHUNKS), small.models(), search
    routes = {}
    for trace in drivers.stream(*arguments, num_chunks=NUM_CHUNKS, seed=0):
      for route, frame in zip(trace.eviction.route.tolist(), trace.eviction.frame.tolist(), strict=True):
        if route != NOTHING:
          routes.setdefault(frame // 3, set()).add(route)
    assert len(routes) > 2
    assert all((routes[chunk] == {DISCARD}) == (chunk % 2 == 1) for chunk in routes)


class TestDrivers:
  def test_rollout(self, searched):
    rolled = drivers.rollout(toy.PARAMS, CONDITION, toy.MODELS, SEARCH, num_chunks=NUM_CHUNKS, seed=3)
    for (_, trace), other in zip(searched, rolled, strict=True):
      chex.assert_trees_all_close(trace, other, rtol=1e-6)
      np.testing.assert_array_equal(trace.survivor, other.survivor)

  @pytest.mark.parametrize("chunks", [1, 3, 5])
  def test_across_a_stop(self, searched, chunks):
    """Which chunk is judged depends on its place in the video alone."""
    again = _states(state=jax.tree.map(np.array, searched[chunks - 1][0]))
    chex.assert_trees_all_equal(again, searched[chunks:])

  def test_prompts_in_lockstep_on_several_devices(self, searched):
    mesh = jax.make_mesh((1, 2, 3, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, devices=jax.devices()[:6])
    models = dataclasses.replace(toy.MODELS, execution=Execution(mesh=mesh))
    together = _states(models=models, condition=drivers.stack_conditions([CONDITION] * 2, mesh), seed=[11, 3])
    for (_, traces), (_, trace) in zip(together, searched, strict=True):
      np.testing.assert_array_equal(traces.survivor[1], trace.survivor)
      np.testing.assert_array_equal(traces.latents[1], trace.latents)

  def test_three_programs(self):
    """The policy is traced for the first chunk and for the other judged ones; nothing compiles in another video."""
    counted = chex.assert_max_traces(TopK().select, n=2)

    @dataclasses.dataclass(frozen=True)
    class Counted(TopK):
      def select(self, *arguments):
        return counted(*arguments)

    search = dataclasses.replace(SEARCH, policy=Counted())
    _states(search)
    with CompileCounter() as compiles:
      _states(search, seed=5)
    assert compiles.count == 0


class TestStory:
  def test_trace(self, searched):
    chunks = describe_trace([trace for _, trace in searched], None, SEARCH)["chunks"]
    assert [len(chunk["candidates"]) for chunk in chunks] == [6, 2, 2, 6, 2, 2, 6, 2]
    assert chunks[1]["scores"] == [None, None]
    assert chunks[3]["scores"] != [None, None]
    second = chunks[1]["candidates"][1]
    assert (second["candidate"], second["parent"], second["hybrid"], second["rank"]) == (3, 1, None, 1)

  @pytest.mark.parametrize(("num_chunks", "judged_again"), [(1, False), (2, True), (3, True), (4, True)])
  def test_whole_videos(self, num_chunks, judged_again):
    """With a window of three chunks: one chunk is judged, two and three end unjudged, four do not fit."""
    assert drivers.scores_whole_videos(dataclasses.replace(SEARCH, judge_every=3), num_chunks) == judged_again


class TestRefusal:
  def test_longer_than_the_video(self):
    with pytest.raises(ConfigError, match=r"judge_every must be in 1\.\.8, the chunks of the video, got 9"):
      _states(dataclasses.replace(SEARCH, judge_every=9))
    drivers.check_length(toy.MODELS, dataclasses.replace(SEARCH, judge_every=8), NUM_CHUNKS)

  def test_a_policy_that_names_the_video_where_nothing_is_judged(self):
    search = dataclasses.replace(SEARCH, policy=Particles(1.0, returns="draw"))
    with pytest.raises(ConfigError, match="judge_every must divide 7, got 3"):
      drivers.check_length(toy.MODELS, search, NUM_CHUNKS)
    drivers.check_length(toy.MODELS, search, NUM_CHUNKS - 1)

  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"judge_every": 0}, "judge_every must be at least 1 chunk, got 0"),
      ({"judge_every": 2, "judges": False, "beam_size": 1}, "judge_every must be 1, got 2"),
    ],
  )
  def test_values(self, fields, message):
    with pytest.raises(ConfigError, match=message):
      SearchConfig(**fields)
