"""The two drivers, what they compile, and how a video is put together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.drivers import SearchError
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.memory_sinking import APPEND, APPEND_AT_MAXIMUM, EMA, NOTHING
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import Condition
from tests import small_search as small
from tests import toy_generator as toy

NUM_CHUNKS = 9


def _stream(num_chunks, search=small.SEARCH, *, seed=0, prompt=0, **options):
  inputs = small.params(), small.condition(num_chunks, prompt), small.models(), search
  return drivers.stream(*inputs, num_chunks=num_chunks, seed=seed, **options)


def _rollout(num_chunks, search=small.SEARCH, **options):
  inputs = small.params(), small.condition(num_chunks), small.models(), search
  return drivers.rollout(*inputs, num_chunks=num_chunks, seed=0, **options)


def _toy_condition(num_chunks):
  return Condition((), (), (), jnp.int32(num_chunks))


def _toy(num_chunks, search=small.SEARCH, *, run=drivers.stream, seed=0, models=toy.MODELS, **changes):
  """A search of one number per chunk, where what a driver does shows as well and programs compile in no time."""
  search = dataclasses.replace(search, first_candidate="fresh", **changes)
  return run(toy.PARAMS, _toy_condition(num_chunks), models, search, num_chunks=num_chunks, seed=seed)


def _final(traces, search=small.SEARCH):
  return drivers.final_beams(small.params(), small.condition(len(traces)), small.models(), search, traces)


def _toy_final(traces, search=small.SEARCH, *, models=toy.MODELS, **options):
  return drivers.final_beams(toy.PARAMS, _toy_condition(len(traces)), models, search, traces, **options)


def _assert_same_search(traces, others):
  for trace, other in zip(traces, others, strict=True):
    np.testing.assert_array_equal(trace.survivor, other.survivor)
    np.testing.assert_array_equal(trace.candidates.seed, other.candidates.seed)
    np.testing.assert_array_equal(trace.eviction, other.eviction)
    np.testing.assert_allclose(trace.latents, other.latents, rtol=0, atol=1e-5)
    np.testing.assert_allclose(trace.candidates.hybrid, other.candidates.hybrid, rtol=0, atol=1e-5)


class TestTwoDrivers:
  def test_same_winners(self):
    # Every chunk is worth remembering, so that every eviction changes a sink.
    search = dataclasses.replace(small.SEARCH, short_threshold=-10.0)
    streamed, rolled = (list(run(NUM_CHUNKS, search, record=True)) for run in (_stream, _rollout))
    _assert_same_search(streamed, rolled)
    routes = set(np.concatenate([trace.eviction.route for trace in streamed]).tolist())
    assert routes > {NOTHING}
    assert routes <= {NOTHING, EMA, APPEND, APPEND_AT_MAXIMUM}
    first, second = _final(streamed, search), _final(rolled, search)
    assert first.best == second.best
    np.testing.assert_allclose(first.latents, second.latents, rtol=0, atol=1e-5)
    for trace, other in zip(streamed, rolled, strict=True):
      assert trace.steps["x0"].shape == (2, 2, 2, *small.MODEL.latent_shape)
      np.testing.assert_allclose(trace.steps["x0"], other.steps["x0"], rtol=0, atol=1e-5)
      np.testing.assert_allclose(trace.steps["noise"], other.steps["noise"], rtol=0, atol=1e-6)

  def test_steps_are_recorded_on_demand_only(self):
    assert next(_stream(3)).steps is None

  def test_single_chunk_video(self):
    """No later chunk, no past, and no 0 / 0 in the weight of the short-term score."""
    (streamed,), (rolled,) = list(_toy(1)), _toy(1, run=drivers.rollout)
    _assert_same_search([streamed], [rolled])
    np.testing.assert_array_equal(streamed.candidates.hybrid, streamed.candidates.long)
    final = _toy_final([streamed])
    assert final.latents.shape == (2, *toy.SHAPE)
    assert final.frames.shape == final.latents.shape

  def test_one_beam_one_candidate(self):
    """A search of one candidate is plain streaming: no choice, and nothing to judge."""
    search = SearchConfig.streaming(small.MODEL)
    streamed = list(_stream(6, search))
    for trace in streamed:
      for score in (trace.candidates.short, trace.candidates.long, trace.candidates.hybrid, trace.score):
        np.testing.assert_array_equal(score, np.zeros_like(score))
      assert trace.candidates.usable.all()
    assert [trace.survivor.tolist() for trace in streamed] == [[0]] * 6
    assert [int(trace.candidates.seed[0, 0]) for trace in streamed] == [0, 1000, 2000, 3000, 4000, 5000]
    final = _final(streamed, search)
    np.testing.assert_array_equal(final.latents[0], np.concatenate([trace.latents[0] for trace in streamed]))

  def test_judges_change_nothing_but_scores(self):
    """In plain streaming latents and frames are the same, and without judges no past frames are kept."""
    search = SearchConfig.streaming(small.MODEL)
    judged = dataclasses.replace(search, judges=True)
    for trace, other in zip(_stream(6, search), _stream(6, judged), strict=True):
      # Two programs, whose last bits differ.
      np.testing.assert_allclose(trace.latents, other.latents, rtol=1e-6, atol=1e-6)
      np.testing.assert_allclose(trace.frames, other.frames, rtol=1e-6, atol=1e-6)
      assert other.candidates.long.all()
    past = lambda search: drivers.abstract_state(small.params(), small.models(), search, 0, num_chunks=6).beams.past
    assert past(search) is None
    assert past(judged).shape[1] == 15

  def test_without_judges_no_window_is_kept(self):
    """Neither frames nor, where rewards would decode from scratch, latents."""
    for judges in (True, False):
      search = dataclasses.replace(SearchConfig.streaming(small.MODEL), reward_decode="scratch", judges=judges)
      beams = drivers.abstract_state(small.params(), small.models(), search, 0, num_chunks=6).beams
      assert (beams.latents is not None) == judges

  def test_rewards_are_not_called_without_judges(self):
    class Refuse(Promptless):
      def __call__(self, params, condition, frames, info):
        raise AssertionError("a reward was called")

    models = dataclasses.replace(toy.MODELS, image_reward=Refuse(), video_reward=Refuse())
    assert len(list(_toy(2, SearchConfig.streaming(small.MODEL), models=models))) == 2
    with pytest.raises(AssertionError, match="a reward was called"):
      next(_toy(2, models=models))

  def test_plain_streaming_does_not_depend_on_scores(self):
    """Every chunk worth remembering, or none: the sink stays the first chunk, unlike under a search's decay."""

    def latents(remembered, **changes):
      traces = list(_stream(7, dataclasses.replace(SearchConfig.streaming(small.MODEL), **changes)))
      assert [bool(trace.candidates.flags.ema.any()) for trace in traces] == [False] + [remembered] * 6
      return np.stack([trace.latents for trace in traces])

    # By default no score of 0 is above the threshold of 0.
    never, always = latents(False), {"short_threshold": -1e6}
    np.testing.assert_array_equal(latents(True, **always), never)
    assert np.abs(latents(True, **always, sink_ema_decay=0.5) - never).max() > 1e-3

  def test_one_beam_of_three_candidates(self):
    changes = {"top_k": 1, "beam_size": 3}
    traces = list(_toy(4, **changes))
    for trace in traces:
      assert trace.survivor.tolist() == [int(np.argmax(trace.candidates.hybrid[0]))]
    assert len({int(trace.survivor[0]) for trace in traces}) > 1
    final = _toy_final(traces, dataclasses.replace(small.SEARCH, **changes))
    np.testing.assert_array_equal(final.latents[0], np.concatenate([trace.latents[0] for trace in traces]))


