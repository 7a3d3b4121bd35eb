"""Files and folders that exist whole or not at all."""

from __future__ import annotations

from etils import epath

from streamt1_jax.io import paths


def replace_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes `content` beside `path`, then renames it: a reader sees the old file or the new, never half.

  On an object store a rename is a copy, which is as whole, and a deletion; a kill between the two leaves the file
  beside `path` behind, which nobody reads and the next writer replaces.

  Args:
    path: the file; its parent folders are made.
    content: all of the new file.

  Raises:
    OSError: the file system refuses; an earlier file stays and nothing else is left.
  """
  target = epath.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  staging = target.parent / f".{target.name}.partial"
  try:
    staging.write_bytes(content)
    staging.replace(target)
  finally:
    staging.unlink(missing_ok=True)


def append_text(path: epath.Path, text: str) -> None:
  """Adds `text` to a file, which is made if it is missing. On an object store, where nothing grows, it is replaced."""
  if paths.is_object_store(path):
    path.write_text((path.read_text() if path.exists() else "") + text)
    return
  with path.open("a") as file:
    file.write(text)


def replace_folder(target: epath.Path, staging: epath.Path, marker: str) -> None:
  """Puts the folder `staging` in the place of `target`.

  Locally by renaming, so that `target` is the old folder, for a moment missing, or the new one. On an object store file
  by file: first the old `marker` goes, then the old files, then the new files come, `marker` last. Between these
  `target` has no marker, and is nothing.

  Args:
    target: an earlier folder is replaced.
    staging: complete, and `marker` in it.
    marker: the file by which a reader knows that the folder is whole.

  Raises:
    OSError: the file system refuses.
  """
  if not paths.is_object_store(target):
    replaced = target.parent / f".{target.name}.replaced"
    replaced.rmtree(missing_ok=True)
    if target.exists():
      target.rename(replaced)
    staging.rename(target)
    replaced.rmtree(missing_ok=True)
    return
  (target / marker).unlink(missing_ok=True)
  target.rmtree(missing_ok=True)
  names = [path.relative_to(staging) for path in paths.files_below(staging)]
  for name in sorted(names, key=lambda name: name.as_posix() == marker):
    (staging / name).copy(target / name)
  staging.rmtree()
