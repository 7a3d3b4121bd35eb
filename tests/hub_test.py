"""Checkpoints and published files on the hub, as a user names them; the hub is a server on this machine."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from etils import epath

from streamt1_jax import Pipeline
from streamt1_jax.cli import files
from streamt1_jax.config import ConfigError
from streamt1_jax.convert.tables.published_files import LORA_ALPHA, PUBLISHED
from streamt1_jax.io import checkpoint, hub
from tests import command_line, hub_server, published_model, tokenizer_files

REPO = "maker/small-model"
VIDEO = ("--prompt=a red circle", "--num_latent_frames=3", "--search=none")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
  return command_line.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model):
  with hub_server.serve({REPO: model}) as made:
    yield made


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _snapshot(folder: pathlib.Path, repo: str = REPO) -> pathlib.Path:
  return folder / f"hf/hub/models--{repo.replace('/', '--')}/snapshots/{hub_server.COMMIT}"


@pytest.mark.slow
def test_a_video_of_a_model_on_the_hub(tmp_path, server, model):
  """Slow: it compiles a search, in a process of its own."""
  quick = command_line.quick_compilation(tmp_path / "compiled")
  result = server.run(tmp_path, "generate", *VIDEO, f"--checkpoint=hf://{REPO}@v1", jax_settings=quick)
  assert result.code == 0, result
  (manifest,) = (tmp_path / "outputs").rglob("manifest.json")
  assert json.loads(manifest.read_text())["settings"]["checkpoint_sha256"] == files.checkpoint_sha256(epath.Path(model))
  assert _files(_snapshot(tmp_path)) == _files(model)


def load_both(url: str, folder: str, variables: dict[str, str]) -> None:
  """For a process of its own."""
  os.environ.update(variables)
  there, here = (Pipeline.load(directory).params for directory in (url, folder))
  jax.tree.map(np.testing.assert_array_equal, there, here)
  print(len(jax.tree.leaves(there)))


def test_a_pipeline_of_the_hub_is_that_of_the_same_folder(tmp_path, server, model):
  variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
  given = (f"hf://{REPO}", str(model), variables)
  process = command_line.start_function(tmp_path, load_both, *given, jax_settings={})
  process.join()
  result = command_line.result_of(process.exitcode, tmp_path)
  assert result.code == 0, result
  assert int(result.stdout) > 10


def test_what_was_downloaded_is_not_asked_for_again_and_needs_no_network(tmp_path, server, model):
  arguments = ("--videos=none", f"--checkpoint=hf://{REPO}")
  assert "no video found" in server.run(tmp_path, "score", *arguments).stderr
  # Each content once: parts have small files in common.
  assert len(server.downloads()) == len(set(_files(model).values()))
  asked = len(server.downloads())
  assert "no video found" in server.run(tmp_path, "score", *arguments).stderr
  assert len(server.downloads()) == asked
  assert "no video found" in server.run(tmp_path, "score", *arguments, HF_ENDPOINT="http://127.0.0.1:9").stderr
  assert "no video found" in server.run(tmp_path, "score", *arguments, HF_HUB_OFFLINE="1").stderr


def test_a_connection_that_breaks_off_goes_on_where_it_broke(tmp_path, model):
  """Within one call of the library, which keeps whole pieces of 10 MiB."""
  piece, folder = 10 * 2**20, shutil.copytree(model, tmp_path / "more")
  (folder / "large.bin").write_bytes(bytes(2 * piece + 9))
  with hub_server.serve({REPO: folder}) as server:
    server.broken_once.add("large.bin")
    assert "no video found" in server.run(tmp_path, "score", "--videos=none", f"--checkpoint=hf://{REPO}").stderr
    _, again = [line for line in server.asked if line.startswith("GET") and "/large.bin" in line]
  assert again.endswith(f"/large.bin bytes={piece}-")
  assert _files(_snapshot(tmp_path)) == _files(folder)


@pytest.mark.parametrize(
  ("checkpoint", "environment", "fragments"),
  [
    (f"hf://{REPO}-2", {}, [f"hf://{REPO}-2 does not exist", "hf auth login"]),
    (f"hf://{REPO}@v2", {}, [f"hf://{REPO}@v2", "no such branch"]),
    ("hf://maker", {}, ["hf://maker", "hf://org/name@revision"]),
    ("hf://maker/../a", {}, ["hf://org/name@revision"]),
    (f"hf://{REPO}", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be reached", "not downloaded before"]),
    (f"hf://{REPO}", {"HF_HUB_OFFLINE": "1"}, ["cannot be reached", "offline"]),
    (f"hf://{REPO}", {"HF_HOME": "/proc/none"}, ["/proc/none"]),
  ],
)
def test_what_cannot_be_had_is_one_line(tmp_path, server, checkpoint, environment, fragments):
  result = server.run(tmp_path, "generate", *VIDEO, f"--checkpoint={checkpoint}", **environment)
  assert result.code == 2, result
  (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert "Traceback" not in result.stderr
  assert all(fragment in line for fragment in fragments), line
  assert not (tmp_path / "outputs").exists()


def test_a_disk_that_is_too_small_is_told_before_the_download(tmp_path, server):
  server.claimed["tokenizer.model"] = 10**15
  result = server.run(tmp_path, "generate", *VIDEO, f"--checkpoint=hf://{REPO}")
  assert result.code == 2, result
  assert "HF_HOME) needs 1,000,000," in result.stderr
  assert "nothing was downloaded" in result.stderr
  assert server.downloads() == []


def test_a_disk_that_fills_up(tmp_path, server):
  result = server.run(tmp_path, "generate", *VIDEO, f"--checkpoint=hf://{REPO}", file_bytes=20_000)
  assert result.code == 3, result
  (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert str(tmp_path / "hf") in line
  assert "too large" in line
  assert "Traceback" not in result.stderr
  # Nothing that looks finished is left, and the same command then goes through.
  whole = {path.name for path in (tmp_path / "hf").rglob("blobs/*")}
  assert not [name for name in whole if name.endswith(".incomplete")]
  assert "no video found" in server.run(tmp_path, "score", "--videos=none", f"--checkpoint=hf://{REPO}").stderr


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  result = command_line.generate(tmp_path, *VIDEO, f"--checkpoint=hf://{REPO}")
  assert result.code == 2
  (line,) = result.stderr.splitlines()
  assert "pip install 'streamt1_jax[hub]'" in line
  with pytest.raises(ConfigError, match="hub"):
    hub.local(f"hf://{REPO}")


@pytest.mark.parametrize("name", ["../..", "-a/b", "a/b--c", "a/b\nc"])
def test_names_that_no_repository_has(name):
  """Told before anything is asked of the hub."""
  with pytest.raises(ConfigError, match="is no name of a repository"):
    hub.parse(f"hf://{name}")


def test_other_paths_are_left_alone(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert str(hub.local(tmp_path)) == str(tmp_path)
  assert not hub.is_hub("gs://bucket/name")


class TestConvert:
  @pytest.fixture(scope="class")
  @classmethod
  def published(cls, tmp_path_factory):
    """The files of a small model; and its repositories, where they have the published names."""
    folder = tmp_path_factory.mktemp("published")
    small = published_model.write(tmp_path_factory.mktemp("small"))
    (small / "tokenizer.json").write_text(tokenizer_files.tokenizer_json(published_model.TOKENIZER.read_bytes()))
    (small / "small.json").write_text(
      json.dumps(checkpoint.model_config_to_dict(dataclasses.replace(published_model.MODEL, name="wan_1_3b")))
    )
    sources = {
      "backbone": "wan.safetensors", "lora": "lora.pt", "vae": "vae.pth", "text_encoder": "t5.pth",
      "tokenizer": "tokenizer.json",
    }  # fmt: skip
    repos = {}
    for file in reversed(PUBLISHED):
      if file.flag in sources:
        repos[file.repo] = folder / file.repo
        path = folder / file.repo / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(small / sources[file.flag], path)
    return small, repos

  def flags(self, small, *more):
    return ["--from_hub", f"--model={small / 'small.json'}", "--output=out", "--dtype=float32", *more]

  def test_fetches_what_is_missing_and_makes_a_checkpoint(self, tmp_path, published):
    small, repos = published
    with hub_server.serve(repos) as server:
      given = f"--vae={small / 'vae.pth'}"
      result = server.run(tmp_path, "convert", *self.flags(small, given))
      assert result.code == 0, result
      assert "out is a checkpoint" in result.stdout
      names = ["longlive_base.pt", "lora.pt", "models_t5_umt5-xxl-enc-bf16.pth", "tokenizer.json"]
      assert sorted(pathlib.PurePath(path).name for path in server.downloads()) == names
      for name in [*names, "vae.pth"]:
        assert f"{name}: not a file I know" in result.stdout
      source = json.loads((tmp_path / "out/backbone/source.json").read_text())
      assert source["lora"]["alpha"] == LORA_ALPHA
      published_model.assert_equal(published_model.loaded(tmp_path / "out", "codec"), published_model.params("codec"))
      # A part that is there is neither fetched nor asked for.
      (tmp_path / "out/config.json").unlink()
      (tmp_path / "out/tokenizer.json").unlink()
      server.asked.clear()
      shutil.rmtree(tmp_path / "hf")
      assert server.run(tmp_path, "convert", *self.flags(small)).code == 0
      assert [pathlib.PurePath(path).name for path in server.downloads()] == ["tokenizer.json"]

  def test_a_dry_run_downloads_nothing(self, tmp_path, published):
    small, repos = published
    with hub_server.serve(repos) as server:
      result = server.run(tmp_path, "convert", *self.flags(small, "--dry_run", f"--vae={small / 'vae.pth'}"))
      assert result.code == 0, result
      assert server.asked == []
    told = [line for line in result.stdout.splitlines() if line.startswith("would download")]
    assert len(told) == 4
    assert any("models/longlive_base.pt, 5,676,334,208 bytes" in line for line in told)
    assert not list(tmp_path.glob("out"))

  def test_a_file_that_is_not_there(self, tmp_path, published):
    small, repos = published
    folder = shutil.copytree(repos["Efficient-Large-Model/LongLive-1.3B"], tmp_path / "less")
    (folder / "models/lora.pt").unlink()
    with hub_server.serve(repos | {"Efficient-Large-Model/LongLive-1.3B": folder}) as server:
      result = server.run(tmp_path, "convert", *self.flags(small))
      assert result.code == 2
      assert "LongLive-1.3B holds no models/lora.pt" in result.stderr
      assert server.downloads() == []

  def test_another_model_is_refused(self, tmp_path):
    result = command_line.convert(tmp_path, "--from_hub", "--model=tiny", "--output=out")
    assert result.code == 2
    assert "--from_hub fetches files of wan_1_3b; --model is tiny" in result.stderr

  def test_a_reward_is_fetched_with_its_text_alone(self, tmp_path):
    result = command_line.convert(tmp_path, "--from_hub", "--dry_run", "--hpsv3_prompt=hpsv3.whl")
    assert "HPSv3.safetensors, 16,584,387,300 bytes" in result.stdout
    assert "Qwen2-VL-7B-Instruct/tokenizer.json" in result.stdout
    assert "VideoReward" not in result.stdout
