"""gs:// in the place of folders: Orbax, TensorStore, epath and the programs, on a bucket in memory."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from streamt1_jax.cli import results
from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, checkpoint, manifest, paths
from tests import memory_store
from tests.command_line import generate, result_of, save_model, score, start

PROMPT = "a red circle moves left over a dark blue background"


@pytest.fixture
def bucket():
  memory_store.install()
  memory_store.MemoryBucket.store.clear()
  return epath.Path("gs://bucket")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A video whose checkpoint and prompts were read from the bucket and which was written to it, and its files."""
  stored, folder = tmp_path_factory.mktemp("stored") / "bucket", tmp_path_factory.mktemp("run")
  save_model(stored / "models/tiny")
  (stored / "list.txt").write_text(PROMPT + "\n")
  arguments = ["--checkpoint=gs://bucket/models/tiny", "--prompts_file=gs://bucket/list.txt"]
  arguments += ["--num_latent_frames=6", "--save_every=1"]

  def run():
    with memory_store.moved_to_bucket(stored):
      return generate(folder, *arguments, "--output_dir=gs://bucket/videos")

  result = run()
  assert result.code == 0, result
  return result, folder, stored, run


def test_generate_in_a_bucket(made, tmp_path):
  """The search, bit for bit, is that of local folders."""
  result, folder, stored, _ = made
  name = results.result_folder("", PROMPT).name
  assert result.stdout == f"gs://bucket/videos/{name}/video.mp4\n"
  assert list(folder.iterdir()) == []
  assert {path.name for path in (stored / "videos").iterdir()} == {name}
  assert {path.name for path in (stored / "videos" / name).iterdir()} == {
    "video.mp4", "contact_sheet.png", "trace.json", "manifest.json", "latents.safetensors", "report.html",
    "pictures.zip",
  }  # fmt: skip
  local = generate(tmp_path, f"--checkpoint={stored / 'models/tiny'}", f"--prompt={PROMPT}", "--num_latent_frames=6")
  assert local.code == 0, local
  for file in ("video.mp4", "contact_sheet.png", "trace.json", "pictures.zip"):
    assert (tmp_path / "outputs" / name / file).read_bytes() == (stored / "videos" / name / file).read_bytes()


def test_finished_videos_of_a_bucket_are_skipped_and_kept(made):
  _, _, stored, run = made
  before = {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()}
  result = run()
  assert result.code == 0, result
  assert "is finished, skipped" in result.stdout
  assert {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()} == before


def test_score_in_a_bucket(made):
  _, folder, stored, _ = made
  arguments = ["--videos=gs://bucket/videos/*/*.mp4", "--output=gs://bucket/scores.csv", "--reward=quality"]
  with memory_store.moved_to_bucket(stored):
    result = score(folder, *arguments)
  assert result.code == 0, result
  (row,) = json.loads((stored / "scores.json").read_text())["rows"]
  assert row["video"] == f"gs://bucket/videos/{results.result_folder('', PROMPT).name}/video.mp4"
  assert row["prompt"] == PROMPT
  assert row["bytes"] > 0
  assert np.isfinite(row["scores"]["quality"])
  assert {path.name for path in stored.iterdir()} == {"models", "list.txt", "videos", "scores.csv", "scores.json"}


def test_weights_in_a_bucket(bucket):
  """Orbax and TensorStore write and read them; the second time they replace the first, and damage is noticed."""
  params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.float32(2)}
  for factor in (1, 2):
    scaled = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
    checkpoint.save_params(bucket / "model/part", scaled)
    loaded = checkpoint.load_params(bucket / "model/part", params)
    jax.tree.map(np.testing.assert_array_equal, loaded, scaled)
  assert {path.name for path in (bucket / "model").iterdir()} == {"part"}
  lost = next(name for name in memory_store.objects() if "/d/" in name)
  del memory_store.MemoryBucket.store[lost]
  with pytest.raises(ConfigError, match="is incomplete"):
    checkpoint.load_params(bucket / "model/part", params)


def _fill(folder, text):
  for name in ("video.mp4", "contact_sheet.png", "trace.json"):
    (folder / name).write_text(text)
  manifest.write_json(folder / results.MANIFEST, {"settings": {"text": text}})


@pytest.mark.parametrize("written", range(4))
def test_a_result_that_was_replaced_in_part_is_no_result(bucket, monkeypatch, written):
  """A run is killed after as many of the four copies."""
  target, copied = bucket / "videos/one", []
  real_copy = type(target).copy
  with results.staged_folder(target, keep_on=lambda _: False) as staging:
    _fill(staging, "old")
  assert results.is_finished(target, {"text": "old"}, overwrite=False)

  def copy(path, destination):
    if len(copied) == written:
      raise KeyboardInterrupt
    copied.append(path)
    return real_copy(path, destination)

  monkeypatch.setattr(type(target), "copy", copy)
  with pytest.raises(KeyboardInterrupt), results.staged_folder(target, keep_on=lambda _: False) as staging:
    _fill(staging, "new")
  monkeypatch.undo()
  assert not results.is_finished(target, {"text": "new"}, overwrite=False)
  with results.staged_folder(target, keep_on=lambda _: False) as staging:
    _fill(staging, "new")
  assert results.is_finished(target, {"text": "new"}, overwrite=False)
  assert {path.name for path in (bucket / "videos").iterdir()} == {"one"}


def test_what_is_no_result_is_not_replaced(bucket):
  (bucket / "videos/one/thesis.txt").write_text("years of work")
  with pytest.raises(ConfigError, match="is not an earlier result"):
    results.is_finished(bucket / "videos/one", {}, overwrite=True)


def test_files_appear_whole_and_grow(bucket):
  atomic.replace_bytes(bucket / "a/file", b"old")
  atomic.replace_bytes(bucket / "a/file", b"new")
  for line in ("one\n", "two\n"):
    atomic.append_text(bucket / "a/lines", line)
  assert memory_store.objects() == {"bucket/a/file": b"new", "bucket/a/lines": b"one\ntwo\n"}


def test_absolute_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(paths.absolute("gs://bucket/a")) == "gs://bucket/a"
  assert str(paths.absolute("a")) == str(tmp_path / "a")


@pytest.mark.parametrize(
  ("program", "flag", "fragment"),
  [
    ("generate", "--checkpoint=s3://bucket/tiny", "gs://bucket/name"),
    ("generate", "--output_dir=gs://bucket", "pip install gcsfs"),
    ("convert", "--output=gs://bucket/model", "a path of this machine"),
  ],
)
def test_paths_that_no_program_can_use(tmp_path, program, flag, fragment):
  """Nothing answers for gs:// in this process."""
  process = start(tmp_path, flag, "--prompt=a" if program == "generate" else "--dry_run", program=program)
  process.join()
  result = result_of(process.exitcode, tmp_path)
  assert result.code == 2, result
  assert fragment in result.stderr
  assert flag in result.stderr
  assert {path.name for path in tmp_path.iterdir()} == {".stdout", ".stderr"}
