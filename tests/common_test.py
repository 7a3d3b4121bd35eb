"""What all programs share."""

import signal

import pytest
from absl import flags

from streamt1_jax.cli import common


class _Interrupting:
  """Python reports what is raised in `__del__`, and drops it."""

  def __del__(self):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_is_not_lost():
  before = signal.signal(signal.SIGINT, common._interrupt)
  try:
    common.raise_if_interrupted()
    _Interrupting()
    with pytest.raises(KeyboardInterrupt):
      common.raise_if_interrupted()
  finally:
    signal.signal(signal.SIGINT, before)
    common._interrupted.clear()


def test_bounded_flags_can_be_written_to_a_flagfile():
  common.define_float("a_bounded_float", 0.5, "For this test.", 0.0, 1.0)
  common.define_integer("a_bounded_integer", 3, "For this test.", 1)
  assert flags.FLAGS["a_bounded_float"].serialize() == "--a_bounded_float=0.5"
  assert flags.FLAGS["a_bounded_integer"].serialize() == "--a_bounded_integer=3"
