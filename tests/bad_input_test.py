"""Every mistake a user can make gives one line that names it, exit code 2, and leaves nothing behind."""

import errno
import json
import pathlib
import shutil

import pytest
from etils import epath

from streamt1_jax.cli import results, search_flags
from streamt1_jax.cli.command import RunFailed
from streamt1_jax.config import ConfigError, preset
from streamt1_jax.io import checkpoint, manifest, part_files
from tests.command_line import generate, save_model

PROMPT = "--prompt=a red circle"
LONG_NAME = 300 * "x"  # file systems take 255


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> pathlib.Path:
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


def refused(folder: pathlib.Path, *arguments: str) -> str:
  """The one line on stderr of a run that must be refused."""
  before = sorted(folder.iterdir())
  result = generate(folder, *arguments)
  assert result.code == 2, result
  assert result.stdout == ""
  assert len(result.stderr.splitlines()) == 1, result.stderr
  assert result.stderr.startswith("error: ")
  assert sorted(folder.iterdir()) == before
  return result.stderr


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    ([], ["prompt", "prompts_file", "xactly one"]),
    (["--prompt="], ["--prompt", "empty"]),
    (["--prompt= \t"], ["--prompt", "empty"]),
    (["--prompt=&nbsp;"], ["--prompt", "empty"]),
    ([PROMPT, "--prompts_file=list.txt"], ["prompt", "prompts_file", "t most one"]),
    (["--prompts_file=list.txt"], ["list.txt", "does not exist"]),
    ([PROMPT, "a", "red"], ["'a'", "--name=value"]),
    ([PROMPT, "--depth=3"], ["depth"]),
    ([PROMPT, "--flagfile=none.flags"], ["none.flags"]),
    ([PROMPT, "--flagfile=binary.flags"], ["--flagfile", "not UTF-8"]),
    ([PROMPT, "--flagfile=~nobody_of_this_name/a.flags"], ["--flagfile=~nobody_of_this_name/a.flags", "no such file"]),
    ([PROMPT, f"--flagfile={LONG_NAME}"], [LONG_NAME, "no such file"]),
    ([PROMPT, "--flagfile=/proc/self/mem"], ["--flagfile=/proc/self/mem", "cannot be read"]),
    ([PROMPT, "--flagfile"], ["--flagfile", "no file"]),
    ([PROMPT, "--checkpoint="], ["--checkpoint=", "empty"]),
    ([PROMPT, "--output_dir="], ["--output_dir=", "empty"]),
    ([PROMPT, f"--checkpoint={LONG_NAME}"], [LONG_NAME, "does not exist"]),
    ([f"--prompts_file={LONG_NAME}"], [LONG_NAME, "does not exist"]),
    (["--prompts_file=/proc/self/mem"], ["/proc/self/mem", "cannot be read"]),
    ([PROMPT, "--search=beams"], ["--search=beams", "stream_t1|none", "|best_of_n|"]),
    ([PROMPT, "--semantics=other"], ["--semantics=other", "released|paper"]),
    ([PROMPT, "--seed=one"], ["--seed=one", "integer", "2147483647"]),
    ([PROMPT, "--seed=1.5"], ["--seed=1.5", "integer"]),
    ([PROMPT, "--seed=2147483648"], ["--seed=2147483648", "integer", "-2147483648", "2147483647"]),
    ([PROMPT, "--seconds=5", "--num_latent_frames=21"], ["seconds", "num_latent_frames", "most one"]),
    ([PROMPT, "--seconds=nan"], ["--seconds=nan", "finite"]),
    ([PROMPT, "--seconds=inf"], ["--seconds=inf", "finite"]),
    ([PROMPT, "--seconds=long"], ["--seconds=long", "number"]),
    ([PROMPT, "--num_latent_frames=many"], ["--num_latent_frames=many", "integer"]),
    ([PROMPT, "--overwrite=perhaps"], ["--overwrite=perhaps"]),
    ([PROMPT, "--samples=0"], ["--samples=0", "1", "1000"]),
  ],
)
def test_flags_that_are_wrong_without_a_model(tmp_path, arguments, fragments):
  (tmp_path / "binary.flags").write_bytes(b"--seed=1\n\xff\xfe")
  line = refused(tmp_path, *arguments)
  for fragment in fragments:
    assert fragment in line


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    ("--search=none --beam_size=2 --semantics=paper", ["--search=none", "--semantics, --beam_size"]),
    ("--search=beam --noise_sigma=0 --semantics=paper", ["--search=beam", "no --semantics, --noise_sigma", "--top_k"]),
    ("--search=best_of_n --beam_size=2", ["--search=best_of_n", "no --beam_size", "takes --top_k, --reward_codec"]),
    ("--search=best_of_n --top_k=1", ["best_of_n", "top_k", "at least 2", "got 1"]),
    ("--search=beam --policy=alpha:1", ["beam", "no number alpha"]),
    ("--policy=alpha", ["--policy", "'alpha'", "alpha:0.02"]),
    ("--search=per_beam --policy=epsilon:1,epsilon:0", ["--policy", "epsilon is given twice"]),
    ("--search=particles", ["particles", "needs alpha", "--policy=alpha:NUMBER"]),
    ("--search=particles --policy=alpha:0", ["--policy", "alpha must be above 0", "got 0.0"]),
    ("--search=particles --policy=alpha:inf", ["--policy", "'alpha:inf'", "finite"]),
    ("--search=zero_order --policy=rounds:nan", ["--policy", "'rounds:nan'", "finite"]),
    ("--search=particles --policy=alpha:1 --top_k=1", ["particles", "top_k", "at least 2", "got 1"]),
    ("--search=rounds --round_size=5", ["round_size must divide beam_size 16", "got 5"]),
    ("--search=rounds --accept=nan", ["--accept=nan", "finite"]),
    ("--search=rounds --least_gain=0", ["least_gain must be a finite score above 0", "got 0.0"]),
    ("--search=rounds --round_budget=5", ["round_budget must be in 0..4 rounds", "got 5"]),
    ("--search=beam --round_size=1", ["--search=beam", "no --round_size"]),
    ("--search=look_ahead --look_ahead=-1", ["look_ahead must be at least 0", "got -1"]),
    ("--samples=3 --seed=2146000000", ["--samples=3", "2148000000", "2147483647"]),
    ("--beam_size=0", ["beam_size", "1..100", "got 0"]),
    ("--beam_size=-2", ["beam_size", "1..100", "got -2"]),
    ("--beam_size=101", ["beam_size", "1..100", "got 101"]),
    ("--top_k=0", ["top_k", "1..10", "got 0"]),
    ("--top_k=11", ["top_k", "1..10", "got 11"]),
    ("--noise_sigma=1", ["noise_sigma", "(-1, 1)", "got 1.0"]),
    ("--noise_sigma=-1.5", ["noise_sigma", "(-1, 1)", "got -1.5"]),
    ("--noise_sigma=nan", ["noise_sigma", "finite"]),
    ("--fusion_cap=1.1", ["fusion_cap", "[0, 1]", "got 1.1"]),
    ("--short_threshold=nan", ["short_threshold", "finite"]),
    ("--long_threshold=inf", ["long_threshold", "finite"]),
    ("--sliding_window=0", ["sliding_window", "at least 1", "got 0"]),
    ("--sliding_window=1000000", ["sliding_window", "341", "1000000"]),
    ("--settle_within=-1", ["settle_within", "at least 0", "got -1"]),
    ("--settle_within=1000000", ["settle_within", "341", "1000000"]),
    ("--search=greedy --settle_within=2", ["--search=greedy", "no --settle_within"]),
    ("--max_sink_frames=14", ["max_sink_frames", "multiple of the chunk (3)", "got 14"]),
    ("--max_sink_frames=0", ["max_sink_frames", "at least sink_frames (3)", "got 0"]),
    ("--max_sink_frames=300000", ["max_sink_frames", "1024", "300000"]),
    ("--num_latent_frames=20", ["--num_latent_frames=20", "multiple of the chunk (3)"]),
    ("--num_latent_frames=0", ["--num_latent_frames=0", "positive"]),
    ("--num_latent_frames=-3", ["--num_latent_frames=-3", "positive"]),
    ("--num_latent_frames=1026", ["--num_latent_frames=1026", "1..341"]),
    ("--seconds=0", ["--seconds=0", "positive"]),
    ("--seconds=-1", ["--seconds=-1", "positive"]),
    ("--seconds=100000", ["--seconds=100000", "1..341"]),
    ("--seconds=1e308", ["--seconds=1e+308"]),
  ],
)
def test_numbers_that_do_not_fit_the_model(tmp_path, small_checkpoint, arguments, fragments):
  line = refused(tmp_path, PROMPT, f"--checkpoint={small_checkpoint}", *arguments.split())
  for fragment in fragments:
    assert fragment in line


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    ("--search=every_j --judge_every=9", ["judge_every", "1..2", "got 9"]),
    ("--search=look_ahead --look_ahead=2", ["look_ahead", "0..1", "got 2"]),
    ("--search=look_ahead --look_ahead=2 --plan", ["look_ahead", "0..1", "got 2"]),
    ("--search=rounds --mesh=candidate:8", ["--mesh=candidate:8", "4 candidates in a round", "allowed: 1, 2, 4"]),
    ("--search=zero_order --policy=rounds:inf", ["rounds", "finite number", "inf"]),
    ("--search=zero_order --video=file", ["--video=file", "--search=zero_order", "first chunk"]),
    ("--search=backtracking --mesh=data:2", ["--mesh", "--search=backtracking", "data must be 1"]),
  ],
)
def test_what_a_search_cannot_do_is_told_before_weights_are_read(
  tmp_path, monkeypatch, small_checkpoint, arguments, fragments
):
  (tmp_path / "file").write_text("not looked at")
  monkeypatch.setattr(search_flags, "load_pipeline", lambda *_: pytest.fail("weights are read"))
  line = refused(tmp_path, PROMPT, f"--checkpoint={small_checkpoint}", "--num_latent_frames=6", *arguments.split())
  for fragment in fragments:
    assert fragment in line


