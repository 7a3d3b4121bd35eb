"""What the programs share: flags that refuse bad numbers, and errors as one line and an exit code."""

from __future__ import annotations

import logging
import math
import pathlib
import sys
from collections.abc import Callable, Sequence

import fsspec
import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from flax import nnx

from streamt1_jax.cli.command import BAD_INPUT, INTERRUPTED, RUN_FAILED, TERMINATED, RunFailed
from streamt1_jax.cli.files import FULL_DISK, checkpoint_sha256, make_folder, require_writable  # noqa: F401
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ConfigError, ModelConfig, preset
from streamt1_jax.drivers import SearchError
from streamt1_jax.io import signals
from streamt1_jax.io.checkpoint import load_params
from streamt1_jax.io.signals import Terminated, is_terminated, raise_if_interrupted, termination_deferred  # noqa: F401
from streamt1_jax.parallel import hosts
from streamt1_jax.saved_search import SaveError

# A flag defined here belongs to the program that asks for it, in its --help and in its manifest.
flags.disclaim_key_flags()


class _Integer(flags.IntegerParser):
  """Says what is allowed, where absl quotes Python."""

  def convert(self, argument: int | str) -> int:
    try:
      return super().convert(argument)
    except ValueError as error:
      raise ValueError(f"{argument!r} is not {self.syntactic_help}") from error


class _FiniteFloat(flags.FloatParser):
  """Refuses NaN and infinities, which pass every comparison with a bound or fail them all."""

  def convert(self, argument: float | str) -> float:
    try:
      value = super().convert(argument)
    except ValueError as error:
      raise ValueError(f"{argument!r} is not a number") from error
    if not math.isfinite(value):
      raise ValueError(f"{argument!r} is not a finite number")
    return value


def define_integer(
  name: str, default: int | None, meaning: str, lower: int | None = None, upper: int | None = None
) -> flags.FlagHolder:
  """An integer flag in `lower`..`upper`."""
  return flags.DEFINE(_Integer(lower, upper), name, default, meaning, serializer=flags.ArgumentSerializer())


def define_float(
  name: str, default: float | None, meaning: str, lower: float | None = None, upper: float | None = None
) -> flags.FlagHolder:
  """A flag of a finite number in `lower`..`upper`."""
  return flags.DEFINE(_FiniteFloat(lower, upper), name, default, meaning, serializer=flags.ArgumentSerializer())


class _Path(flags.ArgumentParser):
  """Of this machine's file systems or, if `url` is set, of Google's object store."""

  syntactic_help = "a path"

  def __init__(self, url: bool):
    self._url = url

  def parse(self, argument: str) -> str:
    scheme, separator, _ = argument.partition("://")
    if not separator:
      return argument
    if not self._url or scheme != "gs":
      allowed = "a path of this machine or gs://bucket/name" if self._url else "a path of this machine"
      raise ValueError(f"{argument!r} is not {allowed}")
    try:
      fsspec.get_filesystem_class("gcs")
    except ImportError as error:
      raise ValueError("gs:// needs the package gcsfs: pip install -e '.[gcs]'") from error
    return argument


def define_path(
  name: str, default: str | None, meaning: str, *, required: bool = False, url: bool = True
) -> flags.FlagHolder:
  """A flag of a file or folder; gs:// is refused unless `url`."""
  return flags.DEFINE(_Path(url), name, default, meaning, serializer=flags.ArgumentSerializer(), required=required)


def run(main: Callable[[], None]) -> None:
  """Parses the flags, runs `main` and exits with 0, or with one line on stderr and one of the codes above."""
  # JAX reports every platform that is not there.
  logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
  with signals.handled():
    app.run(lambda _: hosts.run_together(lambda: _exit_code(main)), flags_parser=_parse_flags)


def _parse_flags(arguments: Sequence[str]) -> list[str]:
  try:
    positional = flags.FLAGS(arguments)[1:]
  except flags.Error as error:
    sys.exit(_report(str(error), BAD_INPUT))
  except UnicodeDecodeError as error:
    sys.exit(_report(f"a file given by --flagfile is not UTF-8 text: {error}", BAD_INPUT))
  if positional:
    sys.exit(_report(f"unexpected argument {positional[0]!r}; every argument is a flag: --name=value", BAD_INPUT))
  return positional


def _exit_code(main: Callable[[], None]) -> int:
  try:
    main()
  except ConfigError as error:
    return _report(str(error), BAD_INPUT)
  except OSError as error:
    # A path that the system refuses, for whatever of its many reasons; without a path it is a fault of ours.
    if error.filename is None:
      raise
    return _report(f"{error.filename}: {error.strerror}", RUN_FAILED if error.errno in FULL_DISK else BAD_INPUT)
  except (SearchError, SaveError, RunFailed) as error:
    return _report(str(error), RUN_FAILED)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _report(f"the device has not enough memory for this search: {str(error).splitlines()[0]}", RUN_FAILED)
  except Terminated as error:
    return _report(str(error), TERMINATED)
  except KeyboardInterrupt:
    return _report("interrupted", INTERRUPTED)
  return 0


def _report(message: str, code: int) -> int:
  print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
  return code


def find_folder(path: str) -> epath.Path:
  """`path`, or where only that exists, the same beside `experiments/`: defaults work from any folder."""
  here = epath.Path(path)
  beside = epath.Path(pathlib.Path(__file__).resolve().parents[2]) / path
  return beside if beside.exists() and not here.exists() else here


def trainable_preset(name: str) -> ModelConfig:
  """The named preset. Raises ConfigError if it is unknown or has no codec and text encoder of its own."""
  model = preset(name)
  if model.codec is None or model.text is None:
    raise ConfigError(f"--preset={name} is a backbone alone; codec and text encoder are needed, as in: tiny")
  return model


def load_codec(model: ModelConfig, folder: epath.PathLike) -> VideoCodec:
  """The trained codec of a model, in float32. Raises ConfigError if the folder holds none of its size."""
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: VideoCodec(model.codec, rngs=nnx.Rngs(0))), nnx.Param)
  return nnx.merge(graphdef, load_params(folder, nnx.to_pure_dict(abstract), jnp.float32))
