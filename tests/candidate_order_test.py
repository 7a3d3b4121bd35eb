"""Whether scores order candidates as the verdict does: the statistics, by hand, and one caption of the small model."""

import pytest

from streamt1_jax.evaluation import candidate_order
from streamt1_jax.pipeline import Pipeline


def _chunk(psnr, hybrid, failed):
  return {"chunk": 0, "psnr": psnr, "short": hybrid[::-1], "long": hybrid, "hybrid": hybrid, "failed": failed}


def test_only_pairs_that_differ_enough_count():
  chunk = _chunk([20.0, 20.4, 23.0], [0.0, 5.0, 3.0], [["shape", "all_at_once"], ["all_at_once"], []])
  assert candidate_order.pairs(chunk, "hybrid", 0.5) == [
    (True, {"shape", "all_at_once"}),  # 20.0 and 23.0
    (False, {"all_at_once"}),  # 20.4 and 23.0
  ]
  assert len(candidate_order.pairs(chunk, "hybrid", 0.25)) == 3
  # A tie is no order.
  assert candidate_order.pairs(_chunk([1.0, 9.0], [2.0, 2.0], [[], []]), "long", 0.5) == [(False, frozenset())]


def test_summary():
  chunks = [_chunk([20.0, 23.0], [0.0, 1.0], [["shape"], []]), _chunk([20.0, 23.0], [1.0, 0.0], [["color"], []])]
  rows = [{"caption": str(index), "chunks": chunks[: 1 + index % 2]} for index in range(4)]
  found = candidate_order.summary(rows)
  of = found["hybrid, 1.0 dB"]
  assert (of["pairs"], of["mean"]) == (6, 0.6667)
  assert of["by_verdict"] == {"color": {"pairs": 2, "right": 0.0}, "shape": {"pairs": 4, "right": 1.0}}
  assert found["short, 1.0 dB"]["mean"] == 0.3333
  assert "| hybrid, 2.0 dB | 6 | 0.67 [" in candidate_order.table(found)


@pytest.mark.slow  # compiles a search of the shipped model
def test_candidates_of_the_small_model():
  pipeline = Pipeline.load(reward="quality+coherence")
  row = candidate_order.judge_candidates(pipeline, 3, 2, "a red circle moves left over a dark blue background", seed=0)
  assert candidate_order.is_row(row)
  for chunk in row["chunks"]:
    # Candidates are different pictures of the same thing.
    assert len(set(chunk["psnr"])) == 3
    assert all(15.0 < psnr < 45.0 for psnr in chunk["psnr"])
  assert not candidate_order.is_row({"caption": 3})
