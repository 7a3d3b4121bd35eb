"""Messages stay short and on one line, whatever a file puts into them, and at no cost."""

import collections

import pytest

from streamt1_jax.cli import command
from streamt1_jax.config import ConfigError
from streamt1_jax.convert.engine import FitError
from streamt1_jax.messages import MESSAGE_LIMIT, one_line, shortened


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("plain", "plain"),
    ("ein Häschen, 漢字 und　🙂", "ein Häschen, 漢字 und　🙂"),
    ("a\nb\r\tc", "a\\nb\\r\\tc"),
    ("\x1b[31mred\x9b", "\\x1b[31mred\\x9b"),
    ("\u202eback\u2028wards", "\\u202eback\\u2028wards"),
    ("\ud800\U000e0001\0", "\\ud800\\U000e0001\\x00"),
  ],
)
def test_control_characters_are_escaped(text, line):
  assert one_line(text) == line
  assert one_line(line) == line


@pytest.mark.parametrize("character", ["x", "\n", "\U000e0001"])
@pytest.mark.parametrize("count", [499, 500, 501, 1001, 10**7])
def test_the_middle_of_long_texts_is_left_out(character, count):
  line = one_line(f"begin {character * count} end")
  assert len(line) <= MESSAGE_LIMIT == 500
  assert line.startswith("begin ")
  assert line.endswith(" end")
  assert (" ... " in line) == (len(repr(character)[1:-1]) * count > 490)


class Talkative:
  def __repr__(self):
    raise AssertionError("the whole text of an object is never made")


def _laughs(put):
  """A value whose text would have 10^60 characters."""
  value = "ha"
  for _ in range(60):
    value = put(value)
  return value


@pytest.mark.parametrize(
  "value",
  [
    _laughs(lambda x: [x] * 10),
    _laughs(lambda x: (x,) * 10),
    _laughs(lambda x: {"a": x, "b": x}),
    _laughs(lambda x: collections.OrderedDict(a=x, b=x)),
    [Talkative()],
    "x" * 10**8,
    b"x" * 10**8,
    2**1_000_000,
    {i: i for i in range(10**5)},
  ],
  ids=lambda value: type(value).__name__,
)
def test_values_are_cut_before_their_text_is_made(value):
  assert len(shortened(value)) <= 60


@pytest.mark.parametrize("value", [None, True, 3, 1.5, "text", b"bytes", [1, [2]], (1,), {"a": {"b": 2}}])
def test_short_values_are_shown_as_they_are(value):
  assert shortened(value) == repr(value)


def test_every_error_about_input_is_one_line():
  error = ConfigError(f"weights.pt holds {'x' * 10**6}\n\x1b[2J twice")
  assert len(str(error)) <= 500
  assert str(error).endswith("x\\n\\x1b[2J twice")
  assert str(ConfigError(f"--backbone: {error}")).endswith("x\\n\\x1b[2J twice")
  misfit = FitError("the checkpoint", {"unknown": ["a\nb" * 1000] * 3, "missing": ["c"]})
  assert len(misfit.line) <= 500
  assert misfit.line.isprintable()
  assert [len(line) <= 500 for line in str(misfit).split("\n")] == [True] * 5


def test_the_last_place_that_prints_an_error(capsys):
  def run(values):
    raise command.RunFailed("a.mp4 (\x1b]0;title\x07" + "y" * 10**6 + "\nend)")

  assert command.main("", lambda values: None, run, []) == command.RUN_FAILED
  (line,) = capsys.readouterr().err.splitlines()
  assert len(line) <= len("error: ") + 500
  assert line.isprintable()
