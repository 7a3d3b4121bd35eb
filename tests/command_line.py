"""A small random model on disk, and the command line run as a user runs it: own process, exit code, both streams."""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
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


def save_model(folder: pathlib.Path, backbone_scale: float = 0.1) -> pathlib.Path:
  """A checkpoint of random weights; a huge, finite `backbone_scale` makes every latent NaN or Inf."""
  random_model.save(
    folder, small_model(), REPOSITORY / "checkpoints/tiny/tokenizer.model", backbone_scale=backbone_scale
  )
  return folder


def quick_compilation(cache: pathlib.Path) -> dict[str, Any]:
  """JAX's settings for processes that share what they compile, in `cache`, and spend little time on it."""
  return {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(cache),
    "jax_persistent_cache_min_compile_time_secs": 0,
  }


_PROCESSES = multiprocessing.get_context("forkserver")
# The programs themselves define flags, and each belongs to one program: only what they import is shared.
_PROCESSES.set_forkserver_preload(
  ["streamt1_jax.cli.results", "streamt1_jax.convert.execute", "streamt1_jax.convert.reward_part"]
)


def generate(folder: pathlib.Path, *arguments: str, jax_settings: Mapping[str, Any] | None = None) -> Result:
  """Runs the program in `folder`. The process is forked from one that has done the imports: seconds less for each."""
  process = start(folder, *arguments, jax_settings=jax_settings)
  process.join()
  return result_of(process.exitcode, folder)


def convert(folder: pathlib.Path, *arguments: str, file_bytes: int | None = None) -> Result:
  """Runs `experiments.convert` in `folder`; no file it writes may grow beyond `file_bytes`, as on a full disk."""
  process = start(folder, *arguments, program="convert", file_bytes=file_bytes)
  process.join()
  return result_of(process.exitcode, folder)


def start(
  folder: pathlib.Path,
  *arguments: str,
  jax_settings: Mapping[str, Any] | None = None,
  program: str = "generate",
  file_bytes: int | None = None,
  bucket: pathlib.Path | None = None,
):
  """As `generate` or `convert`, but does not wait. The program finds the files of `bucket` at gs://bucket alone."""
  process = _PROCESSES.Process(
    target=_run_program, args=(str(folder), program, arguments, dict(jax_settings or {}), file_bytes, bucket)
  )
  process.start()
  return process


def start_function(folder: pathlib.Path, function: Callable, *arguments: Any, jax_settings: Mapping[str, Any]):
  """As `start`, for a function that can be imported."""
  process = _PROCESSES.Process(target=_run_function, args=(str(folder), dict(jax_settings), function, *arguments))
  process.start()
  return process


def run_generate(arguments: Sequence[str]) -> None:
  """Runs the program in this process; for `start_function`."""
  _run_main("generate", arguments)


def generate_terminated(arguments: Sequence[str]) -> None:
  """As `run_generate`; SIGTERM comes while a chunk is searched."""
  from streamt1_jax.cli import stopped_searches

  save_if_due = stopped_searches.save_if_due

  def after_sigterm(*chunk):
    os.kill(os.getpid(), signal.SIGTERM)
    save_if_due(*chunk)

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
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
  with contextlib.nullcontext() if bucket is None else memory_store.moved_to_bucket(bucket):
    _run_main(program, arguments)


def _run_main(program: str, arguments: Sequence[str]) -> None:
  sys.argv = [f"experiments/{program}.py", *arguments]
  from streamt1_jax.cli import common

  common.run(importlib.import_module(f"experiments.{program}").main)


def _run_function(folder: str, jax_settings: dict[str, Any], function: Callable, *arguments: Any) -> None:
  _prepare(folder, jax_settings)
  function(*arguments)


def _prepare(folder: str, jax_settings: dict[str, Any]) -> None:
  os.chdir(folder)
  # As from a terminal: a shell's background jobs, these tests perhaps, ignore Ctrl-C and hand that on.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  # One device, as on most machines, unless the settings ask for several.
  for name, value in ({"jax_num_cpu_devices": 1} | jax_settings).items():
    jax.config.update(name, value)
  os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(HOST_DEVICES, "")
  for stream, name in ((1, _STDOUT), (2, _STDERR)):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