@pytest.mark.parametrize("flag", ["compilation_cache_dir", "tensorboard_dir", "profile_dir"])
def test_folders_that_cannot_be_made(tmp_path, small_checkpoint, flag):
  (tmp_path / "file").write_text("not a folder")
  arguments = [f"--checkpoint={small_checkpoint}", f"--{flag}=file/folder"]
  arguments += ["--profile_chunks=0"] if flag == "profile_dir" else []
  line = refused(tmp_path, PROMPT, *arguments)
  assert f"--{flag}=file/folder cannot be made" in line


@pytest.mark.parametrize(
  ("content", "fragment"),
  [(b"", "no prompt"), (b"\n  \n", "no prompt"), (b"a red circle\n\xff\xfe\n", "line 2"), (b"a\x00b", "line 1")],
)
def test_prompts_files_that_cannot_be_read(tmp_path, content, fragment):
  (tmp_path / "list.txt").write_bytes(content)
  line = refused(tmp_path, "--prompts_file=list.txt")
  assert "list.txt" in line
  assert fragment in line


def _copy(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(source, folder / "model"))


def test_checkpoint_folders_that_are_none(tmp_path):
  assert "nowhere does not exist" in refused(tmp_path, PROMPT, "--checkpoint=nowhere")
  (tmp_path / "notes.txt").write_text("not a model")
  assert "notes.txt is a file" in refused(tmp_path, PROMPT, "--checkpoint=notes.txt")
  assert "no config.json" in refused(tmp_path, PROMPT, f"--checkpoint={tmp_path}")


