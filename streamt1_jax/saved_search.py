"""A search as it lies on disk, so that a killed one goes on where it was last saved.

  .a-red-circle-1e5d7e4c.saved/
    search.json       what decides the result, and the chunks at which the search went on after a stop
    000005/trace/     chunks 0 to 4: each is written once
    000010/trace/     chunks 5 to 9
    000010/state/     state before chunk 10
    000015/trace/     chunks 10 to 14
    000015/state/     state before chunk 15

A save is one asynchronous orbax checkpoint: its folder gets its name when everything is in it, checksums included, for
orbax stores none of values. On an object store, which renames nothing, the checksums come last. A save counts if its
state and all traces up to it are what their checksums say; only the newest two keep their state. What is damaged is
removed and made again, but what cannot be read, for the file system refuses, ends the program and is kept.

Several processes that search as one save and restore together, on a file system they share: each writes and reads its
shards, the first alone does everything else.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint, manifest, part_files, paths, stored_part
from streamt1_jax.memory_sinking import Eviction
from streamt1_jax.parallel import hosts
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.state import CandidateTrace, ChunkTrace, SearchState

SEARCH_FILE = "search.json"
STATE, TRACE = "state", "trace"
_ITEMS = (STATE, TRACE)
_DIGITS = 6
_LOOP_IS_CLOSED = "Event loop is closed"
_TRACE_TREE = ChunkTrace(CandidateTrace(0, 0, 0, 0, 0, Flags(0, 0)), Eviction(0, 0, 0), 0, 0, 0, 0, None)


class SaveError(RuntimeError):
  """A search cannot be saved: the disk is full, say. What was saved before is kept."""


class Progress(NamedTuple):
  """A search between two chunks.

  Attributes:
    state: what the next chunk begins with.
    traces: per video the chunks so far, on the host.
  """

  state: SearchState
  traces: list[list[ChunkTrace]]


class Description(NamedTuple):
  """The contents of `search.json`.

  Attributes:
    settings: what decides the result, as JSON values.
    resumed_at: number of finished chunks whenever the search went on after a stop.
  """

  settings: dict[str, Any]
  resumed_at: list[int]


def read_description(directory: epath.PathLike) -> Description | None:
  """What is saved in `directory`, or None if there is nothing. Raises ConfigError if that cannot be told."""
  folder = epath.Path(directory)
  with stored_part.readable(folder):
    # The file is written before all others: without it nothing is lost.
    if not paths.exists(folder / SEARCH_FILE):
      return None
  document = part_files.read_json_object(folder, SEARCH_FILE, "a saved search")
  part_files.require_version(document, folder / SEARCH_FILE)
  settings, resumed_at = document.get("settings"), document.get("resumed_at")
  if not isinstance(settings, dict) or not isinstance(resumed_at, list):
    raise ConfigError(f"{folder / SEARCH_FILE} is corrupt: settings or resumed_at is missing")
  return Description(settings, resumed_at)


class SavedSearch:
  """The saves of one search. Use it as a context: leaving waits for a save that is being written.

  With several processes all must make the same calls, on a file system they share: each writes and reads its shards.

  Attributes:
    folder: where they are.
    resumed_at: number of finished chunks whenever the search went on after a stop.
    saved: finished chunks of the newest save, or None.
  """

  def __init__(self, folder: epath.PathLike, settings: Mapping[str, Any]):
    """`settings` are what decides the result, as JSON values. Nothing is written before the first save."""
    self.folder = paths.absolute(folder)
    self.resumed_at: list[int] = []
    self.saved: int | None = None
    self._settings = dict(settings)
    self._pending: int | None = None
    self._last = time.monotonic()
    self._described = self._failed = False
    self._quiet = contextlib.ExitStack()
    self._quiet.enter_context(_quiet_background())
    self._handler = _SealingHandler(self._retire)
    self._checkpointer = ocp.AsyncCheckpointer(self._handler)

  def __enter__(self) -> SavedSearch:
    return self

  def __exit__(self, *exception) -> None:
    # A save that fails now is one that nobody needs any more, or whose failure is being reported.
    with contextlib.suppress(Exception):
      self._checkpointer.close()
      self.wait()
    if self._failed:
      # What was being written when the first of its files failed is now written, and can be removed.
      self._keep_up_to(self.saved or 0)
    self._quiet.close()

  def restore(self, abstract_state: SearchState, warn: Callable[[str], None]) -> Progress | None:
    """The newest save that is whole, or None. What is newer, unfinished or damaged is removed.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.
      warn: told why a save does not count, a line each.

    Raises:
      ConfigError: a save may be whole, but a process cannot read it or cannot use it; nothing is removed.
    """
    found, progress = hosts.first_decides(lambda: read_description(self.folder)), None
    if found is None:
      self.discard()
      return None
    description = Description(*found)
    for chunks in hosts.first_decides(self._saves_with_state):
      damage = refusal = None
      try:
        loaded = self._load(chunks, abstract_state)
      except part_files.Damaged as error:
        damage = str(error)
      except ConfigError as error:
        refusal = str(error)
      damages, refusals = zip(*hosts.everyone([damage, refusal]))
      if any(refusals):
        where = f"cannot go on after chunk {chunks}; try again, or remove {self.folder} to begin anew"
        raise ConfigError(f"{where}: {next(filter(None, refusals))}")
      if any(damages):
        warn(f"the save after chunk {chunks} does not count: {next(filter(None, damages))}")
        continue
      progress = loaded
      self.saved = chunks
      break
    self._keep_up_to(self.saved or 0)
    self.resumed_at = [*description.resumed_at, self.saved or 0]
    with self._failures_named():
      self._describe()
    return progress

  def save(self, state: SearchState, traces: Sequence[Sequence[ChunkTrace]]) -> None:
    """Begins to write a save, once the one before is whole; returns when the state may be given to the next chunk.

    Args:
      state: as `drivers.stream_states` yields it.
      traces: per video all chunks so far, on the host.

    Raises:
      SaveError: this save or the one before cannot be written.
    """
    chunks = len(traces[0])
    self.wait()
    self._last = time.monotonic()
    with self._failures_named():
      if not self._described:
        self._describe()
      items = {
        STATE: checkpoint.nested(_named(jax.tree.map(_copied, state))),
        TRACE: checkpoint.nested(_named_traces(traces, self.saved or 0)),
      }
      self._handler.begin(items)
      self._pending = chunks
      args = _SealingArgs(**{name: ocp.args.PyTreeSave(item) for name, item in items.items()})
      self._checkpointer.save(self._save_folder(chunks), args=args)

  def seconds_since_save(self) -> float:
    """Since the last save began, or else since this object was made."""
    return time.monotonic() - self._last

  def wait(self) -> None:
    """Returns when the last save is whole. Raises SaveError if it cannot be written."""
    with self._failures_named():
      self._checkpointer.wait_until_finished()
    if self._pending is not None:
      self.saved, self._pending = self._pending, None

  def discard(self) -> None:
    """Removes all saves: they are of no more use."""
    with contextlib.suppress(Exception):
      self._checkpointer.wait_until_finished()
    discard(self.folder)

  def _describe(self) -> None:
    document = {"format_version": part_files.FORMAT_VERSION, "settings": self._settings, "resumed_at": self.resumed_at}
    if hosts.is_first():
      manifest.write_json(self.folder / SEARCH_FILE, document)
    self._described = True

  @contextlib.contextmanager
  def _failures_named(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many types for one thing: the disk is full.
      self._pending, self._failed = None, True
      self._keep_up_to(self.saved or 0)
      kept = f"the save after chunk {self.saved} is kept" if self.saved else "none was made before"
      raise SaveError(f"cannot save the search to {self.folder} ({kept}): {_reason(error)}") from error

  def _save_folder(self, chunks: int) -> epath.Path:
    return self.folder / f"{chunks:0{_DIGITS}}"

  def _saves(self) -> list[int]:
    """Finished chunks of the saves that are whole, by their names, newest first."""
    with stored_part.readable(self.folder):
      names = [path.name for path in self.folder.iterdir()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)

  def _saves_with_state(self) -> list[int]:
    with stored_part.readable(self.folder):
      return [chunks for chunks in self._saves() if paths.exists(self._save_folder(chunks) / STATE)]

  def _keep_up_to(self, chunks: int) -> None:
    """Removes later saves and what is unfinished."""
    if not hosts.is_first():
      return
    with contextlib.suppress(OSError):
      for path in self.folder.iterdir():
        if path.is_dir() and not (path.name.isdigit() and int(path.name) <= chunks):
          path.rmtree(missing_ok=True)

  def _retire(self) -> None:
    """Removes the states of all saves but the newest; called when the next one is written, before it counts."""
    # On an object store that one has its name already.
    whole = [chunks for chunks in self._saves_with_state() if chunks != self._pending]
    for chunks in whole[1:]:
      (self._save_folder(chunks) / STATE).rmtree(missing_ok=True)

  def _load(self, chunks: int, abstract_state: SearchState) -> Progress:
    traces, names = self._load_traces(chunks), _named(abstract_state)
    loaded = checkpoint.load_arrays(self._save_folder(chunks) / STATE, checkpoint.nested(names))
    leaves = stored_part.named_leaves(loaded)
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in names])
    return Progress(state, traces)

  def _load_traces(self, chunks: int) -> list[list[ChunkTrace]]:
    videos: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for save in (save for save in self._saves() if save <= chunks):
      part = stored_part.open_part(self._save_folder(save) / TRACE, None)
      for name in part.stores:
        chunk, video, leaf = name.split("/", 2)
        videos.setdefault(int(video), {}).setdefault(int(chunk), {})[leaf] = part.read(name)
    if not videos or any(sorted(by_chunk) != list(range(chunks)) for by_chunk in videos.values()):
      raise part_files.Damaged(f"{self.folder}: the traces of some of the first {chunks} chunks are missing")
    names, structure = list(_named(_TRACE_TREE)), jax.tree.structure(_TRACE_TREE)
    rebuild = lambda leaves: jax.tree.unflatten(structure, [leaves[name] for name in names])
    return [[rebuild(videos[video][chunk]) for chunk in range(chunks)] for video in sorted(videos)]


def discard(directory: epath.PathLike) -> None:
  """Removes a saved search, its description last: it says whose the rest is."""
  folder = epath.Path(directory)
  if not hosts.is_first() or not folder.exists():
    return
  for path in folder.iterdir():
    if path.is_dir():
      path.rmtree(missing_ok=True)
  folder.rmtree(missing_ok=True)


@contextlib.contextmanager
def _quiet_background() -> Iterator[None]:
  """Hides what orbax and TensorStore print from their own threads: failures become a SaveError of one line."""
  of_others = lambda record: "orbax" not in record.pathname
  logger, hook, unraisable_hook = absl_logging.get_absl_logger(), sys.excepthook, sys.unraisablehook

  # Of writes that were under way when orbax gave up because of another one's failure; Python tells either hook.
  def report(kind, error, trace):
    if str(error) != _LOOP_IS_CLOSED:
      hook(kind, error, trace)

  def report_unraisable(unraisable):
    if str(unraisable.exc_value) != _LOOP_IS_CLOSED:
      unraisable_hook(unraisable)

  logger.addFilter(of_others)
  sys.excepthook, sys.unraisablehook = report, report_unraisable
  try:
    yield
  finally:
    sys.excepthook, sys.unraisablehook = hook, unraisable_hook
    logger.removeFilter(of_others)


def _reason(error: Exception) -> str:
  """Why writing failed. TensorStore hides the system's error code in pages of text."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else part_files.first_line(error)


