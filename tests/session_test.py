"""Sessions: what people say takes effect between chunks, is answered, and can be told again."""

import dataclasses
import functools
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers, saved_session
from streamt1_jax.config import ConfigError, SearchConfig, SessionConfig, SwitchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.io import timeline
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.io.timeline import Entry, Timeline
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel import sharding
from streamt1_jax.policies import Choice
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.session import Session
from streamt1_jax.state import Condition
from streamt1_jax.steering import Start
from tests import small_search as small
from tests import small_session as sessions
from tests import toy_generator as toy

CHUNKS = 6
BEFORE_FIRST, BEFORE_SECOND = 2, 4


def _same(chunks, others):
  """Bit for bit."""
  assert [chunk.index for chunk in chunks] == [other.index for other in others]
  for chunk, other in zip(chunks, others, strict=True):
    np.testing.assert_array_equal(chunk.latents, other.latents)
    np.testing.assert_array_equal(chunk.frames, other.frames)


def _differ(chunk, other):
  assert np.abs(chunk.latents - other.latents).max() > 1e-3


def _steered(session, switches):
  """All chunks, and the receipts of prompts that are given before some of them."""
  chunks, receipts = [], []
  for index in range(CHUNKS):
    receipts += [session.switch(prompt) for prompt in switches.get(index, ())]
    chunks.append(next(session))
  assert next(session, None) is None
  return chunks, receipts


@pytest.fixture(scope="module")
def plain():
  return list(sessions.session())


@pytest.fixture(scope="module")
def switched():
  session = sessions.session()
  chunks, receipts = _steered(session, {BEFORE_FIRST: ["b"], BEFORE_SECOND: ["c"]})
  return chunks, receipts, session