@pytest.mark.parametrize(
  ("search", "num_chunks"),
  [
    (SearchConfig.streaming(small.MODEL), 4),
    (small.SEARCH, 1),
    (dataclasses.replace(small.SEARCH, sliding_window=1), 4),
  ],
  ids=["plain", "one_chunk", "window_of_one"],
)
def test_no_array_of_a_state_is_empty(search, num_chunks):
  """Orbax refuses to save one, so a search could not be saved."""
  state = drivers.abstract_state(small.params(), small.models(), search, 0, num_chunks=num_chunks)
  assert all(leaf.size for leaf in jax.tree.leaves(state))


class TestCompilation:
  def test_two_programs_for_any_video(self):
    """Chunk 4 and chunk 40, longer videos, other prompts and other seeds run what the first two chunks compiled, from
    the length of the sliding window on."""
    list(_stream(small.SEARCH.sliding_window))
    with CompileCounter() as compiles:
      for trace in _stream(45):
        jax.block_until_ready(trace)
      list(_stream(12, seed=5, prompt=1))
      list(_stream(3, seed=123456, prompt=2))
    assert compiles.count == 0

  def test_another_search_is_noticed(self):
    """The negative control: the counter sees what a new shape compiles."""
    list(_toy(2))
    with CompileCounter() as compiles:
      next(_toy(2, beam_size=4))
    assert compiles.count >= 1

  def test_no_implicit_transfers(self):
    params, condition, models = small.params(), small.condition(6), small.models()
    state = drivers.jitted_init_state(params, 0, models, small.SEARCH)
    for index in range(2):
      state, _ = drivers.jitted_chunk_step(params, state, condition, models, small.SEARCH, first=index == 0)
    with jax.transfer_guard("disallow"):
      for _ in range(4):
        state, trace = drivers.jitted_chunk_step(params, state, condition, models, small.SEARCH, first=False)
      jax.block_until_ready(trace)
      from_host = condition._replace(num_chunks=np.int32(6))
      with pytest.raises(Exception, match="[Dd]isallowed"):
        drivers.jitted_chunk_step(params, state, from_host, models, small.SEARCH, first=False)


