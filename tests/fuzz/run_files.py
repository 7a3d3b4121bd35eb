"""What runs read beside weights: videos, prompts, results, rows of scores and comparisons, and saved searches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from etils import epath

from streamt1_jax import drivers
from streamt1_jax.cli import results, score, score_inputs, score_rows, stopped_searches
from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.compare import pool, report, summary
from streamt1_jax.io import manifest, part_files, rows, video
from streamt1_jax.saved_search import SavedSearch
from streamt1_jax.text import prompts
from tests import compared_rows, videos
from tests import small_search as small
from tests.fuzz import changes
from tests.fuzz.changes import Rng, pick
from tests.fuzz.kinds import Kind

# Places in containers where sizes, counts, times and rates are.
_MARKS = (
  *(
    b"stsz",
    b"stts",
    b"stsc",
    b"stco",
    b"ctts",
    b"elst",
    b"tkhd",
    b"mdhd",
    b"mvhd",
    b"stsd",
    b"trak",
    b"moov",
    b"ftyp",
  ),
  *(b"avih", b"strh", b"strf", b"idx1", b"movi", b"LIST", b"onMetaData", b"framerate", b"duration"),
  *(bytes.fromhex(name) for name in ("23e383", "2ad7b1", "1549a966", "1654ae6b", "1f43b675", "b0", "ba", "e7", "a3")),
)
_TEXTS = (
  "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
  "ffconcat version 1.0\nfile 0.mp4\n",
  "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/0.ts\n#EXT-X-ENDLIST\n",
  "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
)


@functools.cache
def _videos() -> tuple[bytes, ...]:
  made = [("mp4", "mpeg4"), ("mp4", "libx264"), ("mov", "mjpeg"), ("avi", "mpeg4"), ("matroska", "libx264")]
  made += [("webm", "libvpx-vp9"), ("flv", "flv1"), ("mpegts", "mpeg2video"), ("asf", "wmv2"), ("nut", "ffv1")]
  encoded = [
    videos.encode(
      format, codec, rate=25 if format == "mpegts" else 16, title=b"" if format in ("mpegts", "webm") else b"caf\xe9"
    )
    for format, codec in made
    if codec != "mjpeg"
  ]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "written.mp4"
    video.write_video(path, np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8), 16)
    encoded.append(path.read_bytes())
  return (*encoded, videos.pictures([(32, 48)] * 3), *(text.encode() for text in _TEXTS))


def _changed_video(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  """Bytes changed anywhere, or near a mark of the container."""
  content, path = pick(rng, _videos()), folder / "clip.mp4"
  marks = [mark for mark in _MARKS if mark in content]
  if marks and rng.integers(2):
    at = content.index(pick(rng, marks))
    content = changes.of_bytes(rng, content, 4, at, at + 48)
  path.write_bytes(changes.of_bytes(rng, content, 6) if rng.integers(2) else content)
  return path


@dataclasses.dataclass(frozen=True)
class _Mean:
  """A scorer that needs every frame, and compiles nothing."""

  columns = ("mean",)
  reads_prompt = False

  def look_at(self, num_frames: int, fps: float) -> np.ndarray:
    assert 0 < fps < float("inf")
    return np.arange(num_frames)

  def __call__(self, prompt: str | None, frames: np.ndarray) -> dict[str, float]:
    assert frames.dtype == np.uint8
    return {"mean": float(frames.mean())}


def _read_video(path: pathlib.Path) -> None:
  task = score_inputs.Task(epath.Path(path), None)
  with contextlib.redirect_stderr(io.StringIO()) as printed:
    row = score.score_video(task, score.start_row(task), [_Mean()])
  assert not printed.getvalue()
  score_rows.to_table([row], ["mean"])
  if row.error is not None:
    raise ConfigError(row.error)
  assert set(row.scores) == {"mean"}


def _changed_prompts(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  names = [f"{index}.mp4" for index in range(3)]
  texts = ["a red circle moves left", "un café rouge", "红色的圆"]
  lines = pick(
    rng,
    (
      texts,
      [f"{name}\t{text}" for name, text in zip(names, texts)],
      [json.dumps({"video": name, "prompt": text}) for name, text in zip(names, texts)],
      [changes.of_json(rng, {"video": name, "prompt": text}) for name, text in zip(names, texts)],
    ),
  )
  content = "\n".join(lines).encode(pick(rng, ("utf-8", "utf-8", "utf-16", "utf-8-sig", "utf-7")), "replace")
  (folder / "prompts.txt").write_bytes(changes.of_bytes(rng, content) if rng.integers(2) else content)
  return folder / "prompts.txt"


def _read_prompts(path: pathlib.Path) -> None:
  for prompt in prompts.load_prompts(path):
    assert prompt.isprintable() or "\t" in prompt or not prompt.isascii()
  score_inputs.with_given_prompts([epath.Path(f"{index}.mp4") for index in range(3)], str(path))


_SETTINGS = {"prompts": ["a red circle"], "seed": 3, "beam_size": 2, "mesh": None, "sigma": 0.5}


def _changed_result(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  """The folder of a result, and beside it what is left of a stopped search."""
  result = folder / "a"
  result.mkdir()
  for name in (results.VIDEO, results.TRACE):
    (result / name).write_text(name)
  document = {
    "settings": {"prompt": "a red circle", **_SETTINGS},
    "files": part_files.describe_files(epath.Path(result)),
  }
  (result / results.MANIFEST).write_text(changes.of_json(rng, document), errors="replace")
  stopped = stopped_searches.saved_folder(epath.Path(result))
  manifest.write_json(stopped / "search.json", {"format_version": 1, "settings": _SETTINGS, "resumed_at": [1]})
  path = pathlib.Path(stopped / "search.json")
  path.write_text(changes.of_json(rng, json.loads(path.read_text())), errors="replace")
  return result


def _read_result(path: pathlib.Path) -> None:
  folder, wanted = epath.Path(path), {"prompt": "a red circle", **_SETTINGS}
  (task,) = score_inputs.with_own_prompts([folder / results.VIDEO])
  assert task.prompt is None or isinstance(task.prompt, str)
  stopped_searches.discard_finished([folder], [])
  refused = None
  try:
    results.is_finished(folder, wanted, overwrite=False)
  except ConfigError as error:
    refused = error
  folders = {"a red circle": folder}
  groups = stopped_searches.group_prompts(folders, [], 1, lambda prompts: {**_SETTINGS, "prompts": list(prompts)},
                                          overwrite=False)  # fmt: skip
  assert groups == [["a red circle"]]
  if refused:
    raise refused


_ROW = score_rows.Row("a.mp4", "a red circle", 9, 1, 3, 16.0, 32, 48, {"quality": 1.0, "quality_frames": [1.0, 2.0]})


def _changed_rows(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  output = score_rows.Output(epath.Path(folder / "scores.csv"))
  made = [dataclasses.asdict(_ROW), dataclasses.asdict(_ROW) | {"video": "b.mp4", "error": "is empty", "scores": {}}]
  if rng.integers(2):
    text = changes.of_json(rng, {"settings": _SETTINGS, "rows": made})
    output.json.write_bytes(text.encode(errors="replace"))
  else:
    lines = [json.dumps(row) for row in ({"settings": _SETTINGS}, *made)]
    changed = rng.integers(3)
    lines[changed] = changes.of_json(rng, json.loads(lines[changed]))
    text = "\n".join([*lines, ""])
    output.partial.write_bytes(text.encode(errors="replace"))
  return folder / "scores.csv"


def _read_rows(path: pathlib.Path) -> None:
  found = list(score_rows.Output(epath.Path(path)).earlier_rows(_SETTINGS).values())
  columns = ["quality", "quality_frames"]
  score_rows.to_csv(found, columns)
  assert all(line.isprintable() for line in score_rows.to_table(found, columns).splitlines())


def _changed_comparison(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  path = folder / pool.VIDEOS
  lines = [json.dumps(row) for row in ({"settings": _SETTINGS}, *compared_rows.rows())]
  changed = rng.integers(len(lines))
  lines[changed] = changes.of_json(rng, json.loads(lines[changed]), 1)
  path.write_bytes("\n".join([*lines, ""]).encode(errors="replace"))
  return path


def _read_comparison(path: pathlib.Path) -> None:
  found = rows.read(epath.Path(path), _SETTINGS, is_row=pool.is_row)
  results = compared_rows.results(found)
  # A row that says another video's name is missed by the run that goes on, and made again.
  if all(key in results.rows for key, _, _ in pool.wanted(results.plan, compared_rows.ENTRIES)):
    told = summary.summarise(results, compared_rows.ENTRIES, compared_rows.METRICS)
    manifest.to_json_line(told)
    report.markdown_of(compared_rows.PLAN, told)


_CHUNKS, _SAVED = 5, (2, 4)


@functools.cache
def _saved() -> tuple[pathlib.Path, dict[int, Any], list[Any], Any]:
  """The folder of a saved search, its states by number of chunks, all chunks, and what a state looks like."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_saves")) / "saves"
  given = (small.params(), small.condition(_CHUNKS), small.models())
  traces, states = [], {}
  with SavedSearch(folder, _SETTINGS) as saved:
    for state, trace in drivers.stream_states(*given, small.SEARCH, num_chunks=_CHUNKS, seed=3):
      traces.append(jax.device_get(trace))
      if len(traces) in _SAVED:
        states[len(traces)] = jax.device_get(state)
        saved.save(state, [traces[saved.begun :]])
  abstract = drivers.abstract_state(small.params(), small.models(), small.SEARCH, 3, num_chunks=_CHUNKS)
  return folder, states, traces, abstract


