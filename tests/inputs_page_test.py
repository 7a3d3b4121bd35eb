"""The page on what may be fed to the program gives the limits of the code."""

import re

from streamt1_jax.config import base
from streamt1_jax.convert.formats import safe_pickle
from streamt1_jax.io import limits, pictures, timeline, video_source
from streamt1_jax.messages import MESSAGE_LIMIT
from streamt1_jax.text import prompts, readers
from tests import fuzz_readers_test
from tests.command_line import REPOSITORY
from tests.fuzz import kinds

PAGE = (REPOSITORY / "docs/inputs.md").read_text()
LIMITS = {
  "tensors in a file": limits.MAX_TENSORS,
  "characters of a tensor's name": limits.MAX_NAME,
  "dimensions of a tensor": limits.MAX_RANK,
  "numbers of a tensor": limits.MAX_NUMBERS,
  "instructions of a pickle": safe_pickle.MAX_STEPS,
  "containers in containers of a pickle": safe_pickle.MAX_DEPTH,
  "pixels of a picture, or of a video's frame": video_source.MOST_PIXELS,
  "bytes of a prompts file": prompts.MAX_BYTES,
  "seconds of a prompt's start in a timeline": timeline.MAX_START,
  "any size or count in a `config.json`": base.MAX_SIZE,
  "characters of a message": MESSAGE_LIMIT,
}
# FFmpeg calls a family of formats by one name.
NAMES = {
  "mov": {"mov", "mp4", "3gp"},
  "matroska": {"mkv", "webm"},
  "yuv4mpegpipe": {"y4m"},
}


def test_what_a_name_decides():
  for suffix in readers.READERS:
    assert f"`{suffix}`" in PAGE


def _number(text: str) -> int:
  base_, _, power = text.replace(",", "").partition("^")
  return int(base_) ** int(power or 1)


def test_limits():
  rows = dict(re.findall(r"^\| ([^|]+) \| ([\d,^]+) \|$", PAGE, re.MULTILINE))
  assert {name: _number(number) for name, number in rows.items()} == LIMITS


def test_video_formats():
  (row,) = re.findall(r"^\| videos, .*\| (.*) \|$", PAGE, re.MULTILINE)
  read = set().union(*(NAMES.get(name, {name}) for name in video_source.FORMATS))
  assert set(row.split(", ")) == read


def test_picture_formats():
  assert f"| pictures, to `--image` | {', '.join(pictures.FORMATS)} |" in PAGE


def test_the_law_is_that_of_the_fuzz():
  assert f"{kinds.SECONDS:.0f} seconds and {kinds.PEAK_BYTES // 2**30} GiB" in PAGE
  assert f"tries {fuzz_readers_test.MANY} of every kind" in PAGE
