"""A small random model on disk, and the commands: called in this process, or run in one of their own.

A call is what most tests need: exit code, both streams and files are the same, and no time goes to imports. A process
of its own is for kills, signals, a full disk and several hosts.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import io
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from streamt1_jax.config import ModelConfig, preset
from streamt1_jax.measuring import random_model
from tests import memory_store

HOST_DEVICES = "--xla_force_host_platform_device_count=8"
_STDOUT, _STDERR = ".stdout", ".stderr"
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


class Result(NamedTuple):
  code: int
  stdout: str
  stderr: str


def small_model() -> ModelConfig:
  """The tiny preset, narrower and shallower: it compiles in seconds."""
  tiny = preset("tiny")
  text_dim = 16
  return dataclasses.replace(
    tiny,
    backbone=dataclasses.replace(
      tiny.backbone, dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=text_dim
    ),
    codec=dataclasses.replace(tiny.codec, base_dim=8),
    text=dataclasses.replace(tiny.text, dim=text_dim, attn_dim=16, ffn_dim=32, num_heads=2, num_layers=1),
    latent_height=4,
    latent_width=4,
  )


_USUAL_SCALE = 0.1


def save_model(folder: pathlib.Path, backbone_scale: float = _USUAL_SCALE) -> pathlib.Path:
  """A checkpoint of random weights; a huge, finite `backbone_scale` makes every latent NaN or Inf."""
  if backbone_scale == _USUAL_SCALE:
    shutil.copytree(_usual_model(), folder, dirs_exist_ok=True)
  else:
    _write_model(folder, backbone_scale)
  return folder


@functools.cache
def _usual_model() -> pathlib.Path:
  """The one that nearly all tests copy: a copy takes a hundredth of the time of writing it."""
  temporary = tempfile.TemporaryDirectory(prefix="streamt1_jax_model_")
  atexit.register(temporary.cleanup)
  folder = pathlib.Path(temporary.name) / "model"
  _write_model(folder, _USUAL_SCALE)
  return folder


def _write_model(folder: pathlib.Path, backbone_scale: float) -> None:
  tokenizer = REPOSITORY / "checkpoints/tiny/tokenizer.model"
  random_model.save(folder, small_model(), tokenizer, backbone_scale=backbone_scale)


def quick_compilation(cache: pathlib.Path) -> dict[str, Any]:
  """JAX's settings for processes that share what they compile, in `cache`, and spend little time on it."""
  return {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(cache),
    "jax_persistent_cache_min_compile_time_secs": 0,
  }


def call(program: str, folder: pathlib.Path, *arguments: str, package: str = "experiments") -> Result:
  """Calls `experiments.PROGRAM` in this process, with `folder` as the current one."""
  main = importlib.import_module(f"{package}.{program}").main
  stdout, stderr = io.StringIO(), io.StringIO()
  with contextlib.chdir(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    code = main(arguments)
  return Result(code, stdout.getvalue(), stderr.getvalue())


def generate(
  folder: pathlib.Path, *arguments: str, one_device: bool = True, jax_settings: Mapping[str, Any] | None = None
) -> Result:
  """Calls `experiments.generate` in `folder`, on one device unless told otherwise.

  With `jax_settings` it runs in a process of its own.
  """
  if jax_settings is not None:
    process = start(folder, *arguments, jax_settings=jax_settings)
    process.join()
    return result_of(process.exitcode, folder)
  # This process has several devices, and a search takes all of them by default.
  return call("generate", folder, *(["--mesh=data:1"] if one_device else []), *arguments)


def score(folder: pathlib.Path, *arguments: str) -> Result:
  """Calls `experiments.score` in `folder`."""
  return call("score", folder, *arguments)


def convert(folder: pathlib.Path, *arguments: str) -> Result:
  """Calls `experiments.convert` in `folder`."""
  return call("convert", folder, *arguments)


def report(folder: pathlib.Path, *arguments: str) -> Result:
  """Calls `streamt1 report` in `folder`."""
  return call("report", folder, *arguments, package="streamt1_jax.cli")


_PROCESSES = multiprocessing.get_context("forkserver")
# Forked from a process that has done the imports, a start takes seconds less.
_PROCESSES.set_forkserver_preload(["streamt1_jax.cli.generate", "streamt1_jax.cli.score", "streamt1_jax.cli.convert"])


def start(
  folder: pathlib.Path,
  *arguments: str,
  jax_settings: Mapping[str, Any] | None = None,
  program: str = "generate",
  file_bytes: int | None = None,
  bucket: pathlib.Path | None = None,
):
  """Starts `experiments.PROGRAM` in a process of its own, with `folder` as the current one.

  Args:
    folder: gets both streams too, for `result_of`.
    *arguments: of the program.
    jax_settings: for this process, which has one device unless they say otherwise.
    program: its module below `experiments`.
    file_bytes: no file may grow beyond this, as on a full disk.
    bucket: a folder whose files the program finds at gs://bucket alone.

  Returns:
    The process.
  """
  process = _PROCESSES.Process(
    target=_run_program, args=(str(folder), program, arguments, dict(jax_settings or {}), file_bytes, bucket)
  )
  process.start()
  return process


def start_function(folder: pathlib.Path, function: Callable, *arguments: Any, jax_settings: Mapping[str, Any]):
  """Starts a function that can be imported, as `start` starts a program."""
  process = _PROCESSES.Process(target=_run_function, args=(str(folder), dict(jax_settings), function, *arguments))
  process.start()
  return process


def run_generate(arguments: Sequence[str]) -> None:
  """Runs the program in this process; for `start_function`."""
  run_main("generate", arguments)


def generate_terminated(arguments: Sequence[str]) -> None:
  """Runs the program in this process; SIGTERM comes while a chunk is searched."""
  from streamt1_jax.cli import stopped_searches

  save_if_due = stopped_searches.save_if_due

  def after_sigterm(*chunk, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    save_if_due(*chunk, **options)

  stopped_searches.save_if_due = after_sigterm
  run_generate(arguments)


def result_of(code: int, folder: pathlib.Path) -> Result:
  return Result(code, (folder / _STDOUT).read_text(), (folder / _STDERR).read_text())


def _run_program(
  folder: str,
  program: str,
  arguments: tuple[str, ...],
  jax_settings: dict[str, Any],
  file_bytes: int | None,
  bucket: pathlib.Path | None,
) -> None:
  _prepare(folder, jax_settings)
  if file_bytes is not None:
    limit_file_size(file_bytes)
  with contextlib.nullcontext() if bucket is None else memory_store.moved_to_bucket(bucket):
    run_main(program, arguments)


def limit_file_size(file_bytes: int) -> None:
  """From now on no file of this process may grow beyond this."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def run_main(program: str, arguments: Sequence[str]) -> None:
  """Runs `experiments.PROGRAM` in this process and ends it with its exit code."""
  raise SystemExit(importlib.import_module(f"experiments.{program}").main(arguments))


def _run_function(folder: str, jax_settings: dict[str, Any], function: Callable, *arguments: Any) -> None:
  _prepare(folder, jax_settings)
  function(*arguments)


def _prepare(folder: str, jax_settings: dict[str, Any]) -> None:
  os.chdir(folder)
  # The tests may be a shell's background job, which ignores Ctrl-C and hands that on.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  # One device, as on most machines, unless the settings ask for several.
  for name, value in ({"jax_num_cpu_devices": 1} | jax_settings).items():
    jax.config.update(name, value)
  os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(HOST_DEVICES, "")
  for stream, name in ((1, _STDOUT), (2, _STDERR)):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
