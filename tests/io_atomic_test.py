"""Files appear whole or not at all, also when the disk is full after half of their content."""

import contextlib
import errno
import resource
import signal

import pytest
from etils import epath

from streamt1_jax.io import atomic


@contextlib.contextmanager
def files_of_at_most(size: int):
  """Writes beyond `size` bytes are refused, after those before it were made."""
  before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_half_the_content_is_written_when_the_disk_is_full(tmp_path, earlier):
  path = tmp_path / "deep/a.json"
  if earlier is not None:
    atomic.replace_bytes(path, earlier)
  with files_of_at_most(5000):
    # The limit takes the first half: what is left of it would be seen.
    with (tmp_path / "probe").open("wb", buffering=0) as probe:
      assert probe.write(bytes(10_000)) == 5000
    with pytest.raises(OSError) as caught:
      atomic.replace_bytes(path, bytes(10_000))
  assert caught.value.errno == errno.EFBIG
  assert [entry.name for entry in path.parent.iterdir()] == ([] if earlier is None else ["a.json"])
  assert earlier is None or path.read_bytes() == earlier


def test_a_leftover_of_a_killed_writer_is_replaced(tmp_path):
  (tmp_path / ".a.json.partial").write_bytes(b"half of another content, and longer")
  atomic.replace_bytes(tmp_path / "a.json", b"whole")
  assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"a.json": b"whole"}


def test_a_folder_takes_the_place_of_another(tmp_path):
  for name, file in (("old", "old.txt"), (".new.partial", "new.txt")):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text(name)
  atomic.replace_folder(epath.Path(tmp_path / "old"), epath.Path(tmp_path / ".new.partial"), "new.txt")
  assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["old", "old/new.txt"]
