"""Files that exist whole or not at all."""

from __future__ import annotations

from etils import epath


def replace_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes `content` beside `path`, then renames it: a reader sees the old file or the new, never half.

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
