"""Where object stores (`gs://`) are not like local folders.

`etils.epath` gives both one interface, but an object store is no file system. A folder is only the common beginning of
names, and exists while an object is in it. An object appears whole or not at all, and never grows. Nothing is renamed:
objects are copied and deleted one by one. So a folder that has to appear whole has a marker, a file that is written
last, and readers look for the marker.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from etils import epath


def is_object_store(path: epath.PathLike) -> bool:
  """Whether `path` is a URL such as gs://bucket/folder and not a path of a local or mounted file system."""
  return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """`path` as orbax and TensorStore want it. URLs are absolute already, and `resolve` would spoil them."""
  path = epath.Path(path)
  return path if is_object_store(path) else path.resolve()


def exists(path: epath.PathLike) -> bool:
  """Whether there is a file or folder. Raises OSError if that cannot be told, where `epath` would say no."""
  try:
    epath.Path(path).stat() if is_object_store(path) else os.stat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  except OSError as error:
    if error.errno != errno.ENAMETOOLONG:
      raise
    return False
  return True


def is_regular_file(path: epath.PathLike) -> bool:
  """Whether there is a file that can be read to its end: no folder, and no pipe or device as `epath` takes for one."""
  if is_object_store(path):
    return epath.Path(path).is_file()
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except (OSError, ValueError):  # A name with a zero byte is a ValueError.
    return False


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
  """All files in `folder` and its subfolders, sorted by path within each folder."""
  for entry in sorted(folder.iterdir()):
    if entry.is_dir():
      yield from files_below(entry)
    else:
      yield entry
