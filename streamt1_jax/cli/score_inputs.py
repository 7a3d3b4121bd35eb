"""What is to be scored: video files, and the prompt of each."""

from __future__ import annotations

import collections
import dataclasses
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from streamt1_jax.cli import results
from streamt1_jax.config import ConfigError
from streamt1_jax.io import config_json, part_files, paths
from streamt1_jax.text.prompts import load_prompts, require_whole_characters

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
"""How names of videos in a folder end. A file that is named, or matched by a glob, may end in any way."""


class Part(NamedTuple):
  """Frames begin..end - 1 of a video, and what they should show."""

  begin: int
  end: int
  prompt: str | None


@dataclasses.dataclass(frozen=True)
class Task:
  """One video to score.

  Attributes:
    video: the file.
    prompt: what it should show; None if nothing says it; all prompts of a video whose prompt changes.
    fault: why there is no prompt, where a file should have said it.
    segments: where the prompt changes; empty for a video of one prompt.
  """

  video: epath.Path
  prompt: str | None
  fault: str | None = None
  segments: tuple[Part, ...] = ()

  def parts(self, num_frames: int, *, reads_prompt: bool) -> tuple[Part, ...]:
    """What is judged by itself. Raises ConfigError if the segments are of another length."""
    if not self.segments or not reads_prompt:
      return (Part(0, num_frames, self.prompt),)
    if self.segments[-1].end != num_frames:
      raise ConfigError(f"{self.video} has {num_frames} frames, and {self.segments[-1].end} by its {results.MANIFEST}")
    return self.segments


def find_videos(pattern: str) -> list[epath.Path]:
  """Video files, sorted by path.

  Args:
    pattern: a file, a folder (searched with all its subfolders, but for hidden ones), or a glob of those.

  Raises ConfigError if no video is there.
  """
  source = epath.Path(pattern)
  places = [source] if source.exists() else _matches(source)
  found = {path.as_posix(): path for place in places for path in _videos_at(place)}
  if not found:
    raise ConfigError(f"--videos={pattern}: no video found; folders are searched for {', '.join(SUFFIXES)}")
  return [found[name] for name in sorted(found)]


def _matches(pattern: epath.Path) -> list[epath.Path]:
  if not paths.is_object_store(pattern):
    return [epath.Path(path) for path in glob.glob(os.fspath(pattern), recursive=True)]
  if "**" in pattern.parts:
    raise ConfigError(f"--videos={pattern}: on an object store a glob cannot have **; a folder is searched whole")
  return list(pattern.parent.glob(pattern.name))


def _videos_at(place: epath.Path, above: frozenset[str] = frozenset()) -> Iterator[epath.Path]:
  if not place.is_dir():
    yield place
    return
  # A link may lead back to a folder that is being searched.
  real = os.path.realpath(place)
  if real in above and not paths.is_object_store(place):
    return
  for entry in place.iterdir():
    if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in SUFFIXES):
      yield from _videos_at(entry, above | {real})


def with_given_prompts(videos: list[epath.Path], prompts_file: str) -> list[Task]:
  """Videos with the prompts of a file.

  The file has one prompt per line, for the videos in sorted order; or lines `name<TAB>prompt`; or lines of JSON,
  `{"video": name, "prompt": prompt}`, all of them if there is one. A name is the end of the video's path: `a.mp4`, or
  `run1/a.mp4` where there are several `a.mp4`.

  Raises ConfigError unless every video has exactly one prompt and every prompt a video.
  """
  flag = f"--prompts_file={prompts_file}"
  lines = load_prompts(prompts_file)
  if any(re.match(r'\{\s*"', line) for line in lines):
    by_name = [_parse_json_line(line, flag) for line in lines]
  elif any("\t" in line for line in lines):
    by_name = [_parse_tabbed_line(line, flag) for line in lines]
  else:
    if len(lines) != len(videos):
      raise ConfigError(f"{flag} has {len(lines)} prompts for {len(videos)} videos")
    return [Task(video, prompt) for video, prompt in zip(videos, lines, strict=True)]
  twice = [name for name, count in collections.Counter(name for name, _ in by_name).items() if count > 1]
  if twice:
    raise ConfigError(f"{flag} names {part_files.list_some(twice)} more than once")
  return _match(videos, dict(by_name), flag)


