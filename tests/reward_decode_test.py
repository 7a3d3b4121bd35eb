"""What the rewards see of a candidate, on a small random model: decisions are those of the searches they stand for."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.evaluate import compare_reward_decode
from streamt1_jax.config import SearchConfig
from streamt1_jax.evaluation import reward_decodes
from streamt1_jax.pipeline import Pipeline
from tests.command_line import save_model

_CAPTION, _SEED = "a red circle moves left over a dark blue background", 3
# In another program a pixel may be truncated to the next of 255 levels.
_ROUNDING = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
def test_decisions_are_those_of_searches(model):
  """Both ways see one first chunk, so the second one grows from the same winners."""
  pipeline, chunks = Pipeline.load(model), 2
  search = SearchConfig.released(sliding_window=2)
  row = reward_decodes.compare(pipeline, search, chunks, _CAPTION, _SEED)
  for way in reward_decodes.WAYS:
    searched = dataclasses.replace(search, reward_decode=way)
    traces = list(pipeline.stream(pipeline.condition(_CAPTION, chunks), searched, num_chunks=chunks, seed=_SEED))
    for found, trace in zip(row["chunks"], traces, strict=True):
      assert found[way]["survivors"] == trace.survivor.tolist()
      for score in ("short", "long", "hybrid"):
        np.testing.assert_allclose(found[way][score], np.ravel(getattr(trace.candidates, score)), atol=_ROUNDING)
    for found, trace in zip(reward_decodes.flags(row["chunks"], way, search), traces, strict=True):
      np.testing.assert_array_equal(found, [np.ravel(flag) for flag in trace.candidates.flags])
  first, second = row["chunks"]
  np.testing.assert_allclose(first["scratch"]["short"], first["streamed"]["short"], atol=_ROUNDING)
  assert np.abs(np.subtract(second["scratch"]["short"], second["streamed"]["short"])).max() > 10 * _ROUNDING


def _decision(survivors, short):
  return {"survivors": survivors, "short": short, "long": [1.0, 2.0, 3.0], "hybrid": [3.0, 2.0, 1.0]}


def test_summary():
  """One beam of three, and a window of two chunks: every one of three chunks has a place of its own."""
  search = SearchConfig.released(beam_size=3, top_k=1, sliding_window=2, long_threshold=10.0)
  alike = {way: _decision([0], [2.0, 4.0, 6.0]) for way in reward_decodes.WAYS}
  # Two of three pairs change places. The mean so far is 2 both ways.
  other = alike | {"streamed": _decision([0], [4.0, 6.0, 1.0])}
  # The means so far are 2 and 3: by its own, `streamed` would forget the second candidate.
  another = {"scratch": _decision([0], [1.0, 3.0, 5.0]), "streamed": _decision([1], [1.0, 3.0, 5.0])}
  report = reward_decodes.summary([{"chunks": [alike, other, another]}] * 2, search)
  same = {"long_order": 1.0, "hybrid_order": 1.0}
  assert report == {
    "1": {"chunks": 2, "same_best": 1, "same_survivors": 1, "short_order": 1, "other_flags": 0, **same},
    "2 to 2": {"chunks": 2, "same_best": 1, "same_survivors": 1, "short_order": 0.333, "other_flags": 0.667, **same},
    "from 3": {"chunks": 2, "same_best": 0, "same_survivors": 0, "short_order": 1, "other_flags": 0.333, **same},
  }
  assert "| from 3 | 2 | 0.00 | 0.00 | 1.00 | 1.00 | 1.00 | 0.33 |" in reward_decodes.table(report)


@pytest.mark.slow  # a whole program; its parts are tested above
def test_program_goes_on(tmp_path, capsys, model):
  rows = tmp_path / "rows.jsonl"
  arguments = [f"--checkpoint={model}", f"--output={rows}", "--seconds=0.5", "--sliding_window=2", "--mesh=data:1"]
  assert compare_reward_decode.main([*arguments, "--num_prompts=1"]) == 0, capsys.readouterr().err
  first = rows.read_text()
  assert compare_reward_decode.main([*arguments, "--num_prompts=2"]) == 0, capsys.readouterr().err
  assert rows.read_text().startswith(first)
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert printed["settings"]["prompts"] == printed["results"]["1"]["chunks"] == 2
  assert compare_reward_decode.main([*arguments, "--reward_decode=scratch"]) == 2
  assert "--reward_decode is what is compared" in capsys.readouterr().err
