"""FLOP of the reward models against figures worked out without this code; a TPU that does not exist."""

import pytest

from streamt1_jax.rewards.table import REWARDS
from tests.command_line import call

_TEXT_TOKENS = {"hpsv3": 656, "videoalign": 947}
"""Tokens of their texts around a prompt of 127 tokens."""


@pytest.mark.parametrize(
  ("name", "frames", "tflop"),
  [
    ("hpsv3", 1, 13.5),
    ("hpsv3", 9, 121),
    ("videoalign", 9, 6.9),
    ("videoalign", 33, 6.9),
    ("videoalign", 45, 9.1),
    ("videoalign", 69, 11.3),
    ("videoalign", 81, 13.5),
    ("videoalign", 93, 15.7),
    ("videoalign", 117, 17.9),
  ],
)
def test_published_sizes(name, frames, tflop):
  """The costs in docs/reference/rewards.md, which gives three digits."""
  spec = REWARDS[name]
  reward = spec.make(spec.config_type(), 16.0)
  found = spec.candidate_flop(reward, frames, (480, 832), _TEXT_TOKENS[name]) / 1e12
  assert found == pytest.approx(tflop, rel=0.01)


def test_a_topology_that_does_not_exist(tmp_path):
  """Whether or not the compiler is installed, one line says what is wrong."""
  result = call("measure.reward_cost", tmp_path, "--topology=v0:1x1")
  assert result.code == 2, result
  assert result.stdout == ""
  (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert line.startswith("error: --topology=v0:1x1: ")
  assert "no such slice" in line or "needs libtpu" in line
