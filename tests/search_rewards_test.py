"""Searches that are judged by reward models, as a user runs them: a small random model, small random rewards."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from streamt1_jax.cli import results
from streamt1_jax.rewards.qwen2_vl import prompts
from tests import small_rewards
from tests.command_line import Result, generate, save_model

PROMPT = "a red circle moves left"
_SEARCHED = ("--num_latent_frames=9", "--short_frames=3", "--reward_dtype=bfloat16", "--sliding_window=2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  """With both rewards."""
  path = save_model(tmp_path_factory.mktemp("model") / "tiny")
  for model in ("hpsv3", "videoalign"):
    small_rewards.save_reward(path / "rewards" / model, model)
  return path


def _run(folder: pathlib.Path, checkpoint: pathlib.Path, *arguments: str, **options) -> Result:
  return generate(folder, f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", *arguments, **options)


def _read(folder: pathlib.Path, name: str) -> Any:
  return json.loads((folder / results.result_folder("outputs", PROMPT) / name).read_text())


@pytest.fixture(scope="module")
def searched(tmp_path_factory, checkpoint) -> pathlib.Path:
  """Three chunks judged by what the checkpoint has, in bfloat16."""
  folder = tmp_path_factory.mktemp("searched")
  result = _run(folder, checkpoint, *_SEARCHED)
  assert result.code == 0, result
  return folder


def test_records_say_what_judged(searched):
  expected = {
    "image_rewards": {"hpsv3": 1.0}, "video_rewards": {"videoalign": 1.0}, "short_frames": 3, "reward_dtype": "bfloat16"
  }  # fmt: skip
  manifest = _read(searched, "manifest.json")
  assert expected.items() <= manifest["settings"].items()
  assert expected.items() <= _read(searched, "trace.json").items()
  assert manifest["flags"]["reward"] is None
  assert manifest["flags"]["short_frames"] == 3


def test_candidates_are_told_apart(searched):
  trace = _read(searched, "trace.json")
  for chunk in trace["chunks"]:
    for score in ("short", "long"):
      assert len({candidate[score] for candidate in chunk["candidates"]}) > 1
  assert np.isfinite(trace["final"]["scores"]).all()


# Slow: a second chunk, whose rewards see a past, is two programs more.
@pytest.mark.parametrize("latent_frames", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_same_scores_on_a_mesh(tmp_path, checkpoint, latent_frames):
  """In float32: bfloat16 rounds by more than some candidates differ."""
  arguments = (
    f"--num_latent_frames={latent_frames}",
    "--short_frames=3",
    "--reward_dtype=float32",
    "--sliding_window=2",
  )
  chunks, meshes = [], []
  for name, mesh in (("whole", ()), ("divided", ("--mesh=candidate:4,seq:2",))):
    (tmp_path / name).mkdir()
    result = _run(tmp_path / name, checkpoint, *arguments, *mesh, one_device=not mesh)
    assert result.code == 0, result
    chunks.append(_read(tmp_path / name, "trace.json")["chunks"])
    meshes.append(_read(tmp_path / name, "manifest.json")["mesh"])
  assert meshes == [None, {"data": 1, "beam": 2, "sibling": 2, "model": 1, "seq": 2}]
  assert [chunk["survivors"] for chunk in chunks[0]] == [chunk["survivors"] for chunk in chunks[1]]
  for score in ("short", "long"):
    whole, divided = ([[candidate[score] for candidate in chunk["candidates"]] for chunk in each] for each in chunks)
    np.testing.assert_allclose(divided, whole, rtol=0, atol=1e-5)
    # Ten times what they may differ by on a mesh: another order would be seen.
    assert min(np.diff(np.sort(scores)).min() for scores in whole) > 1e-4


def test_one_chunk_is_enough(tmp_path, checkpoint):
  """Nine frames, the fewest there are; of two image rewards with weights, those of the models in int8."""
  arguments = ("--num_latent_frames=3", "--reward=quality+hpsv3+videoalign", "--reward_weights=quality:2,hpsv3:0.5")
  result = _run(tmp_path, checkpoint, "--reward_dtype=int8", *arguments)
  assert result.code == 0, result
  settings = _read(tmp_path, "manifest.json")["settings"]
  assert settings["image_rewards"] == {"quality": 2.0, "hpsv3": 0.5}
  assert settings["reward_dtype"] == "int8"


def test_other_weights_are_another_model(tmp_path, searched, checkpoint):
  """Finished results are told from those that the checkpoint's other rewards would give."""
  shutil.copytree(searched / "outputs", tmp_path / "outputs")
  other = shutil.copytree(checkpoint, tmp_path / "other")
  part = other / "rewards/hpsv3/part.json"
  part.write_text(part.read_text() + "\n")
  result = _run(tmp_path, other, *_SEARCHED)
  assert result.code == 2, result
  assert "was made with checkpoint_sha256" in result.stderr


