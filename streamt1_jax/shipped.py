"""Files that travel with the package, wherever it was installed: the small model and the flagfiles."""

from __future__ import annotations

import importlib.resources

from etils import epath


def checkpoint() -> epath.Path:
  """The folder of the small model, which makes videos of moving shapes."""
  return _folder() / "checkpoints" / "tiny"


def flagfiles() -> epath.Path:
  """The folder of the flagfiles, such as `paper_5s.flags`."""
  return _folder() / "flagfiles"


def _folder() -> epath.Path:
  return epath.Path(str(importlib.resources.files("streamt1_jax")))
