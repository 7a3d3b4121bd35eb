"""What VBench and VBench-Long would miss in a folder of videos, most of it without a word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.vbench import export
from streamt1_jax.io import config_json, part_files, video

_NUMBERED = re.compile(r"-[0-9]\Z")
"""VBench-Long takes the last two characters off a name to find its prompt: a sample has one digit."""
_RESULTS = "*_full_info.json"


def findings(folder: epath.Path, expected: Sequence[str]) -> Iterator[str]:
  """Faults of the folder that the tools are given, a line each.

  Args:
    folder: of the videos.
    expected: names of the files that should be there.

  Raises ConfigError if the folder cannot be read.
  """
  try:
    present = {entry.name: entry for entry in folder.iterdir()}
  except OSError as error:
    raise ConfigError(f"{folder} cannot be read: {error.strerror or error}") from error
  yield from _of_names(present, expected)
  yield from _of_videos({name: path for name, path in present.items() if name in set(expected)})


def _of_names(present: Mapping[str, epath.Path], expected: Sequence[str]) -> Iterator[str]:
  missing = [name for name in expected if name not in present]
  if missing:
    yield f"{len(missing)} of {len(expected)} videos are missing: {part_files.list_some(missing)}"
  foreign = sorted(set(present) - set(expected))
  if "split_clip" in foreign:
    yield "split_clip is what an earlier run of VBench-Long left, which would read it again: export into a new folder"
    foreign.remove("split_clip")
  if foreign:
    yield f"{len(foreign)} entries are no video of this export: {part_files.list_some(foreign)}"
  for names in export.collisions(expected):
    if lost := [name for name in names if name not in present]:
      yield (
        f"names differ in the case of letters alone, and this disk may keep one: {part_files.list_some(names)}; "
        f"missing are {part_files.list_some(lost)}"
      )


def notes(folder: epath.Path, expected: Sequence[str]) -> Iterator[str]:
  """What is right in this folder and may go wrong elsewhere, a line each; arguments as of `findings`."""
  for names in export.collisions(expected):
    if all((folder / name).is_file() for name in names):
      yield f"names differ in the case of letters alone, and another disk may keep one: {part_files.list_some(names)}"


def _of_videos(videos: Mapping[str, epath.Path]) -> Iterator[str]:
  tools: dict[str, list[str]] = {}
  for name, path in videos.items():
    try:
      info = video.probe_video(path)
    except ConfigError as error:
      yield str(error)
      continue
    if info.fps != export.FPS:
      yield f"{name} has {info.fps:g} frames per second, not {export.FPS}"
    tools.setdefault(export.tool(info.num_frames), []).append(name)
  if len(tools) > 1:
    counts = " and ".join(f"{len(names)} to {tool} ({names[0]})" for tool, names in sorted(tools.items()))
    yield f"videos from {export.LONG_SECONDS} s on go to VBench-Long, shorter ones to VBench; here {counts}"
  long = tools.get("VBench-Long", [])
  for name in long:
    if "_" in name:
      yield f"{name}: VBench-Long ends a name at its first '_'"
  unnumbered = [name for name in long if not _NUMBERED.search(name.removesuffix(export.SUFFIX))]
  if unnumbered:
    yield (
      f"{len(unnumbered)} names do not end in '-' and a single digit, and VBench-Long passes over them: "
      f"{part_files.list_some(unnumbered)}"
    )


def findings_of_results(folder: epath.Path) -> Iterator[str]:
  """Prompts for which a tool found no video, as its `*_full_info.json` say. Both tools go on without a word.

  Raises ConfigError if there is no such file, or one is damaged.
  """
  files = sorted(folder.glob(_RESULTS))
  if not files:
    raise ConfigError(f"{folder} has no {_RESULTS}; it should be the --output_path of VBench")
  for file in files:
    document = config_json.read_json(file, str(file))
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
      raise ConfigError(f"{file} must be a list of objects")
    empty = [str(entry.get("prompt_en")) for entry in document if not entry.get("video_list")]
    if empty or not document:
      yield f"{file.name}: {len(empty)} of {len(document)} prompts have no video: {part_files.list_some(empty)}"