def _spoiled(seed):
  """Noise that is NaN for the seeds 100 to 103 and 2007 to 2108: first chunk from seed 100, third chunk from seed 7."""
  draws = toy.draw_noise(seed)
  bad = ((seed >= 100) & (seed <= 103)) | ((seed >= 2007) & (seed <= 2108))
  return draws._replace(fresh=jnp.where(bad, jnp.nan, draws.fresh))


class TestFailure:
  MODELS = dataclasses.replace(toy.MODELS, draw_noise=_spoiled)

  def test_stream_yields_what_is_good(self):
    chunks = _toy(5, seed=7, models=self.MODELS)
    good = [next(chunks), next(chunks)]
    with pytest.raises(SearchError, match=r"chunk 2\b.*seed 7\b"):
      next(chunks)
    assert all(np.isfinite(trace.latents).all() for trace in good)

  @pytest.mark.parametrize(("seeds", "failed"), [((1, 7), 1), ((7, 1), 0)])
  def test_which_of_two_prompts(self, seeds, failed):
    """Two of the four seeds of the other prompt's third chunk are bad as well, 2101 and 2102: the search goes on."""
    condition = drivers.stack_conditions([Condition((), (), (), jnp.int32(5))] * 2)
    search = dataclasses.replace(small.SEARCH, first_candidate="fresh")
    chunks = drivers.stream(toy.PARAMS, condition, self.MODELS, search, num_chunks=5, seed=seeds)
    next(chunks), next(chunks)
    with pytest.raises(SearchError, match=r"chunk 2\b.*seed 7\b") as error:
      next(chunks)
    assert error.value.prompt == failed

  def test_first_chunk(self):
    with pytest.raises(SearchError, match=r"chunk 0\b.*seed 100\b"):
      next(_toy(5, seed=100, models=self.MODELS))

  def test_rollout(self):
    with pytest.raises(SearchError, match=r"chunk 0\b.*seed 100\b"):
      _toy(1, run=drivers.rollout, seed=100, models=self.MODELS)
    with pytest.raises(SearchError, match=r"chunk 2\b.*seed 7\b"):
      _toy(5, run=drivers.rollout, seed=7, models=self.MODELS)

  @pytest.mark.parametrize("num_chunks", [0, -1, 65])
  def test_length(self, num_chunks):
    """Rotary tables for 192 frames: 64 chunks."""
    for driver in (lambda: next(_stream(num_chunks)), lambda: _rollout(num_chunks)):
      with pytest.raises(ConfigError, match=r"number of chunks must be in 1\.\.64"):
        driver()

  def test_longest_video_is_allowed(self):
    drivers.check_length(small.models(), small.SEARCH, 64)

  def test_search_that_does_not_fit(self):
    with pytest.raises(ConfigError, match="max_sink_frames"):
      next(_stream(2, dataclasses.replace(small.SEARCH, max_sink_frames=4)))


