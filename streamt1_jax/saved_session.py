"""A session as it lies on disk: one folder that is replaced whole, with checksums of all files in it.

  session.json   what decides the session, and the prompts so far
  chunks.npz     chunks that were made and not yet shown, and those that the video began with
  (orbax)        the state before the next chunk

A searched video that nobody steers is saved otherwise (`saved_search`): there all traces are kept.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from streamt1_jax.config import ConfigError, SearchConfig, SessionConfig
from streamt1_jax.drivers import Given
from streamt1_jax.io import checkpoint, config_json, part_files
from streamt1_jax.io.named_tuples import named, rebuilt
from streamt1_jax.messages import shortened
from streamt1_jax.state import ChunkTrace, SearchState
from streamt1_jax.steering import Start

FORMAT_VERSION = 1
SESSION_FILE, CHUNKS_FILE = "session.json", "chunks.npz"


class Progress(NamedTuple):
  """How far a session is.

  Attributes:
    config: what decides it.
    identity: of the model and its devices, as JSON values.
    segments: first chunk and prompt of every segment so far.
    script: first chunks and prompts that a timeline has left.
    num_given: chunks that the video began with.
    unshown_given: how many of these were not shown yet.
    waiting: chunks that were not shown yet: index, segment and trace.
    follow: the beam that all beams are to go on from, or None.
    queued: events that had not taken effect, in order of arrival: prompts, and None for a stop.
  """

  config: SessionConfig
  identity: dict[str, Any]
  segments: list[tuple[int, str]]
  script: list[tuple[int, str]]
  num_given: int
  unshown_given: int
  waiting: list[tuple[int, int, ChunkTrace]]
  follow: int | None
  queued: list[str | None]


class Saved(NamedTuple):
  """A session that was read: its state, how far it is, and what it began with."""

  state: SearchState
  progress: Progress
  start: Start
  given: Given | None


def save(folder: epath.PathLike, state: SearchState, progress: Progress, start: Start, given: Given | None) -> None:
  """Writes a session, in the place of an earlier one; if it fails, the earlier one stays.

  Raises ConfigError if the folder holds something else or cannot be written, or for a session of several processes.
  """
  if jax.process_count() > 1:
    raise ConfigError(f"cannot save {folder}: a session of several processes is not saved")
  document = {
    "format_version": FORMAT_VERSION,
    "identity": progress.identity,
    "config": config_json.to_json_value(progress.config),
    "segments": _to_json(progress.segments),
    "script": _to_json(progress.script),
    "num_given": progress.num_given,
    "unshown_given": progress.unshown_given,
    "waiting": [{"index": index, "segment": segment} for index, segment, _ in progress.waiting],
    "follow": progress.follow,
    "queued": progress.queued,
  }
  arrays: dict[str, Any] = {
    f"waiting/{number}/{name}": np.asarray(leaf)
    for number, (_, _, trace) in enumerate(progress.waiting)
    for name, leaf in named(trace).items()
  }
  if given is not None:
    arrays |= {f"given/{index}": frames for index, frames in enumerate(given.frames)} | {"latents": given.latents}
  if start.image is not None:
    arrays["image"] = np.asarray(start.image)
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  text = json.dumps(document, indent=2, allow_nan=False) + "\n"
  files = {SESSION_FILE: text.encode(), CHUNKS_FILE: buffer.getvalue()}
  checkpoint.save_params(epath.Path(folder), checkpoint.nested(named(state)), files=files)


def read_progress(folder: epath.PathLike, identity: Mapping[str, Any], search: SearchConfig | None) -> Progress:
  """What a saved session is, without its arrays: `waiting` is empty.

  Args:
    folder: as `save` wrote it.
    identity: of the model that is to go on with it.
    search: needed for a search with a policy, which no file can describe; it must be the one that was saved.

  Raises:
    ConfigError: the folder holds no session or a damaged one, or the model or the search is another one.
  """
  path, document = _document(folder)
  part_files.verify_files(path.parent)
  try:
    config = dict(document["config"])
    # A policy of any class; only the program that made it can say which.
    policy = dict(config["search"]).pop("policy", None)
    if search is not None and config_json.to_json_value(search) != config["search"]:
      raise ConfigError(f"{path}: the session has another search than the one given")
    if search is None and policy is not None:
      raise ConfigError(f"{path}: its search has a policy, which no file holds; give the search")
    config["search"] = {name: value for name, value in config["search"].items() if name != "policy"}
    parsed = config_json.from_json_value(SessionConfig, config, f"{path}: config")
    parsed = parsed if search is None else dataclasses.replace(parsed, search=search)
    segments, script = (_from_json(document[name]) for name in ("segments", "script"))
    num_given, unshown = int(document["num_given"]), int(document["unshown_given"])
    stored, follow = dict(document["identity"]), document["follow"]
    # The first saves had none.
    queued = [None if prompt is None else str(prompt) for prompt in document.get("queued", [])]
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ConfigError(f"{path} is corrupt: {type(error).__name__} {error}") from error
  for name, value in identity.items():
    if stored.get(name) != value:
      raise ConfigError(f"{path}: the session was made with {name} {shortened(stored.get(name))}, not {value}")
  return Progress(parsed, stored, segments, script, num_given, unshown, [], follow, queued)


def read(folder: epath.PathLike, progress: Progress, abstract_state: SearchState) -> Saved:
  """The arrays of a saved session.

  Args:
    folder: as `save` wrote it.
    progress: from `read_progress`.
    abstract_state: shapes, dtypes and shardings of its state.

  Raises:
    ConfigError: the files are damaged, or are of another model.
  """
  path, document = _document(folder)
  names = named(abstract_state)
  loaded = checkpoint.load_arrays(path.parent, names)
  state = jax.tree.unflatten(jax.tree.structure(abstract_state), [loaded[name] for name in names])
  with np.load(io.BytesIO((path.parent / CHUNKS_FILE).read_bytes()), allow_pickle=False) as arrays:
    waiting = [
      (entry["index"], entry["segment"], _rebuilt(arrays, f"waiting/{number}/"))
      for number, entry in enumerate(document["waiting"])
    ]
    given = None
    if "latents" in arrays:
      given = Given(arrays["latents"], [arrays[f"given/{index}"] for index in range(progress.num_given)])
    start = Start(None if given is None else given.latents, arrays.get("image"))
  return Saved(state, progress._replace(waiting=waiting), start, given)


def _to_json(prompts: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
  return [{"begin": begin, "prompt": prompt} for begin, prompt in prompts]


def _from_json(entries: Any) -> list[tuple[int, str]]:
  return [(int(entry["begin"]), str(entry["prompt"])) for entry in entries]


def _document(folder: epath.PathLike) -> tuple[epath.Path, dict[str, Any]]:
  source = epath.Path(folder)
  document = part_files.read_json_object(source, SESSION_FILE, "a saved session")
  part_files.require_version(document, source / SESSION_FILE, FORMAT_VERSION)
  return source / SESSION_FILE, document


def _rebuilt(arrays: Mapping[str, np.ndarray], prefix: str) -> ChunkTrace:
  return rebuilt(ChunkTrace, {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)})
