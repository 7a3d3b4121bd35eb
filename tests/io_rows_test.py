"""Rows of a long run: what a kill leaves, and which files are refused."""

import json

import pytest
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.io import rows

_SETTINGS = {"seconds": 5.0, "frames": (12, 1), "mesh": None}


@pytest.fixture
def path(tmp_path) -> epath.Path:
  return epath.Path(tmp_path / "deep/rows.jsonl")


def test_rows_are_read_as_they_were_written(path):
  assert rows.read(path, _SETTINGS) == []
  writer = rows.Writer(path, _SETTINGS)
  writer.append({"caption": "a café", "scores": [1.5, None]})
  writer.append({"caption": "line\nbreak"})
  assert rows.read(path, _SETTINGS) == [{"caption": "a café", "scores": [1.5, None]}, {"caption": "line\nbreak"}]
  first, *_ = path.read_text().splitlines()
  assert json.loads(first) == {"settings": {"seconds": 5.0, "frames": [12, 1], "mesh": None}}


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_line_that_was_cut_does_not_count_and_is_replaced(path, cut):
  writer = rows.Writer(path, _SETTINGS, [{"n": 1}])
  writer.append({"n": 2, "text": "long"})
  path.write_text(path.read_text()[:-cut])
  kept = rows.read(path, _SETTINGS)
  assert kept == [{"n": 1}]
  rows.Writer(path, _SETTINGS, kept).append({"n": 3})
  assert rows.read(path, _SETTINGS) == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize(
  ("settings", "difference"),
  [
    (_SETTINGS | {"seconds": 30.0}, "was made with seconds 5.0, not 30.0"),
    (_SETTINGS | {"seed": 1}, "was made with seed None, not 1"),
    ({"seconds": 5.0, "mesh": None}, r"was made with frames \[12, 1\], not None"),
  ],
)
def test_other_settings_are_refused(path, settings, difference):
  rows.Writer(path, _SETTINGS, [{"n": 1}])
  with pytest.raises(ConfigError, match=f"^--output=x {difference}; give the same flags or another file$"):
    rows.read(path, settings, name="--output=x")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "does not hold the rows of a run"),
    (b'{"settings": {}}', "does not hold the rows of a run"),
    (b"[1]\n", "does not hold the rows of a run"),
    (b'{"case": {}}\n', "does not say which settings"),
    (b'{"settings": {"n": 1}}\nno\n', "line 2 is not valid JSON"),
    (b'{"settings": {"n": 1}}\n{"score": NaN}\n', "line 2 is not valid JSON"),
    (b"\x89PNG\r\n", "binary"),
  ],
)
def test_other_files_are_refused(path, content, message):
  path.parent.mkdir()
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=f"^--output=x.*{message}"):
    rows.read(path, {"n": 1}, name="--output=x")
  assert path.read_bytes() == content


def test_rows_of_another_program_are_refused(path):
  rows.Writer(path, {}, [{"caption": "a"}, {"text": "b"}])
  with pytest.raises(ConfigError, match="^--output=x, line 3 is not a row of such a run; give the same flags"):
    rows.read(path, {}, name="--output=x", is_row=lambda row: "caption" in row)
  assert rows.read(path, {}) == [{"caption": "a"}, {"text": "b"}]


def test_what_is_no_json_is_not_written(path):
  writer = rows.Writer(path, {})
  with pytest.raises(ValueError, match="Out of range float"):
    writer.append({"score": float("nan")})
  assert rows.read(path, {}) == []