class TestEvents:
  def test_without_events_it_is_a_plain_search(self, plain):
    inputs = small.params(), sessions.runtime().condition("a", CHUNKS), small.models(), sessions.ONE_BEAM
    traces = list(drivers.stream(*inputs, num_chunks=CHUNKS, seed=0))
    for chunk, trace in zip(plain, traces, strict=True):
      np.testing.assert_array_equal(chunk.latents, trace.latents[0])
      np.testing.assert_array_equal(chunk.trace.candidates.seed, trace.candidates.seed)
      assert (chunk.prompt, chunk.segment, chunk.events, chunk.lag) == ("a", 0, (), 0)

  def test_a_switch_takes_effect_at_its_chunk(self, plain, switched):
    chunks, receipts, session = switched
    _same(chunks[:BEFORE_FIRST], plain[:BEFORE_FIRST])
    _differ(chunks[BEFORE_FIRST], plain[BEFORE_FIRST])
    assert [(receipt.status, receipt.chunk) for receipt in receipts] == [("applied", 2), ("applied", 4)]
    assert [chunk.prompt for chunk in chunks] == ["a", "a", "b", "b", "c", "c"]
    assert [chunk.segment for chunk in chunks] == [0, 0, 1, 1, 2, 2]
    assert [chunk.events for chunk in chunks] == [(), (), (receipts[0],), (), (receipts[1],), ()]
    assert session.segments == [(0, "a"), (2, "b"), (4, "c")]

  def test_scores_do_not_compare_across_a_switch(self, switched):
    """The first chunk under a new prompt has no flags: there is nothing that it could be better than."""
    for chunk in (switched[0][BEFORE_FIRST], switched[0][BEFORE_SECOND]):
      assert not np.any(chunk.trace.candidates.flags)

  def test_of_several_prompts_the_newest_is_taken(self, switched):
    chunks, receipts = _steered(sessions.session(), {BEFORE_FIRST: ["x", "b"], BEFORE_SECOND: ["c"]})
    _same(chunks, switched[0])
    assert [receipt.status for receipt in receipts] == ["superseded", "applied", "applied"]
    assert receipts[0].superseded_by is receipts[1]
    assert receipts[0].chunk == BEFORE_FIRST

  def test_a_prompt_that_says_the_same_changes_nothing(self, plain):
    session = sessions.session()
    chunks, receipts = _steered(session, {0: ["a"], BEFORE_FIRST: ["A"]})
    _same(chunks, plain)
    assert [(receipt.status, receipt.chunk) for receipt in receipts] == [("unchanged", 0), ("unchanged", 2)]
    assert session.segments == [(0, "a")]

  def test_a_switch_before_the_first_chunk_is_another_video(self):
    early, receipts = _steered(sessions.session("a"), {0: ["b"]})
    assert receipts[0].chunk == 0
    _same(early, list(sessions.session("b")))

  def test_a_bad_prompt_raises_and_changes_nothing(self, plain):
    session = sessions.session()
    chunks = [next(session)]
    with pytest.raises(ConfigError, match="the prompt is empty"):
      session.switch("  ")
    _same(chunks + list(session), plain)

  def test_a_memory_of_nan_is_an_error_of_the_switch(self, plain):
    chunks, (receipt,) = _steered(sessions.session(), {BEFORE_FIRST: ["poison"]})
    _same(chunks, plain)
    assert (receipt.status, receipt.chunk) == ("failed", BEFORE_FIRST)
    assert "NaN" in receipt.reason
    assert chunks[BEFORE_FIRST].events == (receipt,)

  def test_stop(self, plain):
    session = sessions.session()
    chunks = [next(session), next(session)]
    waits, stop = session.switch("b"), session.stop()
    assert (stop.status, stop.wait(0)) == ("queued", False)
    assert list(session) == []
    assert (stop.status, stop.chunk, stop.wait(0)) == ("applied", 2, True)
    assert (waits.status, session.switch("c").status) == ("dropped", "dropped")
    assert session.switch("c").reason == "the session was stopped"
    _same(chunks, plain[:2])

  def test_a_video_that_cannot_begin_keeps_nobody_waiting(self):
    without_weights = sessions.SmallRuntime(small.models(), {})
    session = Session(without_weights, sessions.CLOCK, "a", SessionConfig(search=sessions.ONE_BEAM))
    receipt = session.switch("b")
    with pytest.raises(KeyError, match="backbone"):
      next(session)
    assert (receipt.status, receipt.reason) == ("dropped", "the session has failed")
    assert next(session, None) is None

  def test_a_second_switch_compiles_nothing(self, switched):
    session = sessions.session(num_chunks=None)
    with CompileCounter() as compilations:
      for index in range(8):
        if index in (2, 4, 5):
          session.switch(f"prompt {index}")
          before = compilations.count
        next(session)
        assert index in (0, 1, 2) or compilations.count == before

  @pytest.mark.parametrize(
    "switch", [SwitchConfig(recache="causal", sinks="recache", video="since"), SwitchConfig(recache="none")]
  )
  def test_other_ways_to_switch_give_other_videos(self, switched, switch):
    chunks, _ = _steered(sessions.session(switch=switch), {BEFORE_FIRST: ["b"], BEFORE_SECOND: ["c"]})
    _same(chunks[:BEFORE_FIRST], switched[0][:BEFORE_FIRST])
    _differ(chunks[BEFORE_FIRST], switched[0][BEFORE_FIRST])

  def test_a_prompt_that_took_long_to_read_does_not_replace_a_newer_one(self):
    runtime, reading, go_on = sessions.runtime(), threading.Event(), threading.Event()

    class SlowRuntime(sessions.SmallRuntime):
      def condition(self, prompt, num_chunks):
        if prompt == "slow":
          reading.set()
          go_on.wait()
        return super().condition(prompt, num_chunks)

    config = SessionConfig(search=sessions.ONE_BEAM, num_chunks=CHUNKS)
    # What a timeline says in between makes nobody's prompt newer.
    told = Timeline((Entry(0.0, "a"), Entry(1.0, "c")))
    session = Session(SlowRuntime(runtime.models, runtime.params), sessions.CLOCK, told, config)
    receipts = []
    thread = threading.Thread(target=lambda: receipts.append(session.switch("slow")))
    thread.start()
    reading.wait()
    newer = session.switch("b")
    assert [next(session).prompt, next(session).prompt] == ["b", "c"]
    go_on.set()
    thread.join()
    next(session)
    assert (newer.status, newer.chunk) == ("applied", 0)
    assert (receipts[0].status, receipts[0].superseded_by) == ("superseded", newer)


