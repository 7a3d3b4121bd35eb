"""What a search costs and what its trace says, for every method.

Costs are compared with models that count how often they are called, in the compiled programs that run.
"""

import collections
import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import cost, drivers, trace
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.config import SearchConfig, preset
from streamt1_jax.cost import Cost
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.generator import Models
from streamt1_jax.io import manifest
from streamt1_jax.measuring import search_flop
from streamt1_jax.measuring.ledger import Ledger
from streamt1_jax.methods import METHODS, Method
from streamt1_jax.methods.tries import Try
from streamt1_jax.policies import Reject
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.sampling import renoise
from streamt1_jax.state import ChunkTrace, Condition
from tests import toy_generator as toy
from tests import trace_schema
from tests.whole_video import describe_trace, video_cost

MODEL = preset("tiny")
NUM_CHUNKS = 4


class Counter:
  """Counts from inside of a program: once for every element of a batch and every turn of a loop."""

  def __init__(self):
    self.counts = collections.Counter()

  def add(self, batched: jax.Array, **amounts) -> None:
    """`batched` is any array of the call: it makes the callback run once for each call of a batch."""

    def count(_, amounts):
      self.counts.update({name: int(amount) for name, amount in amounts.items()})

    jax.debug.callback(count, batched.ravel()[0], amounts)


@dataclasses.dataclass(frozen=True, eq=False)
class CountingGenerator(toy.ToyGenerator):
  counter: Counter = dataclasses.field(default_factory=Counter)

  def denoise(self, params, x, step, text, view, execution, image=None):
    self.counter.add(x, denoise=1)
    return super().denoise(params, x, step, text, view, execution, image)

  def clean_pass(self, params, latents, text, view, execution):
    self.counter.add(latents, commit=1)
    return latents


@dataclasses.dataclass(frozen=True, eq=False)
class CountingCodec(LatentCodec):
  """Four frames for every latent frame, and one for the first of a stream, as Wan's codec has them; they move."""

  counter: Counter = dataclasses.field(default_factory=Counter)

  def decode(self, params, latents, state, *, first):
    self.counter.add(latents, decoded=latents.shape[0])
    frames = jnp.concatenate([share * latents for share in (0.25, 0.5, 0.75, 1.0)])
    return frames[3:] if first else frames, state

  def num_frames(self, latent_frames, *, first):
    return 1 + 4 * (latent_frames - 1) if first else 4 * latent_frames


@dataclasses.dataclass(frozen=True, eq=False)
class CountingImageReward(Promptless):
  counter: Counter

  def __call__(self, params, condition, chunk, info):
    self.counter.add(chunk, image_calls=1, image_frames=chunk.shape[0])
    return chunk.mean()


@dataclasses.dataclass(frozen=True, eq=False)
class CountingVideoReward(Promptless):
  counter: Counter

  def __call__(self, params, condition, window, info):
    self.counter.add(window.chunk, video_calls=1, video_frames=window.num_frames)
    return window.chunk.mean()


class Counted(NamedTuple):
  """The models that counted; what they counted of one video, its verdict included; the video, and what was tried."""

  models: Models
  cost: Cost
  traces: list[ChunkTrace]
  beams: drivers.FinalBeams
  tries: list[Try]


def _count(
  search: SearchConfig,
  decoding: Decoding = "together",
  num_chunks: int = NUM_CHUNKS,
  length: int | None = None,
  method: Method = METHODS["beam"],
  **numbers: float,
) -> Counted:
  counter = Counter()
  models = Models(
    CountingGenerator(counter=counter),
    CountingCodec(toy.SHAPE[1:], counter),
    CountingImageReward(counter),
    CountingVideoReward(counter),
    toy.draw_noise,
    renoise,
    Execution(decoding=decoding),
  )
  condition = Condition((), (), (), jnp.int32(length or num_chunks))
  tries: list[Try] = []
  drive = drivers.stream_states if method.run is None else functools.partial(method.run, tell=tries.append, **numbers)
  made = drive(toy.PARAMS, condition, models, search, num_chunks=num_chunks, seed=1)
  traces = [jax.device_get(trace) for _, trace in made]
  scores = drivers.last_window_scores(search, traces)
  beams = drivers.final_beams(toy.PARAMS, condition, models, search, traces, scores=scores)
  jax.effects_barrier()
  return Counted(models, Cost(**counter.counts), traces, beams, tries)


