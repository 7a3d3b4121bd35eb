"""Says whether a file is a published one. Nothing is ever refused for being unknown.

Sizes are compared first. A conversion takes the SHA-256 of every file that it reads, for `source.json`, so nothing is
read once more for this. A dry run reads no file to its end and compares sizes alone.
"""

from __future__ import annotations

from streamt1_jax.convert.tables.published_files import PUBLISHED


def describe(name: str, size: int, sha256: str) -> str:
  """One line about a file of this name, size in bytes and SHA-256 in hex."""
  same_size = [known for known in PUBLISHED if known.size == size]
  for known in same_size:
    if sha256.startswith(known.sha256):
      return f"{name}: this is the published {known.name} ({known.repo})"
  if same_size:
    return (
      f"{name}: not a file I know; it has the size of the published {same_size[0].name} but another SHA-256, so it was "
      "damaged or changed"
    )
  return f"{name}: not a file I know"


def guess(size: int) -> str:
  """What a size alone says of a file; empty if it is that of no published file."""
  names = [known.name for known in PUBLISHED if known.size == size]
  return f"the size of the published {names[0]}" if names else ""