class TestLineage:
  def test_by_hand(self):
    """B = 2. Beam 0 of chunk 2 is candidate 3, of parent 1; that one was candidate 0 of chunk 1, of parent 0."""
    survivors = [np.array([1, 2]), np.array([2, 0]), np.array([3, 0])]
    np.testing.assert_array_equal(drivers.lineage(survivors, 2), [[0, 1], [1, 0], [0, 1]])

  def test_both_beams_descend_from_one(self):
    survivors = [np.array([0, 3]), np.array([2, 3]), np.array([0, 1])]
    np.testing.assert_array_equal(drivers.lineage(survivors, 2), [[1, 1], [0, 0], [0, 1]])

  def test_single_chunk(self):
    np.testing.assert_array_equal(drivers.lineage([np.array([3, 1, 0])], 4), [[0, 1, 2]])

  def test_lineage_repeats_the_seeds(self):
    """Reused seeds show the parents: candidate 0 carries the seed its parent's chunk was drawn from."""
    traces = [jax.device_get(trace) for trace in _stream(6)]
    path = drivers.lineage([trace.survivor for trace in traces], 2)
    reused = 0
    for beam in range(2):
      for chunk in range(1, 6):
        survivor = traces[chunk].survivor[path[chunk, beam]]
        parent_survivor = traces[chunk - 1].survivor[path[chunk - 1, beam]]
        if survivor % 2 == 0:
          seeds = [small.per_candidate(traces[i].candidates.seed) for i in (chunk, chunk - 1)]
          assert seeds[0][survivor] == seeds[1][parent_survivor]
          reused += 1
    assert reused > 0


@dataclasses.dataclass(frozen=True)
class _Mapped(Promptless):
  """Scores a whole video by its first number: by `table[round(number)]`."""

  table: tuple[float, ...]

  def __call__(self, params, condition, window, info):
    first = window.take(jnp.zeros(1, jnp.int32)).reshape(-1)[0]
    return jnp.asarray(self.table, jnp.float32)[first.astype(jnp.int32)]


class TestFinalBeams:
  def _best(self, table):
    """Three beams whose videos begin with 0, 1 and 2."""
    search = dataclasses.replace(small.SEARCH, top_k=3)
    trace = jax.device_get(next(_toy(1, top_k=3)))
    latents = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1, 1)
    trace = trace._replace(latents=latents, frames=latents)
    return _toy_final([trace], search, models=dataclasses.replace(toy.MODELS, video_reward=_Mapped(table)))

  def test_best_whole_video(self):
    final = self._best((1.0, 3.0, 2.0))
    np.testing.assert_array_equal(final.scores, [1.0, 3.0, 2.0])
    assert final.best == 1

  def test_earliest_of_equals(self):
    assert self._best((1.0, 3.0, 3.0)).best == 1

  def test_nan_never_wins(self):
    assert self._best((np.nan, -5.0, -4.0)).best == 2

  def test_scores_that_are_known(self):
    """A window of three chunks is a whole video of three: the last long-term scores judge what the final ones judge."""
    for num_chunks in (1, 2, 3):
      traces = list(_toy(num_chunks))
      known = drivers.last_window_scores(small.SEARCH, traces)
      np.testing.assert_allclose(known, _toy_final(traces).scores, rtol=0, atol=1e-5)
      final = _toy_final(traces, scores=known)
      assert final.best == int(np.argmax(known))
      assert final.scores is known

  @pytest.mark.parametrize("changes", [{}, {"reward_decode": "scratch", "sliding_window": 9}], ids=str)
  def test_scores_that_are_not_known(self, changes):
    """Four chunks do not fit into a window of three; and a window decoded from scratch is not the video's frames."""
    search = dataclasses.replace(small.SEARCH, **changes)
    # Known or not is said without a look at the scores, so those of the usual search will do.
    assert drivers.last_window_scores(search, list(_stream(4))) is None
    assert drivers.last_window_scores(SearchConfig.streaming(small.MODEL), []) is None

  def test_scores_judge_all_frames(self):
    """The window of the final score is the whole video, however small the sliding window is."""
    traces = list(_stream(6))
    final = _final(traces)
    reward = small.models().video_reward
    np.testing.assert_allclose(final.scores, [reward.by_numpy(x) for x in final.frames], rtol=0, atol=1e-4)
    assert final.best == int(np.argmax(final.scores))