def test_truncated_checkpoint(tmp_path, small_checkpoint):
  folder = _copy(small_checkpoint, tmp_path)
  largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  line = refused(tmp_path, PROMPT, "--checkpoint=model")
  assert largest.name in line
  assert "truncated" in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "codec/part.json"])
def test_checkpoint_without_one_file(tmp_path, small_checkpoint, name):
  (_copy(small_checkpoint, tmp_path) / name).unlink()
  assert pathlib.Path(name).name in refused(tmp_path, PROMPT, "--checkpoint=model")


def test_damaged_tokenizer(tmp_path, small_checkpoint):
  tokenizer = _copy(small_checkpoint, tmp_path) / "tokenizer.model"
  tokenizer.write_bytes(tokenizer.read_bytes()[:50])
  assert "tokenizer.model is not a sentencepiece model" in refused(tmp_path, PROMPT, "--checkpoint=model")


def test_checkpoint_of_a_model_that_makes_no_videos(tmp_path, small_checkpoint):
  checkpoint.save_config(_copy(small_checkpoint, tmp_path), preset("bench_mid"))
  line = refused(tmp_path, PROMPT, "--checkpoint=model")
  assert "bench_mid" in line
  assert "no codec" in line


def test_config_of_another_size_than_the_weights(tmp_path, small_checkpoint):
  checkpoint.save_config(_copy(small_checkpoint, tmp_path), preset("tiny"))
  assert "model/text does not fit the model" in refused(tmp_path, PROMPT, "--checkpoint=model")


def test_config_with_an_unknown_field(tmp_path, small_checkpoint):
  path = _copy(small_checkpoint, tmp_path) / "config.json"
  document = json.loads(path.read_text())
  document["model"]["depth"] = 3
  path.write_text(json.dumps(document))
  assert "unknown 'depth'" in refused(tmp_path, PROMPT, "--checkpoint=model")


def test_not_a_number_in_the_weights(tmp_path, monkeypatch):
  # The program that saves refuses such weights, so its check has to be put aside to make some.
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "check_finite", lambda *arguments: None)
    save_model(tmp_path / "model", backbone_scale=float("nan"))
  line = refused(tmp_path, PROMPT, "--checkpoint=model")
  assert "NaN or Inf in" in line
  assert "backbone" in line


