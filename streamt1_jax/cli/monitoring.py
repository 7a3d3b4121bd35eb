"""What a search tells while it goes on: XProf traces of chosen chunks, and metrics of every chunk for TensorBoard.

  --profile_chunks=3,4 --profile_dir=profiles    profiles/plugins/profile/PROMPT_chunk_3/HOST.xplane.pb, PROMPT_chunk_4
  --tensorboard_dir=metrics                      metrics/PROMPT/events.out.tfevents...

PROMPT is the name of the result's folder. Chunks count from 0, as in `trace.json`. Trace late chunks: before chunks 0
and 1 their programs are compiled, which fills a trace with millions of events, and a chunk is typical only when the
memory is full. Traces open with `xprof --logdir=profiles` or TensorBoard.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags
from etils import epath

from streamt1_jax.cli import flag_types, results
from streamt1_jax.cli.files import make_folder
from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest, paths
from streamt1_jax.state import ChunkTrace
from streamt1_jax.trace import ROUTE_NAMES


def define(values: flags.FlagValues) -> None:
  """Defines --profile_chunks, --profile_dir and --tensorboard_dir."""
  flag_types.define_list(values, "profile_chunks", None, "Chunks to trace for XProf, from 0, as 3,4.")
  flag_types.define_path(values, "profile_dir", None, "Where the traces go.")
  flag_types.define_path(values, "tensorboard_dir", None, "Where metrics of every chunk go, for TensorBoard.")


def check_flags(values: flags.FlagValues, num_chunks: int) -> None:
  """Raises ConfigError, naming the flag, if a video of `num_chunks` chunks cannot follow it."""
  _profiled_chunks(values, num_chunks)
  if values.tensorboard_dir is not None:
    _writer_class()


def make_folders(values: flags.FlagValues) -> None:
  """Makes the folders of the flags. Raises ConfigError, naming the flag, if one cannot be written."""
  for name in ("profile_dir", "tensorboard_dir"):
    folder = values[name].value
    if folder is not None:
      make_folder(name, folder, writable=True)


def _profiled_chunks(values: flags.FlagValues, num_chunks: int) -> set[int]:
  if (values.profile_chunks is None) != (values.profile_dir is None):
    raise ConfigError("--profile_chunks and --profile_dir need each other")
  if values.profile_chunks == []:
    raise ConfigError(f"--profile_chunks names no chunk; those of this video are 0..{num_chunks - 1}")
  chunks = values.profile_chunks or ()
  for chunk in chunks:
    if not chunk.isdecimal() or int(chunk) >= num_chunks:
      raise ConfigError(f"--profile_chunks: {chunk!r} is not a chunk of this video; they are 0..{num_chunks - 1}")
  return {int(chunk) for chunk in chunks}


def _writer_class() -> type:
  # Not imported unless it is asked for: it imports torch where there is one.
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise ConfigError("--tensorboard_dir needs the package tensorboardX: pip install tensorboardX") from error
  return SummaryWriter


class Monitor:
  """Watches the chunks of videos that are searched together, from chunk `start` on, as the flags say."""

  def __init__(
    self, values: flags.FlagValues, prompts: Sequence[str], num_chunks: int, start: int = 0, sample: int = 0
  ):
    self._names = [results.result_folder("", prompt, sample=sample).name for prompt in prompts]
    self._profiled = _profiled_chunks(values, num_chunks)
    self._profile_dir = values.profile_dir
    self._seconds = 0.0
    self._writers = []
    # All processes have the same numbers; one writes them.
    if values.tensorboard_dir is not None and jax.process_index() == 0:
      folders = [epath.Path(values.tensorboard_dir) / name for name in self._names]
      # What an earlier run wrote of chunks that are searched again is hidden.
      self._writers = [_writer_class()(str(folder), purge_step=start) for folder in folders]

  @contextlib.contextmanager
  def chunk(self, index: int) -> Iterator[None]:
    """The body searches chunk `index` and waits for it."""
    began = time.perf_counter()
    trace = contextlib.nullcontext()
    if index in self._profiled:
      trace = _traced(epath.Path(self._profile_dir), f"{self._names[0]}_chunk_{index}")
    with trace:
      yield
      self._seconds = time.perf_counter() - began

  def log(self, index: int, traces: Sequence[ChunkTrace], *, judged: bool) -> None:
    """Writes the metrics of the chunk that was searched last.

    Args:
      index: the chunk.
      traces: one per video, on the host.
      judged: whether candidates have scores: plain streaming gives none.
    """
    for writer, trace in zip(self._writers, traces):
      for name, value in chunk_metrics(trace, self._seconds, judged=judged).items():
        writer.add_scalar(name, value, index)
      # A machine may be taken away at any time.
      writer.flush()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()


@contextlib.contextmanager
def _traced(folder: epath.Path, run: str) -> Iterator[None]:
  """Traces the body. The profiler names its runs by the second; here hosts share one and chunks do not."""
  with tempfile.TemporaryDirectory() as local:
    with jax.profiler.trace(local):
      yield
    target = folder / "plugins" / "profile" / run
    target.mkdir(parents=True, exist_ok=True)
    prefix = f"{jax.process_index()}." if jax.process_count() > 1 else ""
    for file in paths.files_below(epath.Path(local)):
      file.copy(target / f"{prefix}{file.name}", overwrite=True)


def chunk_metrics(trace: ChunkTrace, seconds: float, *, judged: bool) -> dict[str, float]:
  """What TensorBoard shows of one chunk.

  Args:
    trace: of one video, on the host.
    seconds: wall time of the chunk.
    judged: whether candidates have scores.

  Returns:
    By name: `seconds`; if `judged`, `best` and `mean` of every score of the candidates that are finite; how many beams
    took each route; GiB of memory, the most the process and one of its devices have used so far.
  """
  metrics = {"chunk/seconds": seconds}
  for name in ("short", "long", "hybrid") if judged else ():
    scores = np.asarray(getattr(trace.candidates, name), np.float64)
    finite = scores[np.isfinite(scores)]
    if finite.size:
      metrics |= {f"{name}/best": finite.max(), f"{name}/mean": finite.mean()}
  route = np.asarray(trace.eviction.route)
  metrics |= {f"route/{name}": float((route == number).sum()) for number, name in ROUTE_NAMES.items()}
  metrics["memory/host_peak_gib"] = manifest.peak_rss_bytes() / 2**30
  device = manifest.peak_device_bytes()
  return metrics if device is None else metrics | {"memory/device_peak_gib": device / 2**30}
