"""What all programs share."""

import signal

import pytest

from experiments import common


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
