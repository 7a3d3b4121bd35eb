"""The prompts of one video and when each begins, as a small JSON file: what a session was told, or what to tell one.

  {"version": 1, "seed": 7, "entries": [{"start": 0.0, "prompt": "..."}, {"start": 2.8125, "prompt": "..."}]}

Prompts change between two chunks, so a start is rounded to the nearest of these moments (`ChunkClock`).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import config_json, manifest
from streamt1_jax.messages import shortened

VERSION = 1
MAX_START = 1e9
"""The latest second at which a prompt begins, after 31 years."""
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')


@dataclasses.dataclass(frozen=True)
class ChunkClock:
  """When chunks begin.

  Attributes:
    fps: frames per second.
    first: frames of the first chunk.
    later: frames of every later chunk.
  """

  fps: float
  first: int
  later: int

  def seconds(self, chunk: int) -> float:
    """Where chunk `chunk` begins, in seconds from the beginning of the video."""
    return 0.0 if chunk == 0 else (self.first + (chunk - 1) * self.later) / self.fps

  def chunk(self, seconds: float) -> int:
    """The chunk whose beginning is nearest to `seconds`."""
    return max(0, round((seconds * self.fps - self.first) / self.later) + 1)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A prompt, and when it begins in seconds."""

  start: float
  prompt: str


@dataclasses.dataclass(frozen=True)
class Timeline:
  """Prompts in the order of their starts; the first begins with the video.

  Attributes:
    entries: at least one; starts increase from 0 and are at most `MAX_START`.
    seed: of the video, or None if the file does not say.

  Raises:
    ConfigError: the entries are not like that; the message names the first that is not.
  """

  entries: tuple[Entry, ...]
  seed: int | None = None

  def __post_init__(self):
    if not self.entries:
      raise ConfigError("a timeline needs at least one entry")
    if self.entries[0].start != 0:
      raise ConfigError(f"entry 1 must start at 0, where the video begins, got {self.entries[0].start}")
    for number, (before, entry) in enumerate(itertools.pairwise(self.entries), start=2):
      if not before.start < entry.start <= MAX_START:
        told = f"entry {number} starts at {entry.start} s, entry {number - 1} at {before.start} s"
        raise ConfigError(f"{told}; starts increase, up to {MAX_START:.0f}")
    for number, entry in enumerate(self.entries, start=1):
      if not entry.prompt.strip():
        raise ConfigError(f"entry {number}: the prompt is empty")

  def chunks(self, clock: ChunkClock, end: int | None = None, given: int = 0) -> list[tuple[int, str]]:
    """The chunks that the prompts begin with.

    Args:
      clock: when chunks begin.
      end: chunks of the video; None for one without an end.
      given: chunks that it begins with and that are not made.

    Raises:
      ConfigError: two prompts begin with one chunk, or one begins in a chunk that is given or when the video is over.
    """
    begins = [clock.chunk(entry.start) for entry in self.entries]
    for number, (before, begin) in enumerate(itertools.pairwise(begins), start=2):
      if before == begin:
        raise ConfigError(f"entries {number - 1} and {number} both begin with chunk {begin}: a chunk has one prompt")
    for number, (begin, entry) in enumerate(zip(begins, self.entries, strict=True), start=1):
      if end is not None and begin >= end:
        raise ConfigError(f"entry {number} starts at {entry.start} s, but the video ends at {clock.seconds(end)} s")
      if 0 < begin < given:
        made = clock.seconds(given)
        raise ConfigError(
          f"entry {number} starts at {entry.start} s, but the video is given and not made up to {made} s"
        )
    return [(begin, entry.prompt) for begin, entry in zip(begins, self.entries, strict=True)]

  def rounded(self, clock: ChunkClock) -> list[str]:
    """A sentence for every start that is not where a chunk begins."""
    moved = ((entry.start, clock.seconds(clock.chunk(entry.start))) for entry in self.entries)
    return [f"the prompt of {start} s begins at {at} s, with a chunk" for start, at in moved if start != at]

  def until(self, seconds: float) -> Timeline:
    """The same for a video that ends `seconds`, more than 0, after its beginning."""
    return Timeline(tuple(entry for entry in self.entries if entry.start < seconds), self.seed)

  def save(self, path: epath.PathLike) -> None:
    """Writes the file that `load` reads; a reader sees the old file or the new one. Raises OSError as files do."""
    manifest.write_json(path, self.to_json())

  def to_json(self) -> dict[str, Any]:
    entries = [{"start": entry.start, "prompt": entry.prompt} for entry in self.entries]
    return {"version": VERSION} | ({} if self.seed is None else {"seed": self.seed}) | {"entries": entries}


def load(path: epath.PathLike) -> Timeline:
  """Reads a timeline.

  Raises:
    ConfigError: the file is missing, unreadable or of another form; the message names the file, the entry and its line.
  """
  file = epath.Path(path)
  if not file.is_file():
    raise ConfigError(f"timeline {path} does not exist or is not a file")
  document = config_json.read_json(file, f"timeline {path}")
  try:
    return from_json(document)
  except ConfigError as error:
    raise ConfigError(f"timeline {path}{_line_of(file.read_text(), str(error))}: {error}") from error


def from_json(document: Any) -> Timeline:
  """The inverse of `Timeline.to_json`. Raises ConfigError, naming the entry."""
  if not isinstance(document, dict):
    raise ConfigError("it must hold a JSON object")
  unknown = sorted(set(document) - {"version", "seed", "entries"})
  if unknown:
    raise ConfigError(f"it has unknown {', '.join(map(shortened, unknown))}; known: version, seed, entries")
  if document.get("version") != VERSION or isinstance(document["version"], bool):
    raise ConfigError(f"version is {shortened(document.get('version'))}; this program reads {VERSION}")
  seed, entries = document.get("seed"), document.get("entries")
  if seed is not None and (type(seed) is not int or not -(2**31) <= seed < 2**31):
    raise ConfigError(f"seed must be a whole number of 32 bits, got {shortened(seed)}")
  if not isinstance(entries, list):
    raise ConfigError("entries must be a list")
  return Timeline(tuple(_entry(entry, number) for number, entry in enumerate(entries, start=1)), seed)


def _entry(entry: Any, number: int) -> Entry:
  if not isinstance(entry, dict) or set(entry) != {"start", "prompt"}:
    raise ConfigError(f"entry {number} must have start and prompt, and nothing else")
  start, prompt = entry["start"], entry["prompt"]
  if type(start) not in (int, float) or not 0 <= start <= MAX_START:
    raise ConfigError(f"entry {number}: start must be 0 to {MAX_START:.0f} seconds, got {shortened(start)}")
  if not isinstance(prompt, str) or prompt.encode(errors="ignore").decode() != prompt:
    raise ConfigError(f"entry {number}: the prompt must be a text, got {shortened(prompt)}")
  return Entry(float(start), prompt)


def _line_of(text: str, message: str) -> str:
  """ ", line L" of the entry that a message names; nothing if it names none or the entry has no prompt."""
  named = re.search(r"\bentry (\d+)", message)
  keys = [match for match in _STRING.finditer(text) if match[2] and match[1] == "prompt"]
  if not named or int(named[1]) > len(keys):
    return ""
  return f", line {text.count(chr(10), 0, keys[int(named[1]) - 1].start()) + 1}"
