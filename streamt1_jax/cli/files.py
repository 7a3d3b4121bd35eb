"""Files and folders that flags name: what cannot be written is told before the work begins."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from etils import epath

from streamt1_jax import shipped
from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint, hub
from streamt1_jax.rewards.folder import REWARDS_FOLDER

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk. EFBIG is the limit of a process, or of a file system, on the size of one file."""


def find_checkpoint(path: str | None) -> epath.Path:
  """The folder that --checkpoint means: the small model's where the flag is not given. Downloads what is on the hub."""
  return shipped.checkpoint() if path is None else hub.local(path)


def _probe(file: epath.Path) -> None:
  file.write_bytes(b"")
  file.unlink()


def make_folder(flag: str, path: str, *, writable: bool = False) -> None:
  """Makes the folder of a flag. Raises ConfigError if that, or with `writable` a file in it, cannot be made."""
  folder = epath.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if writable:
      _probe(folder / ".probe")
  except OSError as error:
    raise ConfigError(f"--{flag}={path} cannot be made: {error.strerror or error}") from error


def require_writable(flag: str, path: str) -> None:
  """Raises ConfigError unless a file can be made at `path`: better known before the work than after it."""
  target = epath.Path(path)
  try:
    if target.is_dir():
      raise IsADirectoryError(errno.EISDIR, "it is a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    _probe(target.parent / f".{target.name}.probe")
  except OSError as error:
    raise ConfigError(f"--{flag}={path} cannot be written: {error.strerror or error}") from error


def checkpoint_sha256(folder: epath.Path, rewards: Sequence[str] = ()) -> str:
  """Identifies a model wherever its folder is: checksum of config, tokenizer and the parts' own checksums.

  Args:
    folder: the checkpoint.
    rewards: names of its reward models that are used.
  """
  return checkpoint.parts_sha256(folder, [f"{REWARDS_FOLDER}/{name}" for name in rewards])