def test_output_folder_that_cannot_be_written(tmp_path, small_checkpoint):
  (tmp_path / "outputs").write_text("a file in its place")
  for place in ("outputs", "outputs/below"):
    line = refused(tmp_path, PROMPT, f"--checkpoint={small_checkpoint}", f"--output_dir={place}")
    assert f"cannot write {place}/" in line
  assert (tmp_path / "outputs").read_text() == "a file in its place"
  line = refused(tmp_path, PROMPT, f"--checkpoint={small_checkpoint}", f"--output_dir={LONG_NAME}")
  assert LONG_NAME in line
  assert "too long" in line


@pytest.mark.parametrize(
  ("name", "number", "raised"),
  [
    ("outputs/.result.partial/video.mp4", errno.EACCES, ConfigError),
    ("outputs/.result.partial/video.mp4", errno.ENOSPC, RunFailed),
    (None, errno.ENOSPC, RunFailed),
    ("metrics/events", errno.EACCES, PermissionError),
    ("outputs/.result.partial2/video.mp4", errno.EACCES, PermissionError),
    (None, errno.ECONNRESET, ConnectionResetError),
  ],
)
def test_only_errors_of_its_own_files_name_the_result(tmp_path, monkeypatch, name, number, raised):
  monkeypatch.chdir(tmp_path)
  folder = epath.Path("outputs/result")
  with pytest.raises(raised) as caught, results.staged_folder(folder, keep_on=lambda error: False):
    raise OSError(number, "refused", name)
  if raised in (ConfigError, RunFailed):
    assert str(caught.value) == "cannot write outputs/result: refused"
  assert list(epath.Path("outputs").iterdir()) == []


def test_foreign_folder_in_the_place_of_a_result_is_kept(tmp_path, small_checkpoint):
  folder = pathlib.Path(tmp_path / results.result_folder("outputs", "a red circle"))
  folder.mkdir(parents=True)
  (folder / "thesis.txt").write_text("ten years")
  line = refused(tmp_path, PROMPT, f"--checkpoint={small_checkpoint}", "--overwrite")
  assert "is not an earlier result" in line
  assert (folder / "thesis.txt").read_text() == "ten years"


@pytest.mark.parametrize(
  "stored", ['""', "0", "[]", "null", '"prompt"', '{"prompt": {"a": 1}}', '{"prompt": "\\u001b[2J"}']
)
def test_manifests_of_other_types(tmp_path, small_checkpoint, stored):
  folder = pathlib.Path(tmp_path / results.result_folder("outputs", "a red circle"))
  folder.mkdir(parents=True)
  (folder / "manifest.json").write_text(f'{{"settings": {stored}}}')
  line = refused(tmp_path, PROMPT, f"--checkpoint={small_checkpoint}")
  assert "was made with " in line
  assert "--overwrite" in line
  assert line.strip().isprintable()


def test_a_result_that_was_altered_is_told(tmp_path, caplog):
  """It is still the result that was asked for, so nothing is made anew unasked."""
  folder = epath.Path(tmp_path / "result")
  folder.mkdir()
  for name in (results.VIDEO, results.TRACE):
    (folder / name).write_text(f"this is {name}")
  document = {"settings": {"seed": 1}, "files": part_files.describe_files(folder)}
  manifest.write_json(folder / results.MANIFEST, document)
  assert results.is_finished(folder, {"seed": 1}, overwrite=False)
  assert not caplog.messages
  (folder / results.TRACE).write_text("this is trace.jsom")
  (folder / results.VIDEO).unlink()
  assert results.is_finished(folder, {"seed": 1}, overwrite=False)
  assert caplog.messages == [f"{folder}/trace.json is not what was written; --overwrite makes it again"]
  for other in (0, "", [], {"trace.json": 3}):
    manifest.write_json(folder / results.MANIFEST, document | {"files": other})
    assert results.is_finished(folder, {"seed": 1}, overwrite=False)


@pytest.mark.parametrize(
  ("content", "fragment"),
  [
    ("a red circle".encode("utf-16"), "line 1: not UTF-8"),
    ("a red circle".encode("utf-16-le"), "line 1: control character"),
    ("a red circle".encode("utf-32"), "line 1: not UTF-8"),
    ("un café".encode("latin-1"), "line 1: not UTF-8 text (byte 7)"),
    (b"a\x1b[2Jred circle", "line 1: control character"),
    (b"\xef\xbb\xbf\r\n\r\n", "no prompt"),
    (b"\xed\xa0\x80", "line 1: not UTF-8"),
    (b"a\n\xc2\x9b2Jb", "line 2"),
  ],
)
def test_prompts_files_of_odd_encodings(tmp_path, content, fragment):
  (tmp_path / "list.txt").write_bytes(content)
  line = refused(tmp_path, "--prompts_file=list.txt")
  assert fragment in line
  assert line.strip().isprintable()
