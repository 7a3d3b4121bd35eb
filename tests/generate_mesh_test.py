"""The command line on several devices: the same videos as on one, and nothing lost when a search fails."""

import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from streamt1_jax.cli import results
from streamt1_jax.config import SearchConfig
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.pipeline import Pipeline
from tests.command_line import generate, save_model

PROMPTS = ["a red circle moves left over a dark blue background", "a blue square stays", "a green star moves up"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory, checkpoint):
  """Calls the command with some flags; returns its result and its folder."""

  def run(*arguments, one_device=False):
    folder = tmp_path_factory.mktemp("run")
    (folder / "list.txt").write_text("\n".join(PROMPTS))
    flags = [f"--checkpoint={checkpoint}", "--prompts_file=list.txt", *arguments]
    return generate(folder, *flags, one_device=one_device), folder

  return run


def _read(folder, prompt, name):
  return json.loads((folder / results.result_folder("outputs", prompt) / name).read_text())


@pytest.fixture(scope="module")
def on_one_device(run):
  """The folder of a run, by its latent frames."""

  @functools.cache
  def made(latent_frames):
    result, folder = run(f"--num_latent_frames={latent_frames}", one_device=True)
    assert result.code == 0, result
    return folder

  return made


# That meshes change no winner is tested without the command, in `mesh_test`.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("latent_frames", "arguments", "mesh"),
  [
    (6, ["--mesh=data:2,candidate:2,seq:2"], {"data": 2, "beam": 2, "sibling": 1, "model": 1, "seq": 2}),
    (6, ["--decoding=twice"], {"data": 1, "beam": 2, "sibling": 2, "model": 2, "seq": 1}),
  ],
)
def test_same_videos(run, on_one_device, latent_frames, arguments, mesh):
  """Three prompts do not divide by two: the last batch is filled up, and what fills it is dropped."""
  result, folder = run(f"--num_latent_frames={latent_frames}", *arguments)
  assert result.code == 0, result
  whole = on_one_device(latent_frames)
  for prompt in PROMPTS:
    manifest, expected = (_read(where, prompt, "manifest.json") for where in (folder, whole))
    assert manifest["mesh"] == mesh
    assert expected["mesh"] is None
    assert manifest["settings"] == expected["settings"]
    assert manifest["seeds"] == expected["seeds"]
    assert manifest["score"] == pytest.approx(expected["score"], abs=1e-3)
    trace, expected = (_read(where, prompt, "trace.json") for where in (folder, whole))
    assert [chunk["survivors"] for chunk in trace["chunks"]] == [chunk["survivors"] for chunk in expected["chunks"]]
  assert len(list((folder / "outputs").iterdir())) == len(PROMPTS)


def test_bad_meshes(run):
  for flag, fragment in (
    ("--mesh=data:3", "does not divide the 8"),
    ("--mesh=model:8", "2 heads"),
    ("--mesh=candidate:8", "2 beams of 2 candidates"),
    ("--mesh=data:2,data:2", "at most once"),
  ):
    result, folder = run(flag)
    assert result.code == 2, result
    assert result.stderr.startswith(f"error: {flag}: ")
    assert fragment in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "outputs").exists()


def test_weights_go_to_their_shards(checkpoint):
  sizes = {"data": 1, "candidate": 2, "model": 2}
  whole = Pipeline.load(checkpoint)
  mesh = device_mesh.make_mesh(sizes, whole.config, SearchConfig.released())
  pipeline = Pipeline.load(checkpoint, mesh=mesh)
  blocks = pipeline.params["backbone"]["blocks"]
  assert blocks["self_attention"]["query"]["kernel"].sharding.spec == P(None, None, "model")
  assert blocks["ffn_out"]["kernel"].sharding.spec == P(None, "model", None)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(pipeline.params), jax.device_get(whole.params))
  condition = pipeline.condition(PROMPTS[0], 2)
  assert condition.text.k.sharding.spec == P(None, "model", None, None)
  np.testing.assert_allclose(condition.text.k, whole.condition(PROMPTS[0], 2).text.k, rtol=0, atol=1e-5)
