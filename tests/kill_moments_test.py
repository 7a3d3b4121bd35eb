"""Moments at which the kill test kills: after which event, how often that comes, and within how many seconds."""

import random

import pytest

from streamt1_jax.measuring.kill_moments import DRAWN, Program, Shares, draw_moment

PROGRAM = Program(
  lengths={"compile": 7.0, "save": 2.0, "assemble": 1.0, "write": 3.0, "run": 50.0},
  shares=Shares(denoise=0.5, reward=0.75),
  chunk_seconds=8.0,
  num_videos=2,
)
# Event, how often it may have to come, and the first and the last second after it.
EXPECTED = {
  "compile": ("+first_chunk", {1}, 0.0, 7.0),
  "denoise": ("+search", {1, 2, 3}, 0.0, 4.0),
  "reward": ("+search", {1, 2, 3}, 4.0, 6.0),
  "save": ("+save", {1, 2, 3}, 0.0, 2.4),
  "write": ("+assemble", {1, 2}, 0.0, 4.0),
  "any": ("+start", {1}, 0.0, 50.0),
}


def test_every_phase_is_drawn():
  assert set(DRAWN) == set(EXPECTED)


@pytest.mark.parametrize("drawn", DRAWN)
def test_moments_fill_the_phase(drawn):
  random.seed(0)
  events, counts, seconds = zip(*(draw_moment(drawn, PROGRAM) for _ in range(400)), strict=True)
  event, often, begin, end = EXPECTED[drawn]
  assert set(events) == {event}
  assert set(counts) == often
  # 400 of them leave out a twentieth at either end with a probability of 2.5e-9.
  margin = (end - begin) / 20
  assert begin <= min(seconds) < begin + margin
  assert end - margin < max(seconds) <= end