class _SealingHandler(ocp.CompositeCheckpointHandler):
  """Adds checksums when orbax has written everything, before the folder gets its name."""

  def __init__(self, on_written: Callable[[], None]):
    super().__init__(**{name: ocp.PyTreeCheckpointHandler() for name in _ITEMS})
    self._on_written = on_written
    self._leaves: dict[str, dict[str, Any]] = {}

  def begin(self, items: Mapping[str, Any]) -> None:
    self._leaves = {
      name: {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in stored_part.named_leaves(item).items()}
      for name, item in items.items()
    }

  def finalize(self, directory: epath.Path) -> None:
    super().finalize(directory)
    if not hosts.is_first():
      return
    for name in _ITEMS:
      part_files.write_part_file(directory / name, self._leaves[name])
    self._on_written()


@ocp.args.register_with_handler(_SealingHandler, for_save=True, for_restore=True)
class _SealingArgs(ocp.args.Composite):
  pass


def _named(tree: Any) -> dict[str, Any]:
  """Leaves by path; fields of tuples are part of it."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _named_traces(traces: Sequence[Sequence[ChunkTrace]], first: int) -> dict[str, np.ndarray]:
  return {
    f"{chunk:0{_DIGITS}}/{video}/{name}": np.asarray(leaf)
    for video, chunks in enumerate(traces)
    for chunk, trace in enumerate(chunks[first:], first)
    for name, leaf in _named(trace).items()
  }


def _copied(array: jax.Array) -> jax.Array | np.ndarray:
  """A copy that outlives the array's buffers, which the next chunk takes."""
  if array.is_fully_addressable:
    return np.array(array)
  # Orbax copies from accelerators before it returns, but on a CPU it looks at the buffers themselves.
  return jnp.copy(array) if jax.default_backend() == "cpu" else array