def _parse_json_line(line: str, flag: str) -> tuple[str, str]:
  entry = config_json.parse_strict_json(line, f"{flag}: the line {line!r:.60}")
  video, prompt = (entry.get("video"), entry.get("prompt")) if isinstance(entry, dict) else (None, None)
  if not (isinstance(video, str) and isinstance(prompt, str) and video.strip() and prompt.strip()):
    raise ConfigError(f"{flag}: the line {line!r:.60} needs a video and a prompt, both text")
  require_whole_characters(prompt, f"{flag}: the prompt in the line {line!r:.60}")
  return video, prompt


def _parse_tabbed_line(line: str, flag: str) -> tuple[str, str]:
  name, _, prompt = (part.strip() for part in line.partition("\t"))
  if not (name and prompt):
    raise ConfigError(f"{flag}: the line {line!r:.60} must be a file name, a tab and a prompt, as others are")
  return name, prompt


def _match(videos: list[epath.Path], prompts: Mapping[str, str], flag: str) -> list[Task]:
  keys = {pathlib.PurePosixPath(name).parts: name for name in prompts}
  tasks, owners = [], {}
  for video in videos:
    parts = pathlib.PurePosixPath(video.as_posix()).parts
    fitting = [keys[parts[start:]] for start in range(len(parts)) if parts[start:] in keys]
    if len(fitting) != 1:
      raise ConfigError(f"{flag} has {len(fitting) or 'no'} prompt{'s' if fitting else ''} for {video}")
    (name,) = fitting
    if name in owners:
      raise ConfigError(f"{flag}: {name!r} is the end of {owners[name]} and of {video}; give more of the path")
    owners[name] = video
    tasks.append(Task(video, prompts[name]))
  unused = [name for name in prompts if name not in owners]
  if unused:
    raise ConfigError(f"{flag} has prompts for videos that are not there: {part_files.list_some(unused)}")
  return tasks


def with_own_prompts(videos: list[epath.Path]) -> list[Task]:
  """Videos of `streamt1 generate` with the prompts in the manifests beside them, where there is one."""
  return [_with_own_prompt(video) for video in videos]


def _with_own_prompt(video: epath.Path) -> Task:
  if not paths.is_regular_file(video.parent / results.MANIFEST):
    return Task(video, None)
  try:
    document = part_files.read_json_object(video.parent, results.MANIFEST, "a generated video")
    settings, segments = document.get("settings"), _segments(document.get("segments"), video.parent / results.MANIFEST)
  except ConfigError as error:
    return Task(video, None, str(error))
  prompt = settings.get("prompt") if isinstance(settings, dict) else None
  if not isinstance(prompt, str):
    return Task(video, None, f"{video.parent / results.MANIFEST} holds no prompt")
  try:
    for text in (prompt, *(str(part.prompt) for part in segments)):
      require_whole_characters(text, f"the prompt in {video.parent / results.MANIFEST}")
  except ConfigError as error:
    return Task(video, None, str(error))
  return Task(video, " | ".join(str(part.prompt) for part in segments) or prompt, segments=segments)


def _segments(listed: Any, where: epath.Path) -> tuple[Part, ...]:
  """The segments of a manifest where there are several. Raises ConfigError if they do not follow one another."""
  if not isinstance(listed, list) or len(listed) < 2:
    return ()
  try:
    parts = tuple(Part(begin, end, entry["prompt"]) for entry in listed for begin, end in [entry["frames"]])
    bounds = [0, *(part.end for part in parts)]
    follow = [part.begin for part in parts] == bounds[:-1] and all(a < b for a, b in itertools.pairwise(bounds))
    whole = follow and all(type(bound) is int for bound in bounds) and all(type(part.prompt) is str for part in parts)
  except (TypeError, KeyError, ValueError):
    whole = False
  if not whole:
    raise ConfigError(f"{where} has segments that do not follow one another")
  return parts
