"""What a live session leaves: files that grow while it runs, and a result folder whenever somebody saves.

  video.mp4, trace.json, latents.safetensors, pictures.zip, manifest.json, report.html    as of `streamt1 generate`
  timeline.json, replay.flags    streamt1 generate --flagfile=FOLDER/replay.flags makes the same video again
  start.png                      the picture that the video began with, if it did
  session/                       `Pipeline.resume` goes on from it; not where several processes make one session

Nothing is kept in memory: a session may run for as long as there is room on the disk. A save is of what had grown when
it was asked for, and more is added while it is written.
"""

from __future__ import annotations

import array
import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from streamt1_jax.cli import growing_result, results
from streamt1_jax.config import ConfigError, SessionConfig
from streamt1_jax.cost import Cost
from streamt1_jax.io import config_json, growing_video, manifest, part_files, video
from streamt1_jax.io.timeline import Timeline
from streamt1_jax.measuring import search_flop
from streamt1_jax.measuring.ledger import Ledger
from streamt1_jax.messages import one_line
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.report import write
from streamt1_jax.report.pictures import StripFile
from streamt1_jax.serve.studio import LiveSession, Saved, Shown
from streamt1_jax.state import Condition
from streamt1_jax.trace import describe_step, describe_video

TIMELINE, REPLAY, START, SESSION = "timeline.json", "replay.flags", "start.png", "session"
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Noted:
  """What a save is of.

  Attributes:
    chunks: that were shown.
    frames: in them.
    latent_shape: of one chunk.
    sizes: bytes of each file that grows.
    sha256: of latents and of frames.
    steps: beam, candidate and seed of every chunk that was made.
    ledger: what they cost; None before the first.
    searching: seconds that making them took.
    condition: of the prompt in force.
    config: of the session.
    num_given: chunks that it began with.
    segments: first chunk and prompt of each.
    timeline: what happened.
    write_session: writes what the session goes on from; None where several processes make it.
  """

  chunks: int
  frames: int
  latent_shape: tuple[int, ...]
  sizes: Mapping[str, int]
  sha256: Mapping[str, str]
  steps: array.array[int]
  ledger: Ledger | None
  searching: float
  condition: Condition
  config: SessionConfig
  num_given: int
  segments: list[tuple[int, str]]
  timeline: Timeline
  write_session: Callable[[epath.PathLike], None] | None


class _Beginning(io.FileIO):
  """The first bytes of a file that grows, read as if there were no others."""

  def __init__(self, path: pathlib.Path, size: int):
    super().__init__(path)
    self._size = size

  def readinto(self, buffer: Any) -> int | None:
    return super().readinto(memoryview(buffer)[: max(0, self._size - self.tell())])

  def readall(self) -> bytes:
    return self.read(max(0, self._size - self.tell())) or b""

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return super().seek(self._size + offset) if whence == os.SEEK_END else super().seek(offset, whence)


def write_report(folder: epath.Path) -> str | None:
  """Writes the page of a save. Returns why it has no page, or None.

  As in `streamt1 generate`, what was made is not lost if its page cannot be written.
  """
  try:
    write.write_beside(folder)
  except Exception as error:
    _LOGGER.warning(f"there is no {results.REPORT}: {part_files.first_line(error)}")
    # The folder has another name until all is written.
    return one_line(str(error).replace(f"{folder}{os.sep}", ""))
  return None


