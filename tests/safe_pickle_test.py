"""Small pickles that would cost much: each ends in one line, at once, and with little memory."""

import struct
import time
import tracemalloc

import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats import safe_pickle

SIZE = b"ctorch\nSize\n"


def _text(text: str) -> bytes:
  return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _load(body: bytes, persistent_load=lambda pid: pid, names=None):
  names = (
    {"torch.Size": tuple, "torch.make": lambda *values: list(values), "torch.name": None} if names is None else names
  )
  return safe_pickle.loads(b"\x80\x02" + body + b".", names, persistent_load, "file")


def _refused(body: bytes, **arguments) -> str:
  with pytest.raises(ConfigError) as caught:
    _load(body, **arguments)
  line = str(caught.value)
  assert line.startswith("file ")
  assert len(line) <= 500
  assert line.isprintable()
  return line


# 25 bytes a level; 60 levels are 10^60 entries. Memo 9 holds the last one.
LISTS = b"]q\x09" + (b"](" + b"h\x09" * 10 + b"eq\x09") * 60
PAIRS = b"K\x01q\x09" + b"h\x09h\x09\x86q\x09" * 60


@pytest.mark.parametrize("laughs", [LISTS, PAIRS], ids=["lists", "pairs"])
@pytest.mark.parametrize(
  "use",
  [
    b"",
    b"\x85R",  # Called.
    b"Q",  # As the id of a storage.
    SIZE + b"h\x09R",  # As arguments.
    SIZE + b"h\x09\x85R",
    _text("m") + b"h\x09\x93",  # As the name of a function.
    b"h\x09" + _text("n") + b"\x93",
    b"}h\x09K\x01s",  # As a key.
    b"}(h\x09K\x01u",
    b"}K\x01h\x09s",  # As a value.
    b"h\x09b",  # As attributes.
  ],
)
def test_a_billion_laughs(laughs, use):
  """Whatever shows, hashes, compares or walks through such a value would never end."""
  refuse = lambda pid: (_ for _ in ()).throw(ValueError(f"it refers to a storage as {safe_pickle.shortened(pid)}"))
  tracemalloc.start()
  # All levels stay on the stack. In the end a tuple holds them.
  line = _refused(b"(" + laughs + use + b"t", persistent_load=refuse)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert ("no checkpoint does" in line) == (use in (b"", b"}K\x01h\x09s", SIZE + b"h\x09\x85R"))
  assert peak < 10 * 2**20


@pytest.mark.parametrize("opcode", [b"N", b"(", b"]\x94"])
def test_sixteen_megabytes_of_small_steps(opcode):
  start = time.perf_counter()
  line = _refused(opcode * (2**24 // len(opcode)))
  assert "524288 instructions" in line
  assert time.perf_counter() - start < 15  # Under a second on an idle machine; without a limit 20 and more.


def test_the_most_steps_take_little_memory():
  """A fiftieth of the steps that are allowed, each with the costliest object that one step can make: a dict."""
  count = safe_pickle.MAX_STEPS // 50
  body = b"](" + b"}" * count + b"e"
  tracemalloc.start()
  found = _load(body)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(found) == count
  assert 50 * peak < 2**29


def test_a_long_list_that_is_held_many_times():
  """Looked into once: 200,000 times 200,000 entries would take hours."""
  assert "no checkpoint does" in _refused(b"](" + b"N" * 200_000 + b"eq\x00](" + b"h\x00" * 200_000 + b"e\x86")


def test_calls_with_many_arguments():
  """A call costs as much as it has arguments, and half a million steps are 100,000 calls with the same tuple."""
  assert "calls Global(name='torch.make')" in _refused(b"ctorch\nmake\n(" + b"N" * 17 + b"tR")
  assert _load(b"ctorch\nmake\n(" + b"N" * 16 + b"tR") == [None] * 16


def test_depth():
  assert _load(b"N" + b"\x85" * 99) is not None
  assert "100 deep" in _refused(b"N" + b"\x85" * 101)
  assert "100 deep" in _refused(b"N" + b"\x85" * 20_000)
  assert "100 deep" in _refused(b"]q\x00h\x00a")  # A list that holds itself.


@pytest.mark.parametrize("key", [b"]", b"}", b"K\x01\x85\x85", b"(" + b"K\x01" * 17 + b"t", b"ctorch\nname\n"])
def test_keys_are_texts_and_numbers(key):
  assert "a key of a dict must be" in _refused(b"}" + key + b"K\x01s")
  assert "a key of a dict must be" in _refused(b"}(" + key + b"K\x01u")


def test_keys_that_checkpoints_have():
  found = _load(b"}(" + _text("a") + b"K\x01" + b"K\x07" + b"K\x02" + b"K\x01K\x02\x86" + b"K\x03" + b"NK\x04u")
  assert found == {"a": 1, 7: 2, (1, 2): 3, None: 4}


@pytest.mark.parametrize("name", ["x" * 10**6, "a\x1b[31mb", "a b"])
def test_names_of_any_length(name):
  assert "not executed" in _refused(f"c{name}\nloads\n".encode())
  _refused(_text(name) + _text("loads") + b"\x93")
  _refused(_text("os") + _text(name) + b"\x93")


def test_names_that_are_no_text():
  assert "refers to 'system' of []" in _refused(b"]" + _text("system") + b"\x93")