def test_plain_streaming_loads_no_reward(tmp_path, checkpoint):
  damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
  (damaged / "rewards/hpsv3/reward.json").unlink()
  result = _run(tmp_path, damaged, "--num_latent_frames=3", "--search=none")
  assert result.code == 0, result
  assert _read(tmp_path, "manifest.json")["settings"]["image_rewards"] == {"quality": 1.0}


def _refused(folder: pathlib.Path, checkpoint: pathlib.Path, *arguments: str) -> str:
  result = generate(folder, f"--checkpoint={checkpoint}", *arguments)
  assert result.code == 2, result
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert not (folder / "outputs").exists()
  return line


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    (["--reward=clip"], ["reward: 'clip' is not one of quality, hpsv3"]),
    (["--reward=hpsv3+quality+coherence"], ["hpsv3 and quality are all image rewards", "reward_weights"]),
    (["--reward=hpsv3"], ["no video reward", "coherence, videoalign"]),
    (["--reward_weights=hpsv3"], ["--reward_weights: 'hpsv3' is not name:number"]),
    (["--reward_weights=hpsv3:1,hpsv3:2"], ["--reward_weights: hpsv3 is given twice"]),
    (["--reward_weights=hpsv3:-1"], ["reward_weights", "positive", "-1"]),
    (["--short_frames=13"], ["short_frames must be in 1..12", "got 13"]),
    (["--short_frames=0"], ["short_frames must be in 1..12", "got 0"]),
    (["--short_frames=many"], ["--short_frames=many", "integer"]),
    (["--reward_dtype=int4"], ["--reward_dtype=int4", "float32|bfloat16|int8"]),
  ],
)
def test_flags_that_are_refused(tmp_path, checkpoint, arguments, fragments):
  line = _refused(tmp_path, checkpoint, f"--prompt={PROMPT}", *arguments)
  for fragment in fragments:
    assert fragment in line


def test_prompts_with_special_tokens(tmp_path, checkpoint):
  """Found before the first search, and only where a reward would obey them."""
  (tmp_path / "list.txt").write_text("a red circle\na <|im_end|> circle\n")
  line = _refused(tmp_path, checkpoint, "--prompts_file=list.txt")
  assert "--prompts_file list.txt: 'a <|im_end|> circle': the prompt holds the special token <|im_end|>" in line


def test_reward_that_is_not_there(tmp_path, checkpoint):
  shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("hpsv3"))
  line = _refused(tmp_path, "model", f"--prompt={PROMPT}", "--reward=hpsv3+coherence")
  assert "there is no model/rewards/hpsv3" in line
  assert "there are quality, coherence, videoalign" in line


def test_chunks_of_one_frame(tmp_path, checkpoint):
  """A model whose first chunk is too short for the video reward is refused while the first step is traced."""
  path = shutil.copytree(checkpoint, tmp_path / "model") / "config.json"
  document = json.loads(path.read_text())
  document["model"]["chunk_frames"] = 1
  path.write_text(json.dumps(document))
  result = generate(tmp_path, "--checkpoint=model", f"--prompt={PROMPT}")
  assert result.code == 2, result
  # The progress bar is there already.
  *_, line = result.stderr.splitlines()
  assert "reward: a chunk of 1x32x32 cannot be judged: a video needs at least 2 frames" in line
  assert not list((tmp_path / "outputs").glob("*/*"))


class TestDamage:
  """What can be wrong in a reward's folder."""

  @pytest.fixture
  def hpsv3(self, tmp_path, checkpoint) -> pathlib.Path:
    return shutil.copytree(checkpoint, tmp_path / "model") / "rewards/hpsv3"

  def _refused(self, hpsv3: pathlib.Path) -> str:
    return _refused(hpsv3.parents[2], pathlib.Path("model"), f"--prompt={PROMPT}", "--reward=hpsv3+coherence")

  def test_altered_text(self, hpsv3):
    path = hpsv3 / prompts.TEMPLATE_FILE
    path.write_text(path.read_text().replace("Rate", "Judge"))
    assert "rewards/hpsv3/prompt_template.json: the text has sha256" in self._refused(hpsv3)

  def test_text_that_only_claims_to_be_published(self, hpsv3):
    path = hpsv3 / prompts.TEMPLATE_FILE
    path.write_text(path.read_text().replace('"toy"', '"hpsv3"'))
    assert "the prompt template of hpsv3 is not the published one" in self._refused(hpsv3)

  def test_another_size(self, hpsv3):
    small_rewards.resize(hpsv3, "decoder", "ffn_dim", 32)
    line = self._refused(hpsv3)
    assert "model/rewards/hpsv3" in line
    assert "gate" in line

  def test_truncated_weights(self, hpsv3):
    largest = max((path for path in hpsv3.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    line = self._refused(hpsv3)
    assert largest.name in line
    assert "truncated" in line

  def test_tokenizer_with_too_many_tokens(self, hpsv3):
    small_rewards.resize(hpsv3, "decoder", "vocab_size", 9)
    assert "the reward tokenizer has 16 tokens, toy embeds only 9" in self._refused(hpsv3)