def test_a_session_holds_no_more_the_longer_it_runs():
  session = sessions.session(num_chunks=None)
  held = []
  for chunk in session:
    if chunk.index in (3, 20):
      session.switch(f"prompt {chunk.index}")
    if chunk.index in (6, 36):
      del chunk
      gc.collect()
      traces = sum(isinstance(thing, drivers.ChunkTrace) for thing in gc.get_objects())
      held.append((traces, len(jax.live_arrays())))
    if len(held) == 2:
      session.stop()
  assert held[0] == held[1]


@pytest.mark.slow
def test_one_device_and_several_switch_alike():
  search = sessions.TWO_BEAMS
  mesh = device_mesh.make_mesh(device_mesh.parse_sizes("candidate:4"), small.MODEL, search)
  models = dataclasses.replace(small.models(), execution=Execution(mesh=mesh))
  params = {
    name: jax.device_put(part, sharding.tree_shardings(mesh, name, part)) for name, part in small.params().items()
  }
  config = SessionConfig(search=search, num_chunks=4, emit="commit")
  divided = Session(sessions.SmallRuntime(models, params), sessions.CLOCK, "a", config)
  alone = Session(sessions.runtime(), sessions.CLOCK, "a", config)
  for _ in range(4):
    chunk, other = next(divided), next(alone)
    np.testing.assert_array_equal(chunk.trace.survivor, other.trace.survivor)
    # The devices add in another order.
    np.testing.assert_allclose(chunk.latents, other.latents, rtol=0, atol=1e-5)
    if chunk.index == 1:
      receipts = [session.switch("b") for session in (divided, alone)]
  assert [(receipt.status, receipt.chunk) for receipt in receipts] == [("applied", 2)] * 2


class TestAgain:
  def test_what_happened_can_be_told_again(self, tmp_path, switched):
    chunks, _, session = switched
    session.timeline.save(tmp_path / "timeline.json")
    told = timeline.load(tmp_path / "timeline.json")
    assert told == Timeline((Entry(0.0, "a"), Entry(2.0, "b"), Entry(4.0, "c")), seed=0)
    again = sessions.session(told)
    _same(list(again), chunks)
    assert again.timeline == told

  @pytest.mark.parametrize("start", [1e308, 10**400, float("nan"), -1, "0", True])
  def test_starts_that_are_no_times(self, start):
    """Integers of any size are JSON; the largest float is a chunk beyond all numbers."""
    entries = [{"start": 0, "prompt": "a"}, {"start": start, "prompt": "b"}]
    with pytest.raises(ConfigError, match="entry 2: start must be 0 to 1000000000 seconds"):
      timeline.from_json({"version": 1, "entries": entries})

  @pytest.mark.parametrize("after", [0, 3])
  def test_killed_between_two_switches(self, tmp_path, switched, after):
    chunks, _, whole = switched
    session = sessions.session()
    for index in range(after):
      if index == BEFORE_FIRST:
        session.switch("b")
      next(session)
    session.save(tmp_path / "saved")
    del session
    resumed = _resumed(tmp_path / "saved")
    rest = []
    for index in range(after, CHUNKS):
      if index == BEFORE_FIRST:
        resumed.switch("b")
      if index == BEFORE_SECOND:
        resumed.switch("c")
      rest.append(next(resumed))
    assert next(resumed, None) is None
    _same(rest, chunks[after:])
    assert [chunk.prompt for chunk in rest] == [chunk.prompt for chunk in chunks[after:]]
    assert resumed.timeline == whole.timeline

  def test_a_save_may_be_written_while_chunks_are_made(self, tmp_path, switched):
    chunks, _, whole = switched
    session = sessions.session(whole.timeline)
    shown = [next(session) for _ in range(3)]
    write = session.prepare_save()
    _same(shown + list(session), chunks)
    write(tmp_path / "saved")
    _same(shown + list(_resumed(tmp_path / "saved")), chunks)

  def test_what_waits_in_the_queue_is_saved(self, tmp_path, switched):
    """A prompt that a newer one replaces, the newer one, and later a stop: they come back in order."""
    chunks, _, _ = switched
    session = sessions.session()
    shown = [next(session) for _ in range(BEFORE_FIRST)]
    session.switch("c")
    session.switch("b")
    session.save(tmp_path / "saved")
    resumed = _resumed(tmp_path / "saved")
    superseded, applied = resumed.queued
    shown.append(next(resumed))
    assert (superseded.prompt, superseded.status, superseded.superseded_by) == ("c", "superseded", applied)
    assert (applied.prompt, applied.status, applied.chunk) == ("b", "applied", BEFORE_FIRST)
    _same(shown, chunks[: BEFORE_FIRST + 1])
    resumed.stop()
    resumed.save(tmp_path / "saved")
    stopped = _resumed(tmp_path / "saved")
    assert next(stopped, None) is None

  def test_a_timeline_that_was_killed_goes_on(self, tmp_path, switched):
    chunks, _, whole = switched
    session = sessions.session(whole.timeline)
    first = [next(session) for _ in range(3)]
    session.save(tmp_path / "saved")
    _same(first + list(_resumed(tmp_path / "saved")), chunks)

  def test_saves_of_others_are_refused(self, tmp_path):
    session = sessions.session()
    session.save(tmp_path / "saved")
    for identity, search, message in [
      ({"checkpoint_sha256": "other"}, None, "was made with checkpoint_sha256 None, not other"),
      ({}, sessions.TWO_BEAMS, "another search"),
    ]:
      with pytest.raises(ConfigError, match=message):
        saved_session.read_progress(tmp_path / "saved", identity, search)
    with pytest.raises(ConfigError, match="expected the folder of a saved session"):
      saved_session.read_progress(tmp_path / "nothing", {}, None)
    file = tmp_path / "saved" / "session.json"
    file.write_text(file.read_text().replace('"prompt": "a"', '"prompt": "b"'))
    with pytest.raises(ConfigError, match="session.json is corrupt: its checksum"):
      saved_session.read_progress(tmp_path / "saved", {}, None)


