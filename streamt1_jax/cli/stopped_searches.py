"""Searches that were stopped: when they are saved, and which of them go on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from streamt1_jax import saved_search
from streamt1_jax.cli import flag_types, results
from streamt1_jax.config import ConfigError
from streamt1_jax.io import manifest
from streamt1_jax.io.signals import Terminated, is_terminated
from streamt1_jax.parallel import hosts
from streamt1_jax.saved_search import SavedSearch
from streamt1_jax.state import ChunkTrace, SearchState

DEFAULT_SECONDS = 60.0


def define(values: flags.FlagValues) -> None:
  """Defines --save_every."""
  flag_types.define_integer(
    values,
    "save_every",
    None,
    "Chunks between two saves of the search, from which it goes on when it was killed; 0 for none. By default a chunk "
    "is saved that ends a minute or more after the last save.",
    0,
  )


@dataclasses.dataclass(frozen=True)
class Batch:
  """Videos that are searched together.

  Attributes:
    folders: of their results, by prompt.
    settings: what decides the results, as JSON values.
    finished: prompts whose results are there. A stopped search may have some: it goes on with all of its prompts.
  """

  folders: dict[str, epath.Path]
  settings: dict[str, Any]
  finished: Collection[str] = ()

  @property
  def missing(self) -> dict[str, epath.Path]:
    """The folders that are left to fill, by prompt."""
    return {prompt: folder for prompt, folder in self.folders.items() if prompt not in self.finished}

  def saved(self) -> SavedSearch:
    """Its saves, hidden beside its first result."""
    return SavedSearch(saved_folder(next(iter(self.folders.values()))), self.settings)


def save_if_due(
  saved: SavedSearch,
  state: SearchState,
  traces: Sequence[list[ChunkTrace]],
  num_chunks: int,
  timer: manifest.PhaseTimer,
  every: int | None,
) -> None:
  """Called after every chunk; saves when it is time and, waiting for it, when SIGTERM has come.

  Args:
    saved: the saves of this search.
    state: the state after the chunk.
    traces: of each prompt, the chunks since the last save; emptied when they are saved, or never will be.
    num_chunks: chunks of the whole video.
    timer: gets the seconds that the save takes.
    every: chunks between two saves, as --save_every says: 0 for no save, None for one a minute.

  Raises:
    Terminated: SIGTERM has come.
    SaveError: the search cannot be saved.
  """
  chunks = saved.begun + len(traces[0])
  if every is None:
    due = saved.seconds_since_save() >= DEFAULT_SECONDS
  else:
    due = every > 0 and chunks % every == 0
  # A save is made by all processes: the signal to one counts for all, and of their clocks that of the first.
  told = hosts.everyone([is_terminated(), due])
  terminated = any(signalled for signalled, _ in told)
  # The last chunk is followed by the video.
  due = told[0][1] and chunks < num_chunks
  if every != 0 and (due or terminated):
    with timer.phase("save"):
      saved.save(state, traces)
      _empty(traces)
      if terminated:
        saved.wait()
  if every == 0:
    _empty(traces)
  if terminated:
    saved_now = f", saved after chunk {chunks} of {num_chunks}: the same command goes on from there"
    raise Terminated(f"terminated{'' if every == 0 else saved_now}")


def _empty(traces: Sequence[list[ChunkTrace]]) -> None:
  for chunks in traces:
    chunks.clear()


def saved_folder(folder: epath.Path) -> epath.Path:
  """Where a search is saved whose first result belongs into `folder`."""
  return folder.parent / f".{folder.name}.saved"


def group_prompts(
  folders: Mapping[str, epath.Path],
  finished: Sequence[str],
  together: int,
  settings: Callable[[Sequence[str]], dict[str, Any]],
  *,
  overwrite: bool,
) -> list[list[str]]:
  """The prompts of the searches that are left to do: each stopped one with all those it had, and new ones.

  Saves of no use are removed: the results are there, or others are to replace them.

  Args:
    folders: of the result of every prompt.
    finished: prompts whose results are there.
    together: prompts of a new search.
    settings: what decides the results of a search of some prompts, as JSON values.
    overwrite: whether a stopped search of other settings may be replaced.

  Raises:
    ConfigError: a stopped search has other settings; it stays, and the first difference is named.
  """
  missing = [prompt for prompt in folders if prompt not in finished]
  groups = []
  for folder in folders.values():
    prompts = _stopped_prompts(saved_folder(folder), list(folders), finished, missing, settings, overwrite=overwrite)
    groups += [prompts] if prompts else []
    missing = [prompt for prompt in missing if prompt not in prompts]
  groups += [missing[start : start + together] for start in range(0, len(missing), together)]
  return sorted(groups, key=lambda prompts: list(folders).index(prompts[0]))


def discard_finished(folders: Iterable[epath.Path], finished: Collection[str]) -> None:
  """Removes the saves beside `folders` whose results are all there: a kill after the last result leaves them."""
  for folder in map(saved_folder, folders):
    # What cannot be told is left: no result needs it.
    with contextlib.suppress(ConfigError):
      stopped = _read(folder)
      if stopped and stopped["prompts"] and all(prompt in finished for prompt in stopped["prompts"]):
        saved_search.discard(folder)


def _read(folder: epath.Path) -> dict[str, Any] | None:
  """The settings of the search that is saved in `folder`, or None if no search is; "prompts" is a list of texts.

  Raises ConfigError if that cannot be told.
  """
  description = saved_search.read_description(folder)
  if description is None:
    return None
  prompts = description.settings.get("prompts")
  if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
    raise ConfigError(f"{folder} does not say which prompts it was searching; use --overwrite or another --output_dir")
  return description.settings


def _stopped_prompts(
  folder: epath.Path,
  given: Sequence[str],
  finished: Sequence[str],
  missing: Sequence[str],
  settings: Callable[[Sequence[str]], dict[str, Any]],
  *,
  overwrite: bool,
) -> list[str]:
  """The prompts of the search that is saved in `folder`; none if there is no search to go on with."""
  try:
    stopped = _read(folder)
    if stopped is None:
      return []
    prompts = stopped["prompts"]
    done = [prompt for prompt in prompts if prompt in finished]
    elsewhere = [prompt for prompt in prompts if prompt in given and prompt not in [*missing, *finished]]
    # A kill between the last result and the end of the search leaves the first.
    if (prompts and done == prompts) or elsewhere:
      saved_search.discard(folder)
      return []
    if done and not set(prompts) & set(missing):
      # What it has left to do was not asked for now.
      return []
    known = [prompt for prompt in prompts if prompt in given]
    remedy = "give the same flags to go on with it, --overwrite to begin anew, or another --output_dir"
    results.require_same(f"{folder} holds a stopped search", stopped, settings(known), remedy)
  except ConfigError:
    if not overwrite:
      raise
    saved_search.discard(folder)
    return []
  return prompts
