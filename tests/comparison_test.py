"""Comparisons of searches: the statistics."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import noise_propagation
from streamt1_jax.config import SearchConfig
from streamt1_jax.data import verify
from streamt1_jax.evaluation import comparison, decisions

_CAPTIONS = itertools.count()


def _row(**passed) -> dict:
  """A row, of a caption of its own, in which the methods in `passed` pass every verdict or none."""
  verdicts = {m: dict.fromkeys(verify.VERDICTS, passed.get(m, False)) for m in comparison.METHODS}
  return {"caption": f"caption {next(_CAPTIONS)}", "verdicts": verdicts}


def test_differences_are_paired():
  """Both methods pass half of the prompts; on which ones decides the interval of the difference."""
  same = [_row(plain=i < 50, search=i < 50) for i in range(100)]
  opposite = [_row(plain=i < 50, search=i >= 50) for i in range(100)]
  found = [comparison.summary(rows)["search - plain"]["shape"] for rows in (same, opposite)]
  assert found[0] == {"mean": 0.0, "low": 0.0, "high": 0.0}
  # Differences of 1 and -1: the mean of 100 has the standard deviation 0.1.
  assert found[1]["mean"] == 0.0
  np.testing.assert_allclose([found[1]["low"], found[1]["high"]], [-0.196, 0.196], atol=0.03)


def test_interval_of_a_share():
  """p = .25, n = 400: plus and minus 1.96 sqrt(p (1 - p) / n) = .0424."""
  found = comparison.interval(np.repeat([1.0, 0.0], [100, 300]), range(400))
  assert found["mean"] == 0.25
  np.testing.assert_allclose([found["low"], found["high"]], [0.2076, 0.2924], atol=0.006)


def test_prompts_of_one_caption_are_not_independent():
  """Each of 400 verdicts four times over is worth 400, not 1600."""
  once = comparison.interval(np.repeat([1.0, 0.0], [100, 300]), range(400))
  assert comparison.interval(np.repeat([1.0, 0.0], [400, 1200]), np.repeat(range(400), 4)) == once


def test_rows_of_other_programs_are_none():
  """What a file of rows may hold instead; each would end the summary with a traceback."""
  row = _row(plain=True)
  verdicts = row["verdicts"]
  assert comparison.is_row(row | {"seed": 3})
  for wrong in (
    {},
    {"caption": "a red circle"},
    {"verdicts": verdicts},
    row | {"caption": 3},
    row | {"caption": ["a"]},
    row | {"verdicts": []},
    row | {"verdicts": {"plain": verdicts["plain"]}},
    row | {"verdicts": verdicts | {"search": None}},
    row | {"verdicts": verdicts | {"search": verdicts["search"] | {"shape": "yes"}}},
  ):
    assert not comparison.is_row(wrong)


def test_the_table_has_a_row_for_every_method_and_difference():
  table = comparison.table(comparison.summary([_row(plain=True), _row(search=True)]))
  lines = table.splitlines()
  assert len(lines) == 2 + len(comparison.METHODS) + len(comparison.DIFFERENCES)
  assert lines[2].startswith("| plain | 0.50 [0.00, 1.00] |")


@pytest.mark.parametrize(("beam_size", "top_k"), [(2, 2), (4, 1), (3, 2)])
def test_plain_videos_begin_with_the_noises_of_the_search(beam_size, top_k):
  search = SearchConfig.released(beam_size=beam_size, top_k=top_k)
  drawn = noise_propagation.candidate_seeds(
    jnp.int32(7), jnp.zeros(top_k, jnp.int32), jnp.int32(0), beam_size=beam_size, first_candidate="reuse"
  )
  assert comparison.plain_seeds(7, search) == np.asarray(drawn).ravel().tolist()


def test_order():
  scores = np.array([0.1, 0.4, 0.2, 0.3])
  assert decisions.same_order(scores, 2 * scores) == 1.0
  assert decisions.same_order(scores, -scores) == 0.0
  # One of six pairs changes places: the last two.
  assert decisions.same_order(scores, np.array([0.1, 0.4, 0.3, 0.2])) == pytest.approx(5 / 6)


def test_shares_of_decisions():
  decision = lambda survivors, short: decisions.Decision(np.array(survivors), np.array(short))
  whole = decision([2, 1], [0.0, 0.5, 1.0])
  decided = [[whole, decision([1, 2], [0.0, 1.0, 0.5])], [whole, decision([2, 0], [0.0, 0.5, 1.0])]]
  found = decisions.agreement(decided, [12, 1])
  assert found[12] == {"chunks": 2, "same_best": 1.0, "same_survivors": 1.0, "same_order": 1.0}
  assert found[1] == {"chunks": 2, "same_best": 0.5, "same_survivors": 0.5, "same_order": round(5 / 6, 3)}
