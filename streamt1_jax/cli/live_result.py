"""What a live session leaves: files that grow while it runs, and a result folder whenever somebody saves.

  video.mp4, trace.json, latents.safetensors, pictures.zip, manifest.json, report.html    as of `streamt1 generate`
  timeline.json, replay.flags    streamt1 generate --flagfile=FOLDER/replay.flags makes the same video again
  start.png                      the picture that the video began with, if it did
  session/                       `Pipeline.resume` goes on from it; not where several processes make one session

Nothing is kept in memory: a session may run for as long as there is room on the disk.
"""

from __future__ import annotations

import array
import base64
import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from streamt1_jax.cli import growing_result, results
from streamt1_jax.config import ConfigError
from streamt1_jax.io import config_json, growing_video, manifest, part_files, video
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.report import write
from streamt1_jax.report.pictures import StripFile
from streamt1_jax.serve.studio import LiveSession, Shown
from streamt1_jax.trace import describe_step, describe_video

TIMELINE, REPLAY, START, SESSION = "timeline.json", "replay.flags", "start.png", "session"
_LOGGER = logging.getLogger(__name__)


class LiveResult:
  """Keeps one session: see `serve.studio.Keeper`."""

  def __init__(
    self,
    output_dir: epath.PathLike,
    pipeline: Pipeline,
    *,
    method: str,
    flags: Sequence[str],
    prompt: str,
    picture: np.ndarray | None = None,
  ):
    """Makes a hidden folder for what grows.

    Args:
      output_dir: where a result folder is made, on this machine.
      pipeline: the model.
      method: name of the search.
      flags: what tells `streamt1 generate` to search so, with this model.
      prompt: the first.
      picture: that the video begins with, uint8 `[height, width, 3]`, or None.
    """
    self._pipeline, self._method, self._flags, self._picture = pipeline, method, tuple(flags), picture
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
    if shown.row is None or chunk.beam is None:
      return
    self._files["rows"].write(manifest.to_json_line(shown.row).encode() + b"\n")
    strips = {number: base64.b64encode(strip).decode() for number, strip in shown.strips.items()}
    self._files["strips"].write(json.dumps([chunk.index, strips]).encode() + b"\n")
    candidate = shown.row["survivors"][chunk.beam]
    seeds = {entry["candidate"]: entry["seed"] for entry in shown.row["candidates"]}
    self._steps.extend((chunk.beam, candidate, seeds[candidate]))

  def save(self, session: LiveSession) -> str:
    """Writes the result folder, in the place of an earlier one of this session. Returns its path."""
    if not self._chunks:
      raise ConfigError("no chunk was shown yet")
    for file in self._files.values():
      file.flush()
    with results.staged_folder(self._target, keep_on=lambda error: False) as folder:
      self._write(folder, session)
    return str(self._target)

  def close(self) -> None:
    """What grew is removed; what was saved stays."""
    # A file that cannot be closed, on a disk that is full, does not keep the others.
    self._stack.close()

  def _write(self, folder: epath.Path, session: LiveSession) -> None:
    grown, clock = self._grown, self._pipeline.clock
    growing_video.join(grown / "video", pathlib.Path(folder / results.VIDEO))
    segments = [(begin, prompt) for begin, prompt in session.segments if begin < self._chunks]
    self._write_latents(folder / results.LATENTS)
    self._write_trace(folder / results.TRACE, session, segments)
    with StripFile(folder / results.PICTURES) as strips, open(grown / "strips", "rb") as lines:
      for line in lines:
        chunk, kept = json.loads(line)
        strips.add(chunk, {int(number): base64.b64decode(strip) for number, strip in kept.items()})
    if self._picture is not None:
      video.write_png(folder / START, self._picture)
    session.timeline.until(clock.seconds(self._chunks)).save(folder / TIMELINE)
    (folder / REPLAY).write_text("".join(f"{flag}\n" for flag in self._replay(session)))
    if jax.process_count() == 1:
      session.save(folder / SESSION)
    document = {
      "settings": self._settings(session),
      "method": self._method,
      "environment": manifest.environment(),
      "length": {
        "chunks": self._chunks,
        "latent_frames": self._chunks * self._latent_shape[0],
        "frames": self._frames,
        "fps": clock.fps,
        "seconds": self._frames / clock.fps,
      },
      "sha256": {name: digest.hexdigest() for name, digest in self._sha256.items()},
      "seeds": {"base": session.config.seed, "winner": list(self._steps[2::3])},
      "segments": results.describe_segments(segments, self._frames, clock),
      "given_chunks": session.num_given,
      "files": part_files.describe_files(folder),
    }
    manifest.write_json(folder / results.MANIFEST, document)
    try:
      write.write_beside(folder)
    except Exception as error:
      # As of `streamt1 generate`: what was made is not lost over its page.
      _LOGGER.warning(f"there is no {results.REPORT}: {part_files.first_line(error)}")

  def _write_latents(self, path: epath.Path) -> None:
    shape = [self._chunks * self._latent_shape[0], *self._latent_shape[1:]]
    with open(path, "wb") as target, open(self._grown / "latents", "rb") as source:
      target.write(results.latents_header(shape, self._pipeline.model_sha256))
      shutil.copyfileobj(source, target)

  def _write_trace(self, path: epath.Path, session: LiveSession, segments: list[tuple[int, str]]) -> None:
    head = describe_video(session.config.search, session.num_given, segments, self._method)
    # Nothing has judged the whole video.
    final = {"scores": [None] * session.config.search.top_k, "best": self._steps[-3] if self._steps else 0}
    steps = zip(self._steps[0::3], self._steps[1::3], strict=True)
    lineage = (describe_step(index, *step) for index, step in enumerate(steps, session.num_given))
    with open(self._grown / "rows") as rows, open(path, "w") as file:
      file.writelines(growing_result.trace_document(head, (row.rstrip("\n") for row in rows), final, lineage))

  def _settings(self, session: LiveSession) -> dict[str, Any]:
    search = session.config.search
    return {
      "prompt": session.segments[0][1],
      "seed": session.config.seed,
      "num_latent_frames": (self._chunks - session.num_given) * self._latent_shape[0],
      "checkpoint_sha256": self._pipeline.sha256,
      **{name: value for name, value in config_json.to_json_value(search).items() if name != "policy"},
      "sink_distance": search.sink_distance,
      "horizon": session.config.horizon,
    }

  def _replay(self, session: LiveSession) -> Iterator[str]:
    """Flags of `streamt1 generate` that make the video again."""
    yield from self._flags
    yield f"--timeline={self._target / TIMELINE}"
    yield f"--num_latent_frames={(self._chunks - session.num_given) * self._latent_shape[0]}"
    yield f"--horizon={session.config.horizon}"
    yield f"--sink_distance={session.config.search.sink_distance}"
    if self._picture is not None:
      yield f"--image={self._target / START}"
    yield f"--output_dir={self._target / 'replay'}"
