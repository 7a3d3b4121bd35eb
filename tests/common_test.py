"""What all commands share: flags of their own, exit codes, warnings, signals, the compilation cache, shipped files."""

import logging as std_logging
import pathlib
import re
import signal
import subprocess
import sys
import threading

import jax
import pytest
from absl import flags, logging

from streamt1_jax import __main__ as streamt1
from streamt1_jax import shipped
from streamt1_jax.cli import command, device_flags, flag_types
from streamt1_jax.config import ConfigError, preset
from streamt1_jax.io import signals
from streamt1_jax.io.checkpoint import load_config


def define_flags(values):
  flag_types.define_integer(values, "count", 3, "How many.", 1, 9)
  flag_types.define_float(values, "share", 0.5, "How much.", 0.0, 1.0)
  flag_types.define_path(values, "output", None, "Where.", required=True)
  flag_types.define_switch(values, "fast", False, "How.")


def call(run, *argv):
  return command.main("What it does.", define_flags, run, argv)


def printed(values):
  print(values.count, values.share, values.output)


class TestMain:
  def test_runs_on_its_arguments(self, capsys):
    assert call(printed, "--output=a", "--count", "4") == 0
    assert capsys.readouterr().out == "4 0.5 a\n"

  def test_keeps_no_flag_for_the_next_call(self, capsys):
    call(printed, "--output=a", "--count=4")
    assert call(printed, "--output=b") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 0.5 b"
    assert "count" not in flags.FLAGS

  def test_a_path_may_begin_in_the_users_home(self, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call(printed, "--output=~/a") == 0
    assert call(printed, "--output=~nobody_of_this_name/a") == 0
    assert capsys.readouterr().out == f"3 0.5 {tmp_path}/a\n3 0.5 ~nobody_of_this_name/a\n"

  @pytest.mark.parametrize("flag", ["--help", "--helpfull"])
  def test_help_needs_no_flag(self, capsys, flag):
    assert call(printed, flag) == 0
    out = capsys.readouterr().out
    for fragment in ("What it does.", "--count: How many.", "(default: '3')", "--flagfile"):
      assert fragment in out
    assert "verbosity" not in out

  @pytest.mark.parametrize(
    ("argv", "fragments"),
    [
      (["--count=10"], ["--count=10", "[1, 9]"]),
      (["--count=many"], ["--count=many", "[1, 9]"]),
      (["--share=nan"], ["--share=nan", "finite"]),
      ([], ["--output"]),
      (["--output=a", "b"], ["'b'", "--name=value"]),
      (["--output=a", "--depth=3"], ["depth"]),
      (["--output=s3://bucket/a"], ["s3://bucket/a", "gs://bucket/name"]),
      (["--output=hf://maker/model"], ["hf://maker/model", "gs://bucket/name"]),
      (["--output="], ["--output=", "empty", "current folder"]),
      (["--output=a\0b"], ["--output=a", "NUL"]),
      (["--output=a", "--fast=perhaps"], ["--fast=perhaps", "true or false"]),
      (["--output=a", "--nofast=1"], ["--nofast=1", "does not take an argument"]),
    ],
  )
  def test_bad_flags_are_one_line(self, capsys, argv, fragments):
    assert call(printed, *argv) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert all(fragment in line for fragment in fragments)
    assert captured.out == ""

  @pytest.mark.parametrize(
    ("error", "code", "message"),
    [
      (ConfigError("two\n lines"), 2, r"two\n lines"),
      (FileNotFoundError(2, "No such file", "a/b"), 2, "a/b: No such file"),
      (OSError(28, "No space left", "a/b"), 3, "a/b: No space left"),
      (command.RunFailed("one of two failed"), 3, "one of two failed"),
      (KeyboardInterrupt(), 130, "interrupted"),
      (command.Terminated("terminated, saved"), 143, "terminated, saved"),
    ],
  )
  def test_failures_are_one_line_and_a_code(self, capsys, error, code, message):
    def run(values):
      raise error

    assert call(run, "--output=a") == code
    assert capsys.readouterr().err == f"error: {message}\n"

  def test_a_fault_of_the_program_is_raised_on(self):
    def run(values):
      raise OSError("no path")

    with pytest.raises(OSError, match="no path"):
      call(run, "--output=a")

  def test_warnings_are_lines(self, capsys):
    assert call(lambda values: logging.warning("one %s", "thing"), "--output=a") == 0
    assert capsys.readouterr().err == "warning: one thing\n"

  def test_warnings_are_lines_where_a_library_uses_the_handler_of_absl(self, monkeypatch):
    root, own, seen = std_logging.getLogger(), logging.get_absl_handler(), []
    before = [*(handler for handler in root.handlers if handler is not own), own]
    monkeypatch.setattr(root, "handlers", before)
    assert call(lambda values: seen.extend(root.handlers), "--output=a") == 0
    assert seen
    assert own not in seen
    assert own in root.handlers

  def test_runs_outside_the_main_thread(self, capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(call(printed, "--output=a")))
    thread.start()
    thread.join()
    assert codes == [0]


class TestSignals:
  def test_sigterm_ends_the_command_and_the_earlier_handler_comes_back(self, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert call(lambda values: signal.raise_signal(signal.SIGTERM), "--output=a") == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert call(printed, "--output=a") == 0

  def test_a_deferred_sigterm_waits_and_a_second_one_does_not(self):
    def run(values):
      with command.termination_deferred():
        signal.raise_signal(signal.SIGTERM)
        command.raise_if_interrupted()
        assert command.is_terminated()
        with pytest.raises(command.Terminated):
          signal.raise_signal(signal.SIGTERM)
      command.raise_if_interrupted()

    assert call(run, "--output=a") == 143

  @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
  def test_an_interrupt_that_python_drops_is_not_lost(self, request):
    # A job in the background ignores Ctrl-C, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Interrupting:
      """Python reports what is raised in `__del__`, and drops it."""

      def __del__(self):
        signal.raise_signal(signal.SIGINT)

    with signals.handled():
      signals.raise_if_interrupted()
      Interrupting()
      with pytest.raises(KeyboardInterrupt):
        signals.raise_if_interrupted()


def test_bounded_flags_can_be_written_to_a_flagfile():
  values = command.parse(define_flags, ["--output=a"])
  assert values["share"].serialize() == "--share=0.5"
  assert values["count"].serialize() == "--count=3"


class TestFlagfiles:
  def parse(self, *argv):
    values = command.parse(define_flags, argv)
    return values.count, values.share, values.output

  def test_one_names_another_beside_it(self, tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/one.flags").write_text("# Why.\n--flagfile=two.flags\n\n--count=5\n")
    (tmp_path / "sets/two.flags").write_text("--count=4\n  --share=0.25\n// More.\n--output=a b\n")
    assert self.parse(f"--flagfile={tmp_path}/sets/one.flags") == (5, 0.25, "a b")
    monkeypatch.chdir(tmp_path)
    assert self.parse("--flagfile", "sets/one.flags", "--share=1") == (5, 1.0, "a b")
    assert self.parse("--count=7", "--flagfile=sets/two.flags") == (4, 0.25, "a b")

  def test_those_of_the_package_are_found_by_name(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="'checkpoint'"):
      self.parse("--flagfile=paper_30s.flags")

  def test_one_that_names_itself(self, tmp_path):
    (tmp_path / "a.flags").write_text("--flagfile=a.flags\n")
    with pytest.raises(ConfigError, match="names itself"):
      self.parse(f"--flagfile={tmp_path}/a.flags")


class TestCompilationCache:
  @pytest.fixture(autouse=True)
  def _settings(self, monkeypatch):
    """No cache is chosen; what the session has chosen comes back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
      jax.config.update(name, value)
    device_flags.compilation_cache.reset_cache()

  def use(self, *argv):
    device_flags.use_compilation_cache(command.parse(device_flags.define, argv))
    return jax.config.jax_compilation_cache_dir

  def test_is_in_the_users_cache_folder(self, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert self.use() == str(tmp_path / "streamt1_jax")
    jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
    assert list((tmp_path / "streamt1_jax").glob("*cache*"))

  def test_is_below_home(self, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert self.use() == str(tmp_path / ".cache/streamt1_jax")

  def test_a_home_that_cannot_be_written_is_one_warning(self, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert self.use() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not kept")

  def test_another_folder_none_and_one_that_was_chosen_before(self, tmp_path):
    assert self.use(f"--compilation_cache_dir={tmp_path / 'own'}") == str(tmp_path / "own")
    assert self.use() == str(tmp_path / "own")
    assert self.use("--compilation_cache_dir=") is None


class TestDevices:
  def test_told_in_a_line(self, capsys):
    device_flags.tell_devices("float32")
    assert capsys.readouterr().err == "device: cpu, float32\n"

  def test_a_full_size_model_on_a_cpu_is_warned_of(self, capsys):
    device_flags.warn_if_slow(preset("tiny"))
    assert capsys.readouterr().err == ""
    device_flags.warn_if_slow(preset("wan_1_3b"))
    assert capsys.readouterr().err.startswith("warning: wan_1_3b is a full-size model, and this is a CPU")

  def test_attention_that_is_interpreted_is_warned_of(self, capsys):
    device_flags.warn_if_slow(preset("tiny"), "fold")
    assert capsys.readouterr().err == ""
    device_flags.warn_if_slow(preset("tiny"), "flash")
    assert capsys.readouterr().err.startswith("warning: --attention=flash is compiled for tpu alone; on this cpu")


class TestSubCommands:
  def test_help_lists_them(self, capsys):
    for argv in ([], ["--help"], ["help"]):
      assert streamt1.main(argv) == 0
      out = capsys.readouterr().out
      assert all(name in out and entry.meaning in out for name, entry in streamt1.COMMANDS.items())

  def test_an_unknown_one_is_a_line(self, capsys):
    assert streamt1.main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'train'" in line
    assert "generate, score, convert" in line

  @pytest.mark.parametrize("name", ["generate", "score", "convert"])
  def test_each_explains_itself(self, capsys, name):
    assert streamt1.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"streamt1 {name} --" in out
    groups = re.findall(r"^(\S+):$", out.split("Flags:")[1], re.MULTILINE)
    # The command's own flags first, then those it shares with others.
    assert groups[0] == f"streamt1_jax.cli.{name}"
    assert groups[-1] == "streamt1_jax.cli.command"

  @pytest.mark.parametrize(("argv", "whole_process"), [(["score", "--help"], False), (None, True)])
  def test_a_command_knows_whether_it_is_the_whole_process(self, capsys, monkeypatch, argv, whole_process):
    frozen = []
    monkeypatch.setattr(command.gc, "freeze", lambda: frozen.append(True))
    monkeypatch.setattr(sys, "argv", ["streamt1", "score", "--help"])
    assert streamt1.main(argv) == 0
    assert "streamt1 score --" in capsys.readouterr().out
    assert frozen == [True] * whole_process

  def test_as_a_module(self, tmp_path):
    done = subprocess.run(
      [sys.executable, "-m", "streamt1_jax", "score", "--videos=none"], cwd=pathlib.Path(__file__).parents[1],
      capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "no video found" in done.stderr


def test_the_small_model_is_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load_config(shipped.checkpoint()) == preset("tiny")
