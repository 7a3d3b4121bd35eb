"""The description of a search by hand, with more candidates than beams and a merge into the very first frame."""

import dataclasses

import numpy as np

from streamt1_jax.config import SearchConfig
from streamt1_jax.drivers import FinalBeams
from streamt1_jax.generator import Eviction
from streamt1_jax.memory_sinking import DISCARD, EMA, NOTHING
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.state import CandidateTrace, ChunkTrace
from tests.whole_video import describe_trace

TOP_K, BEAM_SIZE = 2, 3
SEARCH = SearchConfig(top_k=TOP_K, beam_size=BEAM_SIZE)


def chunk(survivor: list[int], *, route=(NOTHING, NOTHING), frame=(-1, -1), sink_frame=(-1, -1)) -> ChunkTrace:
  """Candidate n = 3 * parent + i has the seed 10 + n and the scores n, 10 n and 100 n."""
  number = np.arange(TOP_K * BEAM_SIZE).reshape(TOP_K, BEAM_SIZE)
  score = number.astype(np.float32)
  flags = Flags(ema=number == 4, append=number == 2)
  return ChunkTrace(
    candidates=CandidateTrace(10 + number, score, 10 * score, 100 * score, number != 5, flags),
    eviction=Eviction(*map(np.array, (route, frame, sink_frame))),
    survivor=np.array(survivor),
    score=100 * np.array(survivor, np.float32),
    latents=None,
    frames=None,
    steps=None,
  )


def test_candidates_are_numbered_by_parent():
  (described,) = describe_trace([chunk([4, 2])], None, SEARCH)["chunks"]
  candidates = described["candidates"]
  assert [each["candidate"] for each in candidates] == [0, 1, 2, 3, 4, 5]
  assert [each["parent"] for each in candidates] == [0, 0, 0, 1, 1, 1]
  assert [each["seed"] for each in candidates] == [10, 11, 12, 13, 14, 15]
  assert [(each["short"], each["long"], each["hybrid"]) for each in candidates][4] == (4.0, 40.0, 400.0)
  assert [each["flags"] for each in candidates][2] == {"ema": False, "append": True}
  assert [each["flags"] for each in candidates][4] == {"ema": True, "append": False}
  assert [each["usable"] for each in candidates] == [True] * 5 + [False]
  assert [each["rank"] for each in candidates] == [None, None, 1, None, 0, None]
  assert [each["survivor"] for each in candidates] == [False, False, True, False, True, False]
  assert (described["survivors"], described["scores"]) == ([4, 2], [400.0, 200.0])


def test_what_nothing_judged_has_no_score():
  (described,) = describe_trace([chunk([0, 1])], None, dataclasses.replace(SEARCH, beam_size=1, judges=False))["chunks"]
  assert described["scores"] == [None, None]
  assert [(each["short"], each["long"], each["hybrid"]) for each in described["candidates"]] == [(None,) * 3] * 2


def test_frame_0_is_a_frame():
  """The first chunk leaves the window, and the sink at the beginning of the video takes it in."""
  (described,) = describe_trace([chunk([0, 3], route=(EMA, DISCARD), frame=(0, 3), sink_frame=(0, -1))], None, SEARCH)[
    "chunks"
  ]
  assert described["evictions"] == [
    {"parent": 0, "route": "ema", "frame": 0, "sink_frame": 0},
    {"parent": 1, "route": "discard", "frame": 3, "sink_frame": None},
  ]
  # A candidate's route is its parent's.
  assert [each["route"] for each in described["candidates"]] == ["ema"] * 3 + ["discard"] * 3


def test_lineage_counts_candidates_of_a_parent():
  """The best beam of the end is 0: candidate 5, of beam 1, which was candidate 2, of beam 0, candidate 3 before."""
  chunks = [chunk([3, 1]), chunk([4, 2]), chunk([5, 0])]
  beams = FinalBeams(latents=None, frames=None, scores=np.array([7.0, 6.0]), best=0)
  final = describe_trace(chunks, beams, SEARCH)["final"]
  assert final == {
    "scores": [7.0, 6.0],
    "best": 0,
    "lineage": [
      {"chunk": 0, "beam": 0, "candidate": 3},
      {"chunk": 1, "beam": 1, "candidate": 2},
      {"chunk": 2, "beam": 0, "candidate": 5},
    ],
  }
