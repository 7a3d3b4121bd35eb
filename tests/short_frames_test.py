"""What fewer frames change, on a small random model: decisions are those of the searches they stand for."""

import dataclasses
import json

from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards import selection
from tests import small_search
from tests.command_line import quick_compilation, result_of, save_model, start, start_function

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


def _compare() -> None:
  """Prints decisions of a comparison, and those of searches that see so many frames."""
  from experiments.evaluate.compare_short_frames import decide
  from streamt1_jax.evaluation import comparison

  search, pipeline = small_search.SEARCH, _SmallPipeline.make()
  plain = lambda decision: [decision.survivors.tolist(), decision.short.tolist()]
  compared = decide(pipeline, search, [3, 1], _CHUNKS, "", _SEED)
  searched = []
  for number, chunks in ((3, _CHUNKS), (1, 1)):
    image = dataclasses.replace(pipeline.models.image_reward, num_frames=number)
    of_number = dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, image_reward=image))
    traces = of_number.stream(of_number.condition("", _CHUNKS), search, num_chunks=chunks, seed=_SEED)
    searched.append([plain(comparison.Decision.of(trace)) for trace in traces])
  print(json.dumps({"compared": [[plain(d) for d in chunk] for chunk in compared], "searched": searched}))


def test_decisions_are_those_of_searches(tmp_path):
  process = start_function(tmp_path, _compare, jax_settings=quick_compilation(tmp_path / "compiled"))
  process.join()
  result = result_of(process.exitcode, tmp_path)
  assert result.code == 0, result
  found = json.loads(result.stdout.splitlines()[-1])
  all_frames, one_frame = ([chunk[index] for chunk in found["compared"]] for index in range(2))
  # The second chunk as well: it grows from the winners of all frames.
  assert all_frames == found["searched"][0]
  assert one_frame[:1] == found["searched"][1]
  assert all(one[1] != whole[1] for one, whole in zip(one_frame, all_frames, strict=True))


def test_program(tmp_path):
  save_model(tmp_path / "tiny")
  arguments = ("--checkpoint=tiny", "--frames=12,1", "--num_prompts=2", "--seconds=0.5")
  process = start(
    tmp_path, *arguments, program="compare_short_frames", jax_settings=quick_compilation(tmp_path / "compiled")
  )
  process.join()
  result = result_of(process.exitcode, tmp_path)
  assert result.code == 0, result
  printed = json.loads(result.stdout.splitlines()[-1])
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
