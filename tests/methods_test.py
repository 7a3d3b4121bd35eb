"""Searches with names: what each sets, what it leaves to the user, and its flagfile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.cli import command, generate, search_flags
from streamt1_jax.config import ConfigError, SearchConfig, SearchDefaults, preset
from streamt1_jax.methods import METHODS, Method, find
from streamt1_jax.policies import ByScore, KeepBeams, Particles, PerBeam, ProbabilisticTopK, RankEnsemble, TopK
from streamt1_jax.state import Condition
from tests import toy_generator as toy
from tests.command_line import REPOSITORY

MODEL = preset("tiny")
STREAMING = SearchConfig.streaming(MODEL)
NEVER = {"short_threshold": 1e30, "long_threshold": 1e30}
BEAM = {**vars(STREAMING), "beam_size": 2, "top_k": 2, "judges": True, **NEVER}
# Thresholds bring sinks back, averages and all.
TOOLKIT = {**BEAM, "sink_ema_decay": 0.999}
# By name, the fields in which a search differs from the default one. Written by hand.
DIFFERENT = {
  "stream_t1": {},
  "stream_t1_paper": {"first_candidate": "fresh", "short_baseline": "window", "sink_ema_dtype": "float32"},
  "no_propagation": {"noise_sigma": 0.0, "first_candidate": "fresh"},
  "no_sinking": {"max_sink_frames": 3, **NEVER},
  "ema_only": {"max_sink_frames": 3, "long_threshold": 1e30},
  "short_only": {"policy": ByScore("short")},
  "long_only": {"policy": ByScore("long")},
  "none": vars(STREAMING),
  "beam": BEAM,
  "greedy": {**vars(STREAMING), "beam_size": 4, "judges": True, **NEVER},
  "best_of_n": {**vars(STREAMING), "top_k": 4, "policy": KeepBeams()},
  "cumulative": {**TOOLKIT, "policy": TopK(cumulative=True)},
  "per_beam": {**TOOLKIT, "policy": PerBeam(0.2)},
  "probabilistic": {**TOOLKIT, "policy": ProbabilisticTopK(0.01)},
  "rank_ensemble": {**TOOLKIT, "policy": RankEnsemble()},
  "every_j": {**TOOLKIT, "judge_every": 3},
  "look_ahead": {**TOOLKIT, "look_ahead": 1},
  "rounds": {**TOOLKIT, "beam_size": 16, "top_k": 1, "round_size": 4},
  "particles": {**TOOLKIT, "beam_size": 1, "top_k": 4, "policy": Particles(0.05)},
  "particles_sum": {**TOOLKIT, "beam_size": 1, "top_k": 4, "policy": Particles(0.05, score="sum")},
}


def _settings(name):
  """What a method sets, with 0.05 for a number that it must be given."""
  method = find(name)
  return method.settings(MODEL, numbers={name: 0.05 for name, value in method.numbers.items() if value is None})


@pytest.mark.parametrize("name", DIFFERENT)
def test_settings(name):
  assert _settings(name) == dataclasses.replace(SearchConfig(), **DIFFERENT[name])


@pytest.mark.parametrize("name", METHODS)
def test_every_search_has_a_flagfile_that_chooses_it(name):
  path = REPOSITORY / f"experiments/flagfiles/search_{name}.flags"
  values = command.parse(generate.define_flags, [f"--flagfile={path}", "--prompt=a red circle"])
  assert values.search == name
  # The sizes are written out, so that a user sees what to change.
  assert search_flags.search_config(values, MODEL) == _settings(name)


def test_a_models_own_numbers_and_the_flag_that_brings_the_published_ones_back():
  tuned = dataclasses.replace(MODEL, search=SearchDefaults(short_threshold=0.5, max_sink_frames=9))
  found = lambda *given: search_flags.search_config(command.parse(generate.define_flags, ["--prompt=a", *given]), tuned)
  assert found() == SearchConfig(short_threshold=0.5, max_sink_frames=9)
  assert found("--short_threshold=0.75") == SearchConfig(short_threshold=0.75, max_sink_frames=9)
  assert found("--search_defaults=released") == SearchConfig()
  # What a method leaves out stays out.
  assert found("--search=no_sinking").short_threshold == NEVER["short_threshold"]
  assert found("--search=ema_only").short_threshold == 0.5
  assert found("--search=beam") == dataclasses.replace(SearchConfig(), **DIFFERENT["beam"])


@pytest.mark.parametrize(
  ("name", "learned"), [("stream_t1", True), ("zero_order", True), ("none", False), ("backtracking", False)]
)
def test_what_judges_nothing_loads_no_large_reward(name, learned):
  """Zero-order search judges from the host, and backtracking looks at the motion alone."""
  values = command.parse(generate.define_flags, [f"--search={name}"])
  stored = search_flags.reward_choice(values, REPOSITORY / "checkpoints/tiny", MODEL).stored
  assert set(stored) == ({"hpsv3", "videoalign"} if learned else set())


def test_a_user_may_set_what_the_method_leaves_open():
  assert find("beam").settings(MODEL, beam_size=5).beam_size == 5
  assert find("no_propagation").settings(MODEL, semantics="paper") == dataclasses.replace(
    SearchConfig.paper(), noise_sigma=0.0
  )
  for name, method in METHODS.items():
    assert set(method.fields) <= {"semantics", *vars(SearchConfig())}, name
  assert find("none").settings(MODEL, sink_distance=9).sink_distance == 9


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("beam", {"noise_sigma": 0.1}, "search beam takes no noise_sigma"),
    ("greedy", {"top_k": 2}, "search greedy takes no top_k"),
    ("none", {"semantics": "paper"}, "search none takes no semantics"),
    ("stream_t1", {"semantics": "own"}, "semantics must be one of released, paper, got 'own'"),
    ("best_of_n", {"top_k": 1}, "needs top_k of at least 2, got 1"),
    ("beam", {"beam_size": 0}, "beam_size must be in 1..100"),
    ("particles", {}, "search particles needs alpha: --policy=alpha:NUMBER"),
    ("particles", {"numbers": {"alpha": 1.0}, "top_k": 1}, "needs top_k of at least 2, got 1"),
    ("beam", {"numbers": {"alpha": 1.0}}, "search beam has no number alpha; known: none"),
  ],
)
def test_what_a_method_refuses(name, fields, message):
  with pytest.raises(ConfigError, match=message):
    find(name).settings(MODEL, **fields)


def test_copies_of_the_state_that_searches_from_the_host_keep():
  """Zero-order search keeps the beginning, and two tries; backtracking three tries, with where each chunk begins."""
  zero, back = find("zero_order"), find("backtracking")
  assert [zero.states_kept(numbers) for numbers in ({}, {"chunks": 3.0}, {"rounds": 0.0})] == [3, 7, 0]
  assert [back.states_kept(numbers) for numbers in ({}, {"back": 2.0}, {"attempts": 0.0})] == [5, 11, 1]
  assert find("beam").states_kept({}) == 0


def test_particles_say_what_they_forget():
  search = _settings("particles")
  assert find("particles").note(search, 10) is None
  assert "11 chunks is longer than the sliding window of 10" in find("particles").note(search, 11)
  assert find("particles_sum").note(_settings("particles_sum"), 11) is None


def test_a_name_that_is_not_there():
  with pytest.raises(ConfigError, match=r"there is no search 'beams'; known: stream_t1, none, "):
    find("beams")


def test_numbers_of_a_policy():
  def search(model, alpha, beta):
    return dataclasses.replace(SearchConfig.streaming(model), fusion_cap=alpha, sink_ema_decay=beta)

  method = Method("mine", "Mine.", search, numbers={"alpha": None, "beta": 0.5})
  made = method.settings(MODEL, numbers={"alpha": 0.25})
  assert (made.fusion_cap, made.sink_ema_decay) == (0.25, 0.5)
  with pytest.raises(ConfigError, match="search mine needs alpha: --policy=alpha:NUMBER"):
    method.settings(MODEL)


def _run(search, seed=3, num_chunks=4):
  condition = Condition((), (), (), jnp.int32(num_chunks))
  traces = drivers.stream(toy.PARAMS, condition, toy.MODELS, search, num_chunks=num_chunks, seed=seed)
  return [jax.device_get(trace) for trace in traces]


def test_a_beam_of_one_candidate_is_plain_streaming():
  plain = _run(find("none").settings(MODEL))
  one = _run(find("beam").settings(MODEL, beam_size=1, top_k=1))
  for left, right in zip(plain, one, strict=True):
    np.testing.assert_array_equal(left.latents, right.latents)
    np.testing.assert_array_equal(left.eviction.route, right.eviction.route)


def test_one_reward_alone_ranks_by_it_in_every_chunk():
  for score in ("short", "long"):
    for trace in _run(find(f"{score}_only").settings(MODEL)):
      ranked = getattr(trace.candidates, score).ravel()
      np.testing.assert_array_equal(trace.survivor, np.argsort(-ranked, kind="stable")[:2])