def _changed_saves(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  """Some file or folder changed, deleted, cut off, or put in the place of another."""
  place = folder / ".a.saved"
  shutil.copytree(_saved()[0], place)
  for _ in range(rng.integers(1, 3)):
    files = sorted(path for path in place.rglob("*") if path.is_file())
    # The description and its like are few among many files.
    path = pick(rng, files if rng.integers(2) else [path for path in files if path.suffix == ".json"] or files)
    match rng.integers(8):
      case 0:
        path.unlink()
      case 1:
        pick(rng, files).write_bytes(path.read_bytes())
      case 2:
        found = pick(rng, sorted(place.iterdir()))
        found.rename(place / pick(rng, ("²", "000009", "0000002", "000002.tmp", "x" * 200, "000001", "00000\n3")))
      case 3 if path.suffix == ".json" and (document := _json_of(path)) is not None:
        path.write_text(changes.of_json(rng, document), errors="replace")
      case _:
        path.write_bytes(changes.of_bytes(rng, path.read_bytes()))
    if not any(path.is_file() for path in place.rglob("*")):
      break
  return place


def _json_of(path: pathlib.Path) -> Any:
  """None if the file was changed before and is no JSON now."""
  try:
    return json.loads(path.read_bytes())
  except ValueError:
    return None


def _read_saves(path: pathlib.Path) -> None:
  """What is restored is what was saved, bit for bit, and whatever does not count is told in one line."""
  _, states, traces, abstract = _saved()
  there, told = sorted(entry.name for entry in path.iterdir()), []
  with SavedSearch(path, _SETTINGS) as saved:
    progress = saved.restore(abstract, told.append)
    found = [trace for (trace,) in saved.traces()]
  for line in told:
    assert line.isprintable(), repr(line)
  if progress is None:
    # Other names are nobody's saves, or one that was never finished, as 000002.tmp.
    assert told or not any(re.fullmatch("[0-9]{6}", name) for name in there), "saves were removed without a word"
    raise ConfigError("begins anew")
  state, chunks = progress
  assert len(found) == chunks
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[chunks])
  jax.tree.map(np.testing.assert_array_equal, found, traces[:chunks])


KINDS = {
  "video": Kind(_changed_video, _read_video),
  "prompts": Kind(_changed_prompts, _read_prompts),
  "result": Kind(_changed_result, _read_result),
  "rows": Kind(_changed_rows, _read_rows),
  "comparison": Kind(_changed_comparison, _read_comparison),
  "saves": Kind(_changed_saves, _read_saves),
}