class LiveResult:
  """Keeps one session: see `serve.studio.Keeper`."""

  def __init__(
    self,
    output_dir: epath.PathLike,
    pipeline: Pipeline,
    *,
    method: str,
    flags: Sequence[str],
    rewards: Mapping[str, Any],
    session: SessionConfig,
    prompt: str,
    picture: UInt8[np.ndarray, "height width 3"] | None = None,
  ):
    """Makes a hidden folder for what grows.

    Args:
      output_dir: where a result folder is made, on this machine.
      pipeline: the model.
      method: name of the search.
      flags: what tells `streamt1 generate` to search so, with this model.
      rewards: what judges, as JSON values.
      session: how it is searched.
      prompt: the first.
      picture: that the video begins with, uint8 `[height, width, 3]`, or None.
    """
    self._pipeline, self._method, self._flags, self._picture = pipeline, method, tuple(flags), picture
    self._rewards, self._session, self._searching = dict(rewards), session, 0.0
    self._ledger: Ledger | None = None
    # Two sessions may begin with one prompt.
    self._target = results.result_folder(output_dir, prompt, repr(time.time_ns()))
    self._target.parent.mkdir(parents=True, exist_ok=True)
    self._stack = contextlib.ExitStack()
    # Where the result will be: the system's own folder for such files may lie in memory.
    grown = tempfile.TemporaryDirectory(prefix=".live_", dir=self._target.parent)
    self._grown = pathlib.Path(self._stack.enter_context(grown))
    names = ("video", "latents", "rows", "strips")
    self._files = {name: self._stack.enter_context((self._grown / name).open("wb")) for name in names}
    self._sha256 = {"latents": hashlib.sha256(), "frames": hashlib.sha256()}
    self._steps = array.array("q")
    self._chunks = self._frames = 0
    self._latent_shape: tuple[int, ...] = ()

  def add(self, shown: Shown) -> None:
    """The next chunk."""
    chunk = shown.chunk
    latents, frames = np.ascontiguousarray(chunk.latents), np.ascontiguousarray(chunk.frames)
    if not self._chunks:
      self._files["video"].write(shown.fragment.init)
      self._latent_shape = latents.shape
    self._files["video"].write(shown.fragment.media)
    self._files["latents"].write(latents.data)
    self._sha256["latents"].update(latents.data)
    self._sha256["frames"].update(frames.data)
    self._chunks += 1
    self._frames += len(frames)
    self._searching += shown.searching
    if shown.row is None or chunk.beam is None or chunk.trace is None:
      return
    if self._ledger is None:
      self._ledger = self._new_ledger(given=chunk.index)
    row = shown.row | {"cost": self._ledger.add(chunk.trace)._asdict()}
    self._files["rows"].write(manifest.to_json_line(row).encode() + b"\n")
    strips = {number: base64.b64encode(strip).decode() for number, strip in shown.strips.items()}
    self._files["strips"].write(json.dumps([chunk.index, strips]).encode() + b"\n")
    candidate = shown.row["survivors"][chunk.beam]
    seeds = {entry["candidate"]: entry["seed"] for entry in shown.row["candidates"]}
    self._steps.extend((chunk.beam, candidate, seeds[candidate]))

  def prepare_save(self, session: LiveSession) -> Callable[[], Saved]:
    """Notes what there is. What it returns writes the result folder, in the place of an earlier one of this session.

    It raises as `results.staged_folder`. Raises ConfigError before the first chunk.
    """
    if not self._chunks:
      raise ConfigError("no chunk was shown yet")
    for file in self._files.values():
      file.flush()
    noted = _Noted(
      chunks=self._chunks,
      frames=self._frames,
      latent_shape=self._latent_shape,
      sizes={name: file.tell() for name, file in self._files.items()},
      sha256={name: digest.hexdigest() for name, digest in self._sha256.items()},
      steps=self._steps[:],
      ledger=None if self._ledger is None else self._ledger.copy(),
      searching=self._searching,
      condition=session.condition,
      config=session.config,
      num_given=session.num_given,
      segments=[(begin, prompt) for begin, prompt in session.segments if begin < self._chunks],
      timeline=session.timeline.until(self._pipeline.clock.seconds(self._chunks)),
      write_session=session.prepare_save() if jax.process_count() == 1 else None,
    )
    return lambda: self._save(noted)

  def _save(self, noted: _Noted) -> Saved:
    with results.staged_folder(self._target, keep_on=lambda error: False) as folder:
      self._write(folder, noted)
      return Saved(str(self._target), write_report(folder))

  def close(self) -> None:
    """What grew is removed; what was saved stays."""
    # A file that cannot be closed, on a disk that is full, does not keep the others.
    self._stack.close()

  def _grown_file(self, noted: _Noted, name: str) -> io.BufferedReader:
    return io.BufferedReader(_Beginning(self._grown / name, noted.sizes[name]))

  def _write(self, folder: epath.Path, noted: _Noted) -> None:
    clock = self._pipeline.clock
    with self._grown_file(noted, "video") as fragments:
      growing_video.join(fragments, pathlib.Path(folder / results.VIDEO))
    self._write_latents(folder / results.LATENTS, noted)
    self._write_trace(folder / results.TRACE, noted)
    with StripFile(folder / results.PICTURES) as strips, self._grown_file(noted, "strips") as lines:
      for line in lines:
        chunk, kept = json.loads(line)
        strips.add(chunk, {int(number): base64.b64decode(strip) for number, strip in kept.items()})
    if self._picture is not None:
      video.write_png(folder / START, self._picture)
    noted.timeline.save(folder / TIMELINE)
    (folder / REPLAY).write_text("".join(f"{flag}\n" for flag in self._replay(noted)))
    if noted.write_session is not None:
      noted.write_session(folder / SESSION)
    document = {
      "settings": self._settings(noted),
      "method": self._method,
      "environment": manifest.environment(),
      "length": {
        "chunks": noted.chunks,
        "latent_frames": noted.chunks * noted.latent_shape[0],
        "frames": noted.frames,
        "fps": clock.fps,
        "seconds": noted.frames / clock.fps,
      },
      "sha256": dict(noted.sha256),
      "seeds": {"base": noted.config.seed, "winner": list(noted.steps[2::3])},
      "segments": results.describe_segments(noted.segments, noted.frames, clock),
      "cost": self._cost(noted),
      "wall_seconds": {"search": noted.searching},
      "given_chunks": noted.num_given,
      "files": part_files.describe_files(folder),
    }
    manifest.write_json(folder / results.MANIFEST, document)

  def _write_latents(self, path: epath.Path, noted: _Noted) -> None:
    shape = [noted.chunks * noted.latent_shape[0], *noted.latent_shape[1:]]
    with open(path, "wb") as target, self._grown_file(noted, "latents") as source:
      target.write(results.latents_header(shape, self._pipeline.model_sha256))
      shutil.copyfileobj(source, target)

  def _write_trace(self, path: epath.Path, noted: _Noted) -> None:
    search = noted.config.search
    head = self._rewards | describe_video(search, noted.num_given, noted.segments, self._method) | {"tries": []}
    # Nothing has judged the whole video.
    final = {"scores": [None] * search.top_k, "best": noted.steps[-3] if noted.steps else 0}
    steps = zip(noted.steps[0::3], noted.steps[1::3], strict=True)
    lineage = (describe_step(index, *step) for index, step in enumerate(steps, noted.num_given))
    with self._grown_file(noted, "rows") as rows, open(path, "w") as file:
      lines = (row.decode().rstrip("\n") for row in rows)
      file.writelines(growing_result.trace_document(head, lines, final, lineage))

  def _new_ledger(self, given: int) -> Ledger:
    pipeline, session = self._pipeline, self._session
    options = {"capacity": session.capacity(given), "length": session.length(given), "given_chunks": given}
    short_frames = pipeline.rewards.choice.short_frames
    return Ledger(pipeline.models, pipeline.config, session.search, short_frames=short_frames, **options)

  def _cost(self, noted: _Noted) -> dict[str, Any] | None:
    if noted.ledger is None:
      return None
    # Nothing has judged the whole video.
    return noted.ledger.describe(search_flop.prices(self._pipeline, noted.condition), Cost(), noted.searching)

  def _settings(self, noted: _Noted) -> dict[str, Any]:
    search = noted.config.search
    return {
      "prompt": noted.segments[0][1],
      "seed": noted.config.seed,
      "num_latent_frames": (noted.chunks - noted.num_given) * noted.latent_shape[0],
      "checkpoint_sha256": self._pipeline.sha256,
      **{name: value for name, value in config_json.to_json_value(search).items() if name != "policy"},
      "sink_distance": search.sink_distance,
      "horizon": noted.config.horizon,
    }

  def _replay(self, noted: _Noted) -> Iterator[str]:
    """Flags of `streamt1 generate` that make the video again."""
    yield from self._flags
    yield f"--timeline={self._target / TIMELINE}"
    yield f"--num_latent_frames={(noted.chunks - noted.num_given) * noted.latent_shape[0]}"
    yield f"--horizon={noted.config.horizon}"
    yield f"--sink_distance={noted.config.search.sink_distance}"
    if self._picture is not None:
      yield f"--image={self._target / START}"
    yield f"--output_dir={self._target / 'replay'}"