def _seen_by_the_models(expected: Cost) -> Cost:
  """They do not know what they are asked for. Two of three forwards that look ahead are denoising steps."""
  ahead = expected.look_ahead // 3
  return expected._replace(
    denoise=expected.denoise + 2 * ahead,
    look_ahead=0,
    commit=expected.commit + ahead,
    decoded=expected.decoded + expected.previewed,
    previewed=0,
  )


def _ledger(models: Models, search: SearchConfig, traces: list[ChunkTrace], tries: list[Try]) -> Ledger:
  """The account of a video of `NUM_CHUNKS` chunks, as `streamt1 generate` keeps it."""
  ledger = Ledger(models, MODEL, search, capacity=NUM_CHUNKS)
  for each in traces:
    ledger.add(each)
  for each in tries:
    ledger.add_try(each)
  return ledger


HOST_NUMBERS = {"backtracking": {"motion": 9.0, "back": 2}}
"""With others than its own, the method goes back: no chunk of the toy moves nine times as much as the one before."""


HOST_COSTS = {
  # Nine beginnings of a chunk, and one is the video's, are judged with their first frame; and so is the video.
  "zero_order": Cost(2 * 12, 0, 12, 12, 0, 0, 0, 9 + 1, 9 + 13),
  # The third chunk and the fourth are made anew twice, and each time the chunk before them as well.
  "backtracking": Cost(2 * 12, 0, 12, 12, 0, 0, 0, 1, 13),
}
"""By hand, of the methods that drive the chunk step from the host."""


# The toy has two denoising steps, and one latent frame in a chunk: 1 frame in the first chunk and 4 in the others.
@pytest.mark.parametrize("name", METHODS)
def test_every_method_costs_what_is_counted_and_tells_its_tree(name):
  method = METHODS[name]
  # The toy has one step before the last.
  numbers = {each: 0.5 for each, default in method.numbers.items() if default is None}
  numbers |= HOST_NUMBERS.get(name, {})
  search = method.settings(MODEL, numbers=numbers)
  models, counted, traces, beams, tries = _count(search, method=method, **numbers)
  ledger = _ledger(models, search, traces, tries)
  verdict = cost.whole_video_cost(models, search, NUM_CHUNKS)
  assert _seen_by_the_models(cost.total([ledger.cost, verdict])) == counted
  by_formula = video_cost(models, search, NUM_CHUNKS)
  assert HOST_COSTS.keys() == {each for each in METHODS if METHODS[each].run is not None}
  assert cost.total([ledger.cost, verdict]) == HOST_COSTS.get(name, by_formula)
  costs = [cost.chunk_cost(models, search, index, NUM_CHUNKS) for index in range(NUM_CHUNKS)]
  segments = [(0, "a red circle")]
  described = describe_trace(traces, beams, search, segments=segments, method=name, costs=costs, tries=tries)
  # As a file holds it.
  document = json.loads(manifest.to_json_line(described))
  trace_schema.check(document)
  assert [each["seed"] for each in document["tries"]] == [each.seed for each in tries]
  shown = [traces[chunk].latents[beam] for chunk, beam, _ in trace_schema.shown(document)]
  np.testing.assert_array_equal(np.concatenate(shown), beams.latents[beams.best])
  for index, chunk in enumerate(document["chunks"]):
    assert {each["hybrid"] is None for each in chunk["candidates"]} == {not search.judges_chunk(index)}


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    # One video: 4 chunks in 2 steps and a clean pass; 1 + 4 + 4 + 4 frames; windows of 1, 5, 9 and 13 frames.
    ({"beam_size": 1, "top_k": 1}, Cost(8, 0, 4, 4, 0, 4, 13, 4, 28)),
    ({"beam_size": 2, "top_k": 1}, Cost(16, 0, 4, 8, 0, 8, 26, 8, 56)),
    ({"beam_size": 2, "top_k": 2}, Cost(32, 0, 8, 16, 0, 16, 52, 16, 112)),
  ],
)
def test_a_beam_by_hand(sizes, expected):
  search = METHODS["beam"].settings(MODEL, **sizes)
  models, counted, *_ = _count(search)
  assert (counted, video_cost(models, search, NUM_CHUNKS)) == (expected, expected)


