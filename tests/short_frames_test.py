"""What fewer frames change, on a small random model: decisions are those of the searches they stand for."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.evaluate import compare_short_frames
from streamt1_jax.evaluation import decisions
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards import selection
from tests import small_search
from tests.command_line import save_model

_SEED, _CHUNKS = 5, 2


class _SmallPipeline(Pipeline):
  """The small search, whose frames are latents: 3 a chunk. Its image reward can be shown fewer."""

  @classmethod
  def make(cls) -> "_SmallPipeline":
    models = small_search.models()
    image = selection.WeightedImageReward((selection.Term("match", models.image_reward, 1.0),))
    params = small_search.params() | {"image_reward": {"match": {}}}
    return cls(dataclasses.replace(models, image_reward=image), params, None, None)

  def condition(self, prompt, num_chunks):
    return small_search.condition(num_chunks)._replace(image_reward={"match": ()})


def _searched(pipeline: Pipeline, frames: int, chunks: int) -> list[decisions.Decision]:
  """Decisions of a search whose image reward sees `frames` frames of a chunk."""
  image = dataclasses.replace(pipeline.models.image_reward, num_frames=frames)
  of_number = dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, image_reward=image))
  traces = of_number.stream(of_number.condition("", _CHUNKS), small_search.SEARCH, num_chunks=chunks, seed=_SEED)
  return [decisions.Decision.of(trace) for trace in traces]


def _same(found, expected):
  """The same survivors. Scores differ by rounding: the programs are for videos of other lengths."""
  for (survivors, short), (other_survivors, other_short) in zip(found, expected, strict=True):
    assert survivors == other_survivors
    np.testing.assert_allclose(short, other_short, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")
def test_decisions_are_those_of_searches():
  pipeline = _SmallPipeline.make()
  compared = decisions.decide(pipeline, small_search.SEARCH, [3, 1], _CHUNKS, "", _SEED)
  plain = lambda decided: [(decision.survivors.tolist(), decision.short.tolist()) for decision in decided]
  all_frames, one_frame = (plain(chunk[index] for chunk in compared) for index in range(2))
  # The second chunk as well: it grows from the winners of all frames.
  _same(all_frames, plain(_searched(pipeline, 3, _CHUNKS)))
  _same(one_frame[:1], plain(_searched(pipeline, 1, 1)))
  assert all(one[1] != whole[1] for one, whole in zip(one_frame, all_frames, strict=True))


@pytest.mark.slow  # a whole program; its parts are tested above
def test_program(tmp_path, capsys):
  model = save_model(tmp_path / "tiny")
  arguments = [f"--checkpoint={model}", "--frames=12,1", "--num_prompts=2", "--seconds=0.5", "--mesh=data:1"]
  assert compare_short_frames.main(arguments) == 0, capsys.readouterr().err
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert printed["settings"] == {
    "split": "tune",
    "prompts": 2,
    "frames": [12, 1],
    "image_rewards": {"quality": 1.0},
    "video_rewards": {"coherence": 1.0},
    "reward_dtype": None,
  }
  assert printed["results"]["12"] == {"chunks": 2, "same_best": 1.0, "same_survivors": 1.0, "same_order": 1.0}
  assert printed["results"]["1"]["chunks"] == 2