def _resumed(folder, runtime=None, clock=sessions.CLOCK):
  """What `Pipeline.resume` does, without a checkpoint."""
  runtime = runtime or sessions.runtime()
  progress = saved_session.read_progress(folder, {}, None)
  config = progress.config
  shapes = drivers.abstract_state(
    runtime.params, runtime.models, config.search, config.seed, num_chunks=config.capacity(progress.num_given)
  )
  saved = saved_session.read(folder, progress, shapes)
  session = Session(runtime, clock, progress.segments[0][1], config, start=saved.start)
  session.restore(saved)
  return session


class _ToyRuntime(sessions.SmallRuntime):
  """A chunk is one number: `last + (last + noise) / 2`, and noise is the seed's remainder by 7."""

  def condition(self, prompt, num_chunks):
    return Condition((), (), (), jnp.int32(num_chunks))


TOY_SEARCH = SearchConfig(
  beam_size=2, top_k=2, noise_sigma=0.0, first_candidate="fresh", sliding_window=3, sink_distance=90
)


def _toy_session(search=TOY_SEARCH, **changes):
  config = SessionConfig(search=search, num_chunks=8, seed=3)
  return Session(_ToyRuntime(toy.MODELS, toy.PARAMS), sessions.CLOCK, "a", dataclasses.replace(config, **changes))


@dataclasses.dataclass(frozen=True)
class _Changeable:
  """A policy under which beams stay apart for two chunks; then both go on from beam 1."""

  def init(self, search):
    return None

  def select(self, carry, scores, key, chunk_index, num_chunks):
    join = chunk_index % 3 == 2
    survivor = jnp.where(join, jnp.array([2, 3]), jnp.array([0, 3])).astype(jnp.int32)
    return Choice(survivor, scores.hybrid.reshape(-1)[survivor], carry)


