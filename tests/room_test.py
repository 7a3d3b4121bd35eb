"""What is made of pools of plain videos."""

import pytest

from streamt1_jax.evaluation import room

ONE, TWO = "a large red circle moves quickly left over a gray background", "a small blue square moves slowly up"
BOTH = f"{ONE.partition(' over')[0]} and {TWO} over a gray background"
BLUE = ONE.replace("red", "blue")


def test_captions_hold_by_what_happens_with_them():
  """Two videos of one timeline and one of another; `None` is a caption that never held."""
  rows = [
    {"captions": [ONE, BOTH, ONE], "videos": [{"chunks_until": until} for until in ([0, None, 2], [0, 1, 0])]},
    {"captions": [ONE, BLUE], "videos": [{"chunks_until": [None, 0]}]},
  ]
  assert room.by_event(rows) == [
    ["appears", "2", "2", "0.50"],
    ["begins", "1", "3", "0.67"],
    ["color", "1", "1", "1.00"],
    ["leaves", "1", "2", "1.00"],
  ]


@pytest.mark.parametrize(("passed", "picked", "expected"), [(0, 4, 0.0), (13, 4, 1.0), (1, 4, 4 / 16), (2, 1, 2 / 16)])
def test_a_perfect_judge(passed, picked, expected):
  assert room.oracle(passed, 16, picked) == pytest.approx(expected)
