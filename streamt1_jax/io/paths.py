"""Local folders and object stores (`gs://`), where they are not alike.

`etils.epath` gives both one interface, but an object store is no file system: a folder is what names have in common,
so it exists as long as an object is in it; an object appears whole or not at all, and never grows; and nothing can be
renamed, only copied and deleted, object by object. A folder that has to appear whole therefore gets its marker, the
one file by which a reader knows it, as the last one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from etils import epath


def is_object_store(path: epath.PathLike) -> bool:
  """Whether `path` is a URL such as gs://bucket/folder, and not of a local or mounted file system."""
  return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """`path` as Orbax and TensorStore want it; URLs are absolute already, and `resolve` would spoil them."""
  path = epath.Path(path)
  return path if is_object_store(path) else path.resolve()


def exists(path: epath.PathLike) -> bool:
  """Whether there is a file or folder. Raises whatever kept that from being told; `epath` takes every error for no."""
  try:
    epath.Path(path).stat() if is_object_store(path) else os.stat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  except OSError as error:
    if error.errno != errno.ENAMETOOLONG:
      raise
    return False
  return True


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
  """All files in `folder` and its subfolders, sorted by path within each folder."""
  for entry in sorted(folder.iterdir()):
    if entry.is_dir():
      yield from files_below(entry)
    else:
      yield entry
