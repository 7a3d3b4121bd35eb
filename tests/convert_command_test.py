"""`streamt1 convert` as a user runs it: exit code, both streams; kills, a full disk, a dry run.

What it makes of every flavour of files: convert_files_test.py.
"""

import json
import pathlib
import time
from hashlib import sha256

import jax
import pytest

from streamt1_jax.convert import known_files
from streamt1_jax.convert.tables.published_files import PublishedFile
from tests.command_line import Result, convert, generate, result_of, start
from tests.published_files import write_safetensors
from tests.published_model import ALPHA, PARTS, assert_equal, everything, files, loaded, params, tensors, write

COMPLETE = ["backbone", "codec", "config.json", "text", "tokenizer.model"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
  return write(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, published) -> pathlib.Path:
  """A folder in which a complete conversion was run."""
  folder = tmp_path_factory.mktemp("whole")
  result = convert(folder, *_flags(published))
  assert result.code == 0, result
  assert "out is a checkpoint" in result.stdout
  assert "converting backbone" in result.stderr
  return folder


def _flags(published: pathlib.Path, **changes) -> list[str]:
  """The flags of a complete conversion, some of them changed or (None) left out."""
  given = {
    "model": published / "small.json",
    "backbone": published / "wan.safetensors",
    **everything(published),
    "output": "out",
    "dtype": "float32",
  }
  return [f"--{name}={value}" for name, value in (given | changes).items() if value is not None]


def _names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def _refused(folder: pathlib.Path, *arguments: str) -> str:
  """The last line on stderr (a progress bar may come first) of a run that must be refused and leave no trace."""
  before = files(folder)
  return _refusal(convert(folder, *arguments), folder, before)


def _refusal(result: Result, folder: pathlib.Path, before: dict[str, bytes]) -> str:
  assert result.code == 2, result
  assert files(folder) == before
  line = result.stderr.splitlines()[-1]
  assert line.startswith("error: "), result.stderr
  return line


def test_a_whole_checkpoint(whole):
  assert _names(whole / "out") == COMPLETE
  for part in PARTS:
    assert_equal(loaded(whole / "out", part), params(part))


def test_it_makes_a_video(whole, tmp_path):
  arguments = ["--prompt=a red circle", f"--checkpoint={whole / 'out'}", "--num_latent_frames=3", "--search=none"]
  result = generate(tmp_path, *arguments)
  assert result.code == 0, result
  assert list((tmp_path / "outputs").rglob("video.mp4"))


def test_a_published_file_is_told(tmp_path, published, monkeypatch):
  """Through the command, here with a small file in the place of the published one."""
  content = (published / "spiece.model").read_bytes()
  known = PublishedFile("tokenizer", "small pieces", "maker/small", "a", len(content), sha256(content).hexdigest())
  monkeypatch.setattr(known_files, "PUBLISHED", (known,))
  given = [f"--model={published / 'small.json'}", f"--tokenizer={published / 'spiece.model'}", "--output=out"]
  result = convert(tmp_path, *given)
  assert "spiece.model: this is the published small pieces (maker/small)\n" in result.stdout


def test_a_tokenizer_that_is_none(tmp_path, published):
  (tmp_path / "pieces.bin").write_bytes(b"nothing of the kind")
  given = [f"--model={published / 'small.json'}", "--tokenizer=pieces.bin", "--output=out"]
  line = _refused(tmp_path, *given)
  assert "--tokenizer" in line
  assert "pieces.bin" in line


def test_an_incomplete_checkpoint_says_what_is_missing(tmp_path, published):
  result = convert(tmp_path, *_flags(published, vae=None, tokenizer=None))
  assert result.code == 0, result
  assert "missing: codec, from --vae (Wan2.1_VAE.pth" in result.stdout
  assert "missing: tokenizer.model, from --tokenizer (spiece.model" in result.stdout
  assert "out is not complete yet" in result.stdout
  assert _names(tmp_path / "out") == ["backbone", "text"]
  used = generate(tmp_path, "--prompt=a red circle", "--checkpoint=out")
  assert (used.code, "no config.json" in used.stderr) == (2, True)


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    (["--output=out"], ["nothing to convert", "--backbone"]),
    (["--output=out", "wan.pt"], ["'wan.pt'", "--name=value"]),
    (["--backbone=nowhere.pt"], ["--output is missing"]),
    (["--backbone=nowhere.pt", "--output=out"], ["nowhere.pt does not exist"]),
    (["--model=wan_14b", "--backbone=a", "--output=out"], ["--model", "wan_14b", "wan_1_3b", ".json"]),
    (["--model=none.json", "--backbone=a", "--output=out"], ["--model none.json does not exist"]),
    (["--model=binary.json", "--backbone=a", "--output=out"], ["--model binary.json cannot be read: 'utf-8' codec"]),
    (["--backbone=~nobody_of_this_name/a", "--output=out"], ["~nobody_of_this_name/a does not exist"]),
    (["--backbone=", "--output=out"], ["--backbone=", "empty"]),
    (["--dtype=int8", "--backbone=a", "--output=out"], ["dtype", "bfloat16"]),
    (["--lora_alpha=nan", "--backbone=a", "--output=out"], ["lora_alpha", "finite"]),
  ],
)
def test_flags(tmp_path, arguments, fragments):
  (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
  line = _refused(tmp_path, *arguments)
  for fragment in fragments:
    assert fragment in line


def test_a_disk_that_fills_up(tmp_path, published):
  process = start(tmp_path, *_flags(published), program="convert", file_bytes=3000)
  process.join()
  assert "cannot write out/backbone" in _refusal(result_of(process.exitcode, tmp_path), tmp_path, {})
  assert not (tmp_path / "out").exists() or _names(tmp_path / "out") == []


def test_a_checkpoint_of_an_older_format(whole, tmp_path, published):
  path = tmp_path / "out" / "config.json"
  path.parent.mkdir()
  path.write_text(json.dumps(json.loads((whole / "out" / "config.json").read_text()) | {"format_version": 0}))
  used = generate(tmp_path, "--prompt=a red circle", "--checkpoint=out")
  for line in (_refused(tmp_path, *_flags(published)), used.stderr):
    assert "config.json: format_version is 0; this program reads 1" in line


def _run_until_it_writes(folder: pathlib.Path, published: pathlib.Path, part: str):
  """A conversion, as soon as `part` is being written, or at its end if that was too fast to see."""
  process = start(folder, *_flags(published), program="convert")
  while process.is_alive() and not (folder / "out" / f".{part}.partial").exists():
    time.sleep(0.001)
  return process


@pytest.mark.slow
def test_killed_while_any_part_is_written(tmp_path, published):
  for part in PARTS:
    process = _run_until_it_writes(tmp_path, published, part)
    process.kill()
    process.join()
    for name in PARTS:
      if (tmp_path / "out" / name).exists():
        assert_equal(loaded(tmp_path / "out", name), params(name))
  assert convert(tmp_path, *_flags(published)).code == 0
  assert _names(tmp_path / "out") == COMPLETE
  for part in PARTS:
    assert_equal(loaded(tmp_path / "out", part), params(part))


def test_interrupted_while_writing(tmp_path, published):
  process = _run_until_it_writes(tmp_path, published, "backbone")
  process.terminate()
  process.join()
  result = result_of(process.exitcode, tmp_path)
  assert result.code == 143, result
  assert result.stderr.splitlines()[-1] == "error: terminated"
  assert set(_names(tmp_path / "out")) <= {"backbone"}


class TestDryRun:
  def test_says_everything_and_writes_nothing(self, tmp_path, published):
    lora = {"lora": published / "lora.pt", "lora_alpha": ALPHA}
    result = convert(tmp_path, *_flags(published, vae=None, **lora), "--dry_run")
    assert (result.code, result.stderr) == (0, "")
    assert files(tmp_path) == {}
    count = sum(leaf.size for leaf in jax.tree.leaves(params("backbone")))
    for fragment in (
      f"backbone/ from --backbone, Wan names: {len(tensors('backbone'))} tensors, {count:,} parameters",
      f"{4 * count:,} bytes to write",
      "blocks.{layer}.self_attn.q.weight -> blocks.self_attention.query.kernel [2, 24, 24] float32",
      "rank 3, alpha 4.5",
      "skips critic_lora",
      "text/ from --text_encoder",
      "missing: codec, from --vae",
    ):
      assert fragment in result.stdout
    assert result.stdout.count("missing") == 1

  def test_lists_every_problem(self, tmp_path, published):
    weights = {name: x for name, x in tensors("backbone").items() if not name.startswith("blocks.1.ffn")}
    write_safetensors(tmp_path / "wan.safetensors", weights)
    result = convert(tmp_path, *_flags(published, backbone="wan.safetensors"), "--dry_run")
    assert result.code == 2
    assert "4 missing" in result.stderr
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
      assert f"missing: blocks.1.ffn.{name}" in result.stdout

  def test_everything_is_missing(self, tmp_path):
    result = convert(tmp_path, "--dry_run")
    missing = [line.split(",")[0] for line in result.stdout.splitlines() if line.startswith("missing")]
    assert missing == [f"missing: {name}" for name in (*PARTS, "tokenizer.model")]
