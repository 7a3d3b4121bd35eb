"""Files and folders that exist whole or not at all."""

from __future__ import annotations

from etils import epath

from streamt1_jax.io import paths


def replace_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes `content` beside `path`, then renames it: a reader sees the old file or the new, never half.

  On an object store a rename is a copy, which appears whole as well, and a deletion. A kill between the two leaves the
  file beside `path`: nobody reads it, and the next writer replaces it.

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
  """Adds `text` to a file, or makes the file. On an object store, where no file grows, it is written anew."""
  if paths.is_object_store(path):
    path.write_text((path.read_text() if path.exists() else "") + text)
    return
  with path.open("a") as file:
    file.write(text)


def replace_folder(target: epath.Path, staging: epath.Path, marker: str) -> None:
  """Puts the folder `staging` in the place of `target`.

  On a file system both are renamed: `target` is the old folder, then missing for a moment, then the new one. On an
  object store files are copied: the old `marker` goes first, then the old files go, then the new files come, and
  `marker` comes last. In between `target` has no marker, so no reader takes it for a result.

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