class TestBeams:
  def test_settled_chunks_are_those_of_the_final_video(self):
    traces, search = [], dataclasses.replace(TOY_SEARCH, policy=_Changeable())
    config = SessionConfig(search=search, num_chunks=8, seed=3)
    runtime = _ToyRuntime(toy.MODELS, toy.PARAMS)
    session = Session(runtime, sessions.CLOCK, "a", config, on_trace=traces.append)
    shown, made = [], []
    for chunk in session:
      shown.append(chunk)
      made.append(len(traces))
    # Chunks 0, 1 and 2 have one ancestor each once chunk 2 has joined the beams, and so on; the rest waits for the end.
    assert [len([m for m in made if m <= upto]) for upto in range(1, 9)] == [0, 0, 2, 2, 2, 5, 5, 8]
    assert [chunk.lag for chunk in shown[:5]] == [2, 1, 3, 2, 1]
    best = int(np.argmax(traces[-1].score))
    path = drivers.lineage([trace.survivor for trace in traces], search.beam_size)[:, best]
    expected = [trace.latents[beam] for trace, beam in zip(traces, path)]
    np.testing.assert_array_equal([chunk.latents for chunk in shown], expected)

  def test_a_session_is_saved_with_what_waits(self, tmp_path):
    whole = list(_toy_session())
    session = _toy_session()
    first = [next(session)]
    session.save(tmp_path / "saved")
    rest = list(_resumed(tmp_path / "saved", _ToyRuntime(toy.MODELS, toy.PARAMS)))
    _same(first + rest, whole)

  @pytest.mark.parametrize(("emit", "lag"), [("settled", 1), ("commit", 0)])
  def test_a_search_with_a_limit_is_saved(self, tmp_path, emit, lag):
    make = functools.partial(_toy_session, dataclasses.replace(TOY_SEARCH, settle_within=1), emit=emit)
    whole, session = list(make()), make()
    assert max(chunk.lag for chunk in whole) == lag
    first = [next(session)]
    session.save(tmp_path / "saved")
    _same(first + list(_resumed(tmp_path / "saved", _ToyRuntime(toy.MODELS, toy.PARAMS))), whole)

  def test_a_stopped_session_goes_on_from_what_it_showed(self, tmp_path):
    """What is shown after a stop leads to the best beam, and the other beam, which may win later, is given up."""
    session = _toy_session(seed=4)
    session._on_trace = lambda trace: session.stop() if session.lag == 3 else None
    shown = list(session)
    session.save(tmp_path / "saved")
    runtime = _ToyRuntime(toy.MODELS, toy.PARAMS)
    shown += list(_resumed(tmp_path / "saved", runtime))
    last = 0.0
    for chunk in shown:
      made = last + (last + np.asarray(chunk.trace.candidates.seed).reshape(-1) % 7) / 2
      last = chunk.latents.item()
      assert np.abs(made - last).min() < 1e-5

  def test_commit_shows_the_best_at_once_and_all_go_on_from_it(self):
    shown = list(_toy_session(emit="commit"))
    assert [chunk.lag for chunk in shown] == [0] * 8
    last = 0.0
    for chunk in shown:
      seeds = np.asarray(chunk.trace.candidates.seed).reshape(-1)
      made = last + (last + seeds % 7) / 2
      # All candidates grow from the chunk that was shown, so the scores rank what each adds to it.
      np.testing.assert_allclose(np.asarray(chunk.trace.candidates.short).reshape(-1), made, rtol=1e-6)
      best = int(np.argmax(np.asarray(chunk.trace.candidates.hybrid)))
      assert chunk.trace.survivor.tolist() == [best, best]
      last = chunk.latents.item()
      np.testing.assert_allclose(last, made[best], rtol=1e-6)

  def test_commit_is_resumed(self, tmp_path):
    whole = list(_toy_session(emit="commit"))
    session = _toy_session(emit="commit")
    first = [next(session) for _ in range(3)]
    session.save(tmp_path / "saved")
    _same(first + list(_resumed(tmp_path / "saved", _ToyRuntime(toy.MODELS, toy.PARAMS))), whole)


def test_what_reads_traces_may_save_and_may_fail(tmp_path):
  """A trace is told when its chunk is safe: a save has it, and an exception loses nothing."""
  search = dataclasses.replace(TOY_SEARCH, top_k=1)
  whole, session = list(_toy_session(search)), _toy_session(search)

  def save_and_fail(trace):
    session.save(tmp_path / "saved")
    raise OSError("the disk is full")

  session._on_trace = save_and_fail
  with pytest.raises(OSError, match="the disk is full"):
    next(session)
  session._on_trace = None
  _same(list(session), whole)
  _same(list(_resumed(tmp_path / "saved", _ToyRuntime(toy.MODELS, toy.PARAMS))), whole)


@dataclasses.dataclass(frozen=True)
class _LengthOfPrompt(Promptless):
  def __call__(self, params, condition, frames, info):
    return condition.sum()


