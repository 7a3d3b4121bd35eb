"""The files of one result, which grow while the chunks of its video come: nothing is kept in memory for the end.

  .video.mp4.partial    fragments, which a player shows already; video.mp4 at the end
  latents.safetensors   its length is known before the first chunk
  trace.rows            a JSON line per chunk that was made; trace.json at the end
  contact_sheet.png     at the end
  pictures.zip          three small frames of every candidate, if the report is wanted

A search that goes on after a stop makes them anew, from the chunks that were saved.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from streamt1_jax.cli import results
from streamt1_jax.config import SearchConfig
from streamt1_jax.finishing import FinalChunk, Scored
from streamt1_jax.io import manifest, part_files, paths, video
from streamt1_jax.io.growing_video import GrowingVideo
from streamt1_jax.measuring.ledger import Ledger
from streamt1_jax.methods.tries import describe_tries
from streamt1_jax.pipeline import display_scale
from streamt1_jax.report.pictures import StripFile, strips_of
from streamt1_jax.state import ChunkTrace
from streamt1_jax.trace import describe_chunk, describe_scores, describe_step

ROWS = "trace.rows"


class GrowingResult:
  """Takes traces and final chunks. Use it as a context."""

  def __init__(
    self,
    folder: epath.Path,
    search: SearchConfig,
    ledger: Ledger,
    *,
    fps: int,
    height: int,
    num_frames: int,
    num_latent_frames: int,
    given_chunks: int,
    model_sha256: str,
    pictures: bool = False,
  ):
    """Writes nothing yet.

    Args:
      folder: empty; on an object store, where no file grows, files come when they are finished.
      search: how the video is searched.
      ledger: counts what its chunks cost.
      fps: frames per second.
      height: rows of a frame.
      num_frames: of the whole video.
      num_latent_frames: of the whole video.
      given_chunks: chunks that it begins with and that are not made.
      model_sha256: identifies the model that makes the latents.
      pictures: whether small frames of candidates are kept, for the report.
    """
    self._target, self._search, self._fps, self._scale = folder, search, fps, display_scale(height)
    self.ledger = ledger
    self._num_frames, self._num_latent_frames, self._given_chunks = num_frames, num_latent_frames, given_chunks
    self._model_sha256 = model_sha256
    self._folder = pathlib.Path(folder)
    self._all = contextlib.ExitStack()
    # Files that grow; they are closed together.
    self._growing = contextlib.ExitStack()
    self._begun = False
    self._keeps_pictures, self._strips = pictures, None
    self._latents_sha256, self._frames_sha256 = hashlib.sha256(), hashlib.sha256()
    self._picked, self._pictures = video.sheet_indices(num_frames), []
    self._seen_frames = self._made = 0
    # Beam, candidate and seed of every chunk that was made and is final. A video may run for days.
    self._steps = array.array("q")

  def __enter__(self) -> GrowingResult:
    if paths.is_object_store(self._target):
      self._folder = pathlib.Path(self._all.enter_context(tempfile.TemporaryDirectory()))
    self._all.enter_context(self._growing)
    grown = GrowingVideo(self._folder / results.VIDEO, self._fps, scale=self._scale)
    self._video = self._growing.enter_context(grown)
    self._latents = self._growing.enter_context(open(self._folder / results.LATENTS, "wb"))
    if self._keeps_pictures:
      self._strips = self._growing.enter_context(StripFile(self._folder / results.PICTURES))
    # Buffered by lines: a reader sees whole ones.
    self._rows = self._growing.enter_context(open(self._folder / ROWS, "w", buffering=1))
    return self

  def __exit__(self, *exception) -> None:
    self._all.__exit__(*exception)

  def add_trace(self, trace: ChunkTrace) -> None:
    """The next chunk that was made."""
    row = describe_chunk(self._given_chunks + self._made, trace, self._search, self.ledger.add(trace))
    self._rows.write(manifest.to_json_line(row) + "\n")
    if self._strips is not None:
      self._strips.add(row["chunk"], strips_of(trace, row))
    self._made += 1

  def add(self, chunk: FinalChunk) -> None:
    """The next chunk of the video, given or made."""
    latents, frames = np.ascontiguousarray(chunk.latents), np.ascontiguousarray(chunk.frames)
    if not self._begun:
      self._begun = True
      shape = [self._num_latent_frames, *latents.shape[1:]]
      self._latents.write(results.latents_header(shape, self._model_sha256))
    self._latents.write(latents.data)
    self._latents_sha256.update(latents.data)
    self._frames_sha256.update(frames.data)
    wanted = self._picked - self._seen_frames
    self._pictures += [frames[index].copy() for index in wanted if 0 <= index < len(frames)]
    self._seen_frames += len(frames)
    self._video.add(frames)
    if chunk.choice is not None:
      self._steps.extend(chunk.choice)

  def finish(self, head: dict[str, Any], scored: Scored, seed: int) -> dict[str, Any]:
    """Completes the files. Returns what the manifest says of the video: length, score, checksums, seeds and files.

    Args:
      head: fields of trace.json that come first.
      scored: the finished videos.
      seed: the base seed.
    """
    assert self._seen_frames == self._num_frames
    self._growing.close()
    steps = zip(self._steps[0::3], self._steps[1::3], strict=True)
    lineage = (describe_step(index, *step) for index, step in enumerate(steps, self._given_chunks))
    self._write_trace(head, describe_scores(scored.scores, scored.best), lineage)
    sheet = video.sheet_of(np.stack(self._pictures), self._picked, self._fps, scale=self._scale)
    video.write_png(self._folder / results.CONTACT_SHEET, sheet)
    self._publish()
    return {
      "length": {
        "chunks": self._given_chunks + self._made,
        "latent_frames": self._num_latent_frames,
        "frames": self._seen_frames,
        "fps": self._fps,
        "seconds": self._seen_frames / self._fps,
      },
      "score": float(scored.scores[scored.best]),
      "sha256": {"latents": self._latents_sha256.hexdigest(), "frames": self._frames_sha256.hexdigest()},
      "seeds": {"base": seed, "winner": list(self._steps[2::3])},
      "files": part_files.describe_files(epath.Path(self._target)),
    }

  def fail(self, head: dict[str, Any], error: Exception) -> int:
    """Leaves trace.json of the chunks so far alone. Returns how many were made."""
    with contextlib.suppress(type(error)), self._growing:
      raise error
    (self._folder / results.LATENTS).unlink(missing_ok=True)
    self._write_trace(head, None, ())
    self._publish()
    return self._made

  def _write_trace(self, head: dict[str, Any], final: dict[str, Any] | None, lineage: Iterable[dict[str, Any]]) -> None:
    partial = self._folder / f".{results.TRACE}.partial"
    with open(self._folder / ROWS) as rows, open(partial, "w") as file:
      head = head | {"tries": describe_tries(self.ledger.tries)}
      file.writelines(trace_document(head, (row.rstrip("\n") for row in rows), final, lineage))
    partial.replace(self._folder / results.TRACE)
    (self._folder / ROWS).unlink()

  def _publish(self) -> None:
    """Copies the files to where they belong, if they did not grow there."""
    if paths.is_object_store(self._target):
      for path in sorted(self._folder.iterdir()):
        epath.Path(path).copy(epath.Path(self._target) / path.name, overwrite=True)


def trace_document(
  head: dict[str, Any], chunks: Iterable[str], final: dict[str, Any] | None, lineage: Iterable[dict[str, Any]]
) -> Iterator[str]:
  """The text of trace.json, piece by piece: a line for every field, chunk, and step of the lineage.

  Args:
    head: fields that come first.
    chunks: a JSON line for every chunk that was made.
    final: fields of the finished videos; None without finished videos.
    lineage: of the video that is shown.
  """
  yield "{\n"
  for name, value in head.items():
    yield f"  {json.dumps(name)}: {manifest.to_json_line(value)},\n"
  yield '  "chunks": ['
  yield from _items(chunks)
  if final is None:
    yield '],\n  "final": null\n}\n'
    return
  yield '],\n  "final": {\n'
  for name, value in final.items():
    yield f"    {json.dumps(name)}: {manifest.to_json_line(value)},\n"
  yield '    "lineage": ['
  yield from _items(map(manifest.to_json_line, lineage))
  yield "]\n  }\n}\n"


def _items(lines: Iterable[str]) -> Iterator[str]:
  empty = True
  for line in lines:
    yield f"{'' if empty else ','}\n    {line}"
    empty = False
  yield "" if empty else "\n  "
