"""A search as it lies on disk, so that a killed one goes on from its last save.

  .a-red-circle-1e5d7e4c.saved/
    search.json       what decides the result, and the chunks at which the search went on after a stop
    000005/trace/     chunks 0 to 4: each is written once; beside every trace lies a copy of search.json
    000010/trace/     chunks 5 to 9
    000010/state/     state before chunk 10
    000015/trace/     chunks 10 to 14
    000015/state/     state before chunk 15

A save is one asynchronous orbax checkpoint. Orbax stores no checksums of values, so they are added when all files are
written and before the folder gets its name. On an object store, which renames nothing, a save without checksums is not
whole. A save counts if its state and all traces up to it are what their checksums say. Only the newest two keep their
state. What is damaged is removed and made again, but what the file system refuses to read ends the program and is kept.

`ocp.CheckpointManager` does not do this: it removes whole saves, and here the traces of a removed state stay; a folder
that it cannot look into is missing to it; and in a bucket it removes through Google's client, which needs more rights.

Several processes that search as one save and restore together, on a file system they share: each writes and reads its
shards, and the first alone does everything else.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from streamt1_jax import save_folder
from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint, part_files, paths, quiet
from streamt1_jax.io.named_tuples import named
from streamt1_jax.parallel import hosts
from streamt1_jax.save_folder import SEARCH_FILE, STATE, TRACE, Description, read_description, save_path
from streamt1_jax.state import ChunkTrace, SearchState

Progress = tuple[SearchState, int]
"""What the next chunk begins with, and the number of chunks before it."""


class SaveError(RuntimeError):
  """A search cannot be saved: the disk is full, say. What was saved before is kept."""


def discard(directory: epath.PathLike) -> None:
  """Removes a saved search; the first process does."""
  if hosts.is_first():
    save_folder.discard(epath.Path(directory))


class SavedSearch:
  """The saves of one search. Use it as a context: leaving waits for a save that is being written.

  With several processes all must make the same calls, on a file system they share.

  Attributes:
    folder: where they are.
    resumed_at: number of finished chunks whenever the search went on after a stop.
    saved: finished chunks of the newest save, or None.
    begun: finished chunks of the save that was begun last, or of the one that the search went on from.
    tries: fields of what the search's driver tried so far, as JSON values; saves keep them.
  """

  def __init__(self, folder: epath.PathLike, settings: Mapping[str, Any]):
    """`settings` are what decides the result, as JSON values. Nothing is written before the first save."""
    quiet.hide_failed_writes()
    self.folder = paths.absolute(folder)
    self.resumed_at: list[int] = []
    self.saved: int | None = None
    self.begun = 0
    self.tries: list[Sequence[Any]] = []
    self._tries: list[Sequence[Any]] = []
    self._settings = dict(settings)
    self._pending: int | None = None
    self._stored: dict[str, Any] = {}
    self._last = time.monotonic()
    self._failed = False
    options = ocp.AsyncOptions(post_finalization_callback=self._seal)
    self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

  def __enter__(self) -> SavedSearch:
    return self

  def __exit__(self, *exception) -> None:
    # Nobody needs a save that fails now, or its failure is being reported.
    with contextlib.suppress(Exception):
      self._checkpointer.close()
      self.wait()
    if self._failed:
      # Other files were still being written when the first one failed. Now they can be removed.
      self._keep_up_to(self.saved or 0)

  def restore(self, abstract_state: SearchState, warn: Callable[[str], None]) -> Progress | None:
    """The newest save that is whole, or None. What is newer, unfinished or damaged is removed.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.
      warn: told why a save does not count, a line each.

    Raises:
      ConfigError: a save may be whole, but a process cannot read it or cannot use it; nothing is removed.
    """
    found, told = hosts.first_decides(self._find)
    for message in told:
      warn(message)
    if found is None:
      self.discard()
      return None
    saves = hosts.first_decides(lambda: save_folder.saves_with_state(self.folder))
    loaded = (self._load_if_whole(chunks, abstract_state, warn) for chunks in saves)
    progress = next((each for each in loaded if each is not None), None)
    self.saved = progress[1] if progress else None
    self.begun = self.saved or 0
    self._keep_up_to(self.saved or 0)
    if progress is not None:
      tries, problem = hosts.first_decides(lambda: save_folder.read_tries(self.folder, progress[1]))
      self.tries, self._tries = list(tries), list(tries)
      if problem is not None:
        warn(problem)
    self.resumed_at = [*Description(*found).resumed_at, self.saved or 0]
    with self._failures_named():
      self._describe()
    return progress

  def save(self, state: SearchState, traces: Sequence[Sequence[ChunkTrace]]) -> None:
    """Begins to write a save, once the one before is whole; returns when the state may be given to the next chunk.

    Args:
      state: as `drivers.stream_states` yields it.
      traces: per video the chunks since the save before (`begun`), on the host.

    Raises:
      SaveError: this save or the one before cannot be written.
    """
    self.wait()
    self._last = time.monotonic()
    # More may be tried while the save is written.
    self._tries = list(self.tries)
    with self._failures_named():
      self._describe()
      items = {STATE: named(jax.tree.map(_copied, state)), TRACE: save_folder.named_traces(traces, self.begun)}
      self._stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), items)
      self._pending = self.begun = self.begun + len(traces[0])
      args = {name: ocp.args.PyTreeSave(checkpoint.nested(item)) for name, item in items.items()}
      self._checkpointer.save(save_path(self.folder, self._pending), args=ocp.args.Composite(**args))

  def traces(self) -> Iterator[list[ChunkTrace]]:
    """The chunks that the search went on with, in order, of all videos: each is read when it is asked for."""
    return save_folder.iterate_traces(self.folder, self.saved or 0)

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
    if hosts.is_first():
      save_folder.write_description(self.folder, self._description)

  @property
  def _description(self) -> Description:
    return Description(self._settings, self.resumed_at, self._tries)

  def _find(self) -> tuple[Description | None, list[str]]:
    """What is saved, and what has to be told of it."""
    told: list[str] = []
    found = read_description(self.folder, told.append)
    if found is None and (saves := save_folder.saves(self.folder)):
      told.append(f"{self.folder} has {len(saves)} saves and no {SEARCH_FILE} that says of what; they are removed")
    return found, told

  @contextlib.contextmanager
  def _failures_named(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many types for one thing: the disk is full.
      self._pending, self._failed = None, True
      self._keep_up_to(self.saved or 0)
      kept = f"the save after chunk {self.saved} is kept" if self.saved else "none was made before"
      raise SaveError(f"cannot save the search to {self.folder} ({kept}): {_reason(error)}") from error

  def _seal(self) -> None:
    """Adds checksums and removes old states. Orbax calls this in the first process, before the save gets its name."""
    assert self._pending is not None
    (written,) = self.folder.glob(save_path(self.folder, self._pending).name + "*")
    save_folder.write_description(written, self._description)
    for name, leaves in self._stored.items():
      part_files.write_part_file(written / name, leaves)
    # On an object store the new save has its name already.
    for chunks in [chunks for chunks in save_folder.saves_with_state(self.folder) if chunks != self._pending][1:]:
      (save_path(self.folder, chunks) / STATE).rmtree(missing_ok=True)

  def _keep_up_to(self, chunks: int) -> None:
    if hosts.is_first():
      save_folder.keep_up_to(self.folder, chunks)

  def _load_if_whole(self, chunks: int, abstract_state: SearchState, warn: Callable[[str], None]) -> Progress | None:
    """A save, or None after a warning if it is damaged for any process."""
    progress = damage = refusal = None
    try:
      save_folder.check_traces(self.folder, chunks)
      progress = self._load_state(chunks, abstract_state), chunks
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
      return None
    return progress

  def _load_state(self, chunks: int, abstract_state: SearchState) -> SearchState:
    names = named(abstract_state)
    loaded = checkpoint.load_arrays(save_path(self.folder, chunks) / STATE, names)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [loaded[name] for name in names])


def _reason(error: Exception) -> str:
  """Why writing failed. TensorStore hides the system's error code in pages of text."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else part_files.first_line(error)


def _copied(array: jax.Array) -> jax.Array | np.ndarray:
  """A copy that outlives the array's buffers, which the next chunk takes."""
  if array.is_fully_addressable:
    return np.array(array)
  # Orbax copies from accelerators before it returns, but on a CPU it looks at the buffers themselves.
  return jnp.copy(array) if jax.default_backend() == "cpu" else array