class _JudgedByLength(_ToyRuntime):
  def condition(self, prompt, num_chunks):
    letters = jnp.ones(len(prompt))
    return Condition((), letters, 10 * letters, jnp.int32(num_chunks))


def test_both_rewards_read_the_prompt_in_force():
  models = dataclasses.replace(toy.MODELS, image_reward=_LengthOfPrompt(), video_reward=_LengthOfPrompt())
  config = SessionConfig(search=dataclasses.replace(TOY_SEARCH, top_k=1), num_chunks=4)
  told = Timeline((Entry(0.0, "a"), Entry(2.0, "longer"), Entry(3.0, "longest")))
  session = Session(_JudgedByLength(models, toy.PARAMS), sessions.CLOCK, told, config)
  chunks = [next(session) for _ in range(3)]
  with CompileCounter() as compilations:
    chunks += list(session)
  scores = [(chunk.trace.candidates.short.max(), chunk.trace.candidates.long.max()) for chunk in chunks]
  assert scores == [(1, 10), (1, 10), (6, 60), (7, 70)]
  # Rewards read more than before: the chunk step is compiled again, and the recache, which reads the text, is not.
  assert compilations.count == 1


def test_threads(tmp_path):
  """Prompts and saves from several threads: every receipt is decided, and the newest prompt is in force."""
  session = _toy_session(dataclasses.replace(TOY_SEARCH, top_k=1))
  receipts, saves = [], []

  def speak(name):
    receipts.extend(session.switch(f"{name} {number}") for number in range(20))

  def save():
    session.save(tmp_path / "saved")
    saves.append(len(shown))

  shown = [next(session)]
  threads = [threading.Thread(target=speak, args=(name,)) for name in "ab"] + [threading.Thread(target=save)]
  for thread in threads:
    thread.start()
  shown += [next(session) for _ in range(3)]
  for thread in threads:
    thread.join()
  shown += list(session)
  assert len(shown) == 8
  assert len(saves) == 1
  assert {receipt.status for receipt in receipts} <= {"applied", "superseded", "unchanged"}
  assert sorted(receipt.number for receipt in receipts) == list(range(40))
  assert list(_resumed(tmp_path / "saved", _ToyRuntime(toy.MODELS, toy.PARAMS)))


class TestStarts:
  def test_a_video_goes_on_from_its_own_latents(self, plain):
    """Plain streaming without noise from parents: the chunks given and made are those of one video."""
    search = dataclasses.replace(SearchConfig.streaming(small.MODEL), sink_distance=90)
    whole = list(sessions.session(search=search))
    start = Start(latents=np.stack([chunk.latents for chunk in whole[:3]]))
    session = sessions.session(search=search, start=start, num_chunks=3)
    chunks = list(session)
    assert [chunk.index for chunk in chunks] == list(range(6))
    assert [chunk.trace is None for chunk in chunks] == [True] * 3 + [False] * 3
    _same(chunks[:3], whole[:3])
    # The first made chunk has the seed of a first chunk, so the video itself goes on otherwise.
    assert chunks[3].trace.candidates.seed.tolist() == [[0]]
    _differ(chunks[3], whole[3])

  def test_a_session_that_began_with_chunks_is_resumed(self, tmp_path, plain):
    start = Start(latents=np.stack([chunk.latents for chunk in plain[:2]]))
    whole = list(sessions.session(start=start, num_chunks=2))
    session = sessions.session(start=start, num_chunks=2)
    first = [next(session)]
    session.save(tmp_path / "saved")
    _same(first + list(_resumed(tmp_path / "saved")), whole)

  def test_a_switch_recaches_the_given_chunks(self, plain):
    start = Start(latents=np.stack([chunk.latents for chunk in plain[:2]]))
    early = Timeline((Entry(0.0, "a"), Entry(1.0, "b")))
    with pytest.raises(ConfigError, match=r"entry 2 starts at 1.0 s, but the video is given and not made up to 2.0 s"):
      sessions.session(early, start=start, num_chunks=1)
    chunks = list(sessions.session(start=start, num_chunks=1))
    session = sessions.session(start=start, num_chunks=1)
    receipt = session.switch("b")
    switched = list(session)
    _same(switched[:2], chunks[:2])
    _differ(switched[2], chunks[2])
    assert (receipt.status, receipt.chunk) == ("applied", 2)