def test_chunks_that_are_not_judged():
  """The first and the third of four chunks are judged; at the end both videos are, since the last chunk was not."""
  search = METHODS["beam"].settings(MODEL, beam_size=2, top_k=2)
  search = dataclasses.replace(search, judge_every=2)
  models, counted, traces, beams, _ = _count(search)
  expected = Cost(2 * 8 + 2 * 4, 0, 8, 2 * 4 + 2 * 2, 0, 8, 4 * (1 + 4), 8 + 2, 4 * (1 + 9) + 2 * 13)
  assert (counted, video_cost(models, search, NUM_CHUNKS)) == (expected, expected)
  document = describe_trace(traces, beams, search)
  trace_schema.check(document)
  assert [len(chunk["candidates"]) for chunk in document["chunks"]] == [4, 2, 4, 2]
  assert [chunk["judged"] for chunk in document["chunks"]] == [True, False, True, False]


@pytest.mark.parametrize(("decoding", "again"), [("together", 0), ("twice", 4 + 2 * 5)])
def test_candidates_that_are_carried_on(decoding, again):
  """Two candidates by two chunks, by one before the last, and by none there: five chunks that are thrown away."""
  search = METHODS["look_ahead"].settings(MODEL, beam_size=2, top_k=1, look_ahead=2)
  models, counted, *_ = _count(search, decoding)
  # Chunks 1 and 2, 2 and 3, and 3 follow; windows have 1, 5, 9 and 13 frames.
  ahead = Cost(0, 2 * 5 * 3, 0, 2 * 5, 0, 2 * 5, 2 * 5 * 4, 2 * 5, 2 * (5 + 9 + 9 + 13 + 13))
  expected = cost.total([Cost(16, 0, 4, 8 + again, 0, 8, 26, 8, 56), ahead])
  assert (counted, video_cost(models, search, NUM_CHUNKS)) == (_seen_by_the_models(expected), expected)


@pytest.mark.parametrize(("horizon", "follow"), [(2, [1, 0, 2, 2, 2, 2, 1, 0]), (20, [2, 2, 2, 2, 2, 2, 1, 0])])
def test_candidates_that_are_carried_on_towards_a_horizon(horizon, follow):
  """The toy makes 8 chunks at most. A horizon is the end as long as it lies ahead."""
  search = METHODS["look_ahead"].settings(MODEL, beam_size=2, top_k=1, look_ahead=2)
  models, counted, traces, *_ = _count(search, num_chunks=8, length=horizon)
  ledger = Ledger(models, MODEL, search, capacity=max(8, horizon), length=horizon)
  assert [ledger.add(each).look_ahead for each in traces] == [2 * 3 * each for each in follow]
  assert _seen_by_the_models(ledger.cost) == counted


def test_rounds_cost_what_was_drawn():
  """One round of two candidates in every chunk, of three that there may be; the winner is decoded again."""
  search = METHODS["rounds"].settings(MODEL, beam_size=6, round_size=2, accept=-1e6)
  models, counted, traces, beams, _ = _count(search)
  costs = [cost.chunk_cost(models, search, i, NUM_CHUNKS, rounds=int(each.rounds)) for i, each in enumerate(traces)]
  assert counted == cost.total(costs) == Cost(16, 0, 4, 8 + 4, 0, 8, 26, 8, 56)
  assert [cost.chunk_depth(models, search, i, NUM_CHUNKS, 1) for i in range(NUM_CHUNKS)] == [3] * NUM_CHUNKS
  assert cost.chunk_depth(models, search, 0, NUM_CHUNKS, 3) == 7
  trace_schema.check(describe_trace(traces, beams, search))


def test_candidates_that_are_rejected_early():
  """Four begin, one step is done, and two go on; a preview decodes a latent frame and shows one of its frames."""
  search = METHODS["beam"].settings(MODEL, beam_size=2, top_k=1)
  search = dataclasses.replace(search, policy=Reject(start=4, step=0))
  models, counted, traces, beams, _ = _count(search)
  expected = Cost(4 * (4 + 2), 0, 4, 8, 16, 4 * (4 + 2), 4 * 4 + 2 * 13, 8, 56)
  assert (counted, video_cost(models, search, NUM_CHUNKS)) == (_seen_by_the_models(expected), expected)
  document = describe_trace(traces, beams, search)
  trace_schema.check(document)
  for chunk in document["chunks"]:
    inside, final = chunk["events"]
    assert (inside["step"], final["step"]) == (0, "final")
    # What went on had the best previews, and who did not is in the tree as well.
    (places,) = inside["ancestors"]
    rejected = {each["place"]: each["preview"] for each in chunk["rejected"]}
    assert sorted([*places, *rejected]) == [0, 1, 2, 3]
    assert min(each["preview"] for each in chunk["candidates"]) >= max(rejected.values())


