"""What this program wrote itself: checkpoints, their parts, and reward models."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from etils import epath

from streamt1_jax.config import PRESETS
from streamt1_jax.io import checkpoint, part_files, part_writer
from streamt1_jax.rewards import folder as reward_folder
from tests import small_rewards
from tests.fuzz import changes
from tests.fuzz.changes import Rng, pick
from tests.fuzz.kinds import Kind

_WEIGHTS = {"a": np.arange(24, dtype=np.float32).reshape(4, 6), "b/c": np.ones(3, np.float32), "d": np.float32(2)}
_ABSTRACT = {"a": _WEIGHTS["a"], "b": {"c": _WEIGHTS["b/c"]}, "d": np.asarray(_WEIGHTS["d"])}


@functools.cache
def _originals() -> pathlib.Path:
  """A folder of valid parts that lives as long as the process. Orbax gives the files of a part names by chance."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_originals"))
  checkpoint.save_params(folder / "orbax", _ABSTRACT)
  leaves = {name: np.asarray(value) for name, value in _WEIGHTS.items()}
  part_writer.write_part(folder / "plain", leaves, [part_writer.Piece(*item) for item in leaves.items()])
  return folder


def _changed_config(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  model = PRESETS[pick(rng, sorted(PRESETS))]()
  checkpoint.save_config(folder, model)
  path = folder / checkpoint.CONFIG_FILE
  document = json.loads(path.read_text())
  parts = [name for name in ("backbone", "codec", "text", "schedule") if document["model"][name]]
  part = pick(rng, [*parts, None])
  if part is not None:
    document["model"][part] = changes.of_values(rng, document["model"][part], 1)
  path.write_text(changes.of_json(rng, document) if part is None else json.dumps(document))
  return folder


def _read_config(path: pathlib.Path) -> None:
  model = checkpoint.load_config(path)
  # Whatever loads can be counted with.
  assert min(model.frame_tokens, model.window_chunks, model.sink_frames, model.backbone.head_dim - 1) >= 1
  assert model.max_chunks >= 0
  assert model.codec is None or model.codec.spatial_stride >= 1 <= model.codec.temporal_stride


def _changed_reward(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  name, config = pick(rng, sorted(small_rewards.CONFIGS.items()))
  document = json.loads(reward_folder.config_json_bytes(small_rewards.spec_of(config), config))
  (folder / reward_folder.REWARD_FILE).write_text(changes.of_json(rng, document))
  return folder


def _read_reward(path: pathlib.Path) -> None:
  _, config = reward_folder.load_config(path)
  config.resized((64, 64))


def _changed_part(rng: Rng, folder: pathlib.Path) -> pathlib.Path:
  """A part with a changed file, whose part.json agrees with it half of the time, or is what was changed."""
  part = folder / "part"
  shutil.copytree(_originals() / pick(rng, ("orbax", "plain")), part)
  files = sorted(path for path in part.rglob("*") if path.is_file())
  path = pick(rng, files)
  try:
    text = changes.of_json(rng, json.loads(path.read_text()))
    path.write_text(text, errors="replace")
  except (ValueError, UnicodeDecodeError):
    path.write_bytes(changes.of_bytes(rng, path.read_bytes()))
  if rng.integers(2) and path.name != part_files.PART_FILE:
    (part / part_files.PART_FILE).unlink()
    part_files.write_part_file(epath.Path(part), _WEIGHTS)
  return part


def _read_part(path: pathlib.Path) -> None:
  checkpoint.load_params(path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _ABSTRACT))
  checkpoint.load_arrays(path, _ABSTRACT)


KINDS = {
  "config": Kind(_changed_config, _read_config),
  "reward": Kind(_changed_reward, _read_reward),
  "part": Kind(_changed_part, _read_part),
}