def test_weights_of_an_event_by_hand():
  """Weights 1, 1, 2 and 0: 16 / 6 of equal ones."""
  search = METHODS["best_of_n"].settings(MODEL, top_k=4)
  made = _count(METHODS["none"].settings(MODEL), num_chunks=1).traces[0]
  made = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), made)
  weighted = made._replace(log_weight=np.log([[1.0], [1.0], [2.0], [1e-30]]), survivor=np.array([0, 2, 2, 1]))
  (event,) = trace.describe_chunk(0, weighted, search)["events"]
  assert event["ess"] == pytest.approx(16 / 6)
  assert (event["resampled"], event["distinct_parents"]) == (True, 3)
  fates = [each["fate"] for each in trace.describe_chunk(0, weighted, search)["candidates"]]
  assert fates == ["survived", "survived", "duplicated", "pruned"]


def test_winners_that_are_decoded_again():
  search = METHODS["beam"].settings(MODEL, beam_size=2, top_k=1)
  models, counted, *_ = _count(search, "twice")
  expected = Cost(16, 0, 4, 8 + 4, 0, 8, 26, 8, 56)
  assert (counted, video_cost(models, search, NUM_CHUNKS)) == (expected, expected)


def test_rewards_that_see_everything_decoded_from_scratch():
  """Two candidates: a chunk of 1 and a window of 2 latent frames each, also in the first chunk; and the winner's."""
  search = METHODS["beam"].settings(MODEL, beam_size=2, top_k=1, sliding_window=2, reward_decode="scratch")
  models, counted, *_ = _count(search)
  # A chunk by itself has 1 frame, windows have 1, 5, 5 and 5; at the end the whole video has 13.
  expected = Cost(16, 0, 4, 4 * (2 * 3 + 1), 0, 8, 8, 8 + 1, 2 * 16 + 13)
  assert (counted, video_cost(models, search, NUM_CHUNKS)) == (expected, expected)


def test_a_window_shorter_than_the_video_is_judged_once_more():
  search = METHODS["beam"].settings(MODEL, beam_size=1, top_k=2, sliding_window=2)
  models, counted, *_ = _count(search)
  # Past frames are those of a first chunk, 1: windows have 1, 5, 5 and 5 frames.
  expected = Cost(16, 0, 8, 8, 0, 8, 26, 8 + 2, 2 * (1 + 5 + 5 + 5) + 2 * 13)
  assert (counted, video_cost(models, search, NUM_CHUNKS)) == (expected, expected)


def test_frames_that_the_image_reward_does_not_see():
  search = METHODS["greedy"].settings(MODEL, beam_size=2)
  first, later = (cost.chunk_cost(toy.MODELS, search, index, 9, short_frames=3) for index in (0, 4))
  assert first.image_frames == later.image_frames == 2  # The toy's chunk has one frame.


def test_sums():
  one = Cost(1, 2, 3, 4, 5, 6, 7, 8, 9)
  assert cost.total([one, one, Cost()]) == Cost(2, 4, 6, 8, 10, 12, 14, 16, 18)
  assert cost.total([]) == Cost()
  assert one.forwards == 6


def test_a_chunk_at_full_size_against_figures_worked_out_without_this_code():
  """TFLOP of forwards, decodes and judges; 2 beams of 2 candidates. Three digits of docs/reference."""
  model = preset("wan_1_3b")
  models, search = search_flop.published(model), METHODS["stream_t1"].settings(model)
  prices = search_flop.published_prices(model)
  chunk = cost.chunk_cost(models, search, 20, 40)
  found = prices.of(chunk, cost.streams_begun(models, search, 20), seen=4)
  expected = (18 * 28.3, 4 * 40.7, 4 * 171.9, 4 * 18.0)
  np.testing.assert_allclose(np.array(found) / 1e12, expected, rtol=0.01)
  first = search_flop.plain_flop(prices, 1)
  assert first.decoding / 1e12 == pytest.approx(31.5, rel=0.01)
