"""Parts written piece by piece: orbax and `load_params` read what was written, and nothing half-done stays."""

import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint, part_writer
from streamt1_jax.io.part_writer import Piece


def _params(seed=0):
  generator = np.random.default_rng(seed)
  normal = lambda *shape: generator.standard_normal(shape).astype(np.float32)
  return {
    "blocks": {"kernel": normal(5, 8, 16), "norm": {"0": normal(5, 4), "10": normal(3)}},
    "embedding": normal(11, 6),
    "zeros": np.zeros((7, 2), np.float32),
    "scale": np.float32(3.0),
    "steps": np.arange(4, dtype=np.int32),
  }


def _leaves(params, dtype=None):
  flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  stored = lambda leaf: leaf.dtype if dtype is None or leaf.dtype == np.int32 else dtype
  return flat, {name: jax.ShapeDtypeStruct(leaf.shape, stored(leaf)) for name, leaf in flat.items()}


def _pieces(flat, rows=2):
  """`rows` rows at a time; the leaves take turns."""
  for start in range(0, 12, rows):
    for name, leaf in flat.items():
      if leaf.ndim == 0 and start == 0:
        yield Piece(name, leaf)
      elif leaf.ndim and start < len(leaf):
        yield Piece(name, leaf[start : start + rows])


def _abstract(params):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


@pytest.fixture(params=[part_writer.CHUNK_BYTES, 600, 1])
def chunk_bytes(request, monkeypatch):
  """Real chunks, chunks of a few rows, chunks of one row."""
  monkeypatch.setattr(part_writer, "CHUNK_BYTES", request.param)


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.usefixtures("chunk_bytes")
def test_round_trip_is_exact(tmp_path, rows):
  params = _params()
  flat, leaves = _leaves(params)
  part_writer.write_part(tmp_path / "model" / "backbone", leaves, _pieces(flat, rows))
  loaded = checkpoint.load_params(tmp_path / "model" / "backbone", _abstract(params))
  chex.assert_trees_all_equal(loaded, params)
  chex.assert_trees_all_equal_dtypes(loaded, params)
  assert [path.name for path in (tmp_path / "model").iterdir()] == ["backbone"]


@pytest.mark.usefixtures("chunk_bytes")
def test_floating_rows_are_cast(tmp_path):
  params = _params()
  flat, leaves = _leaves(params, ml_dtypes.bfloat16)
  part_writer.write_part(tmp_path / "part", leaves, _pieces(flat))
  loaded = checkpoint.load_params(tmp_path / "part", _abstract(params), dtype=jnp.bfloat16)
  narrow = jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(ml_dtypes.bfloat16), params)
  chex.assert_trees_all_equal(loaded, narrow)
  described = json.loads((tmp_path / "part" / "part.json").read_text())
  assert described["dtype"] == "bfloat16+int32"
  assert described["parameters"] == sum(leaf.size for leaf in flat.values())


@pytest.mark.usefixtures("chunk_bytes")
def test_leaves_are_restored_to_their_sharding(tmp_path):
  params = _params()
  flat, leaves = _leaves(params)
  part_writer.write_part(tmp_path / "part", leaves, _pieces(flat))
  sharding = jax.NamedSharding(jax.make_mesh((8,), ("model",)), jax.P(None, "model", None))
  abstract = _abstract(params)
  abstract["blocks"]["kernel"] = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32, sharding=sharding)
  kernel = checkpoint.load_params(tmp_path / "part", abstract)["blocks"]["kernel"]
  assert kernel.sharding == sharding
  chex.assert_trees_all_equal(kernel, params["blocks"]["kernel"])


def test_orbax_alone_reads_it(tmp_path):
  params = _params()
  flat, leaves = _leaves(params)
  part_writer.write_part(tmp_path / "part", leaves, _pieces(flat))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    chex.assert_trees_all_equal(checkpointer.restore(tmp_path / "part"), params)


def test_large_parameters_are_cut_along_the_leading_axis(tmp_path, monkeypatch):
  monkeypatch.setattr(part_writer, "CHUNK_BYTES", 600)
  flat, leaves = _leaves(_params())
  part_writer.write_part(tmp_path / "part", leaves, _pieces(flat))
  files = lambda name: sorted(path.name for path in (tmp_path / "part" / name).iterdir() if path.name != ".zarray")
  assert files("blocks.kernel") == [f"{layer}.0.0" for layer in range(5)]  # 512 bytes a layer.
  assert files("embedding") == ["0.0"]  # 264 bytes.
  row = (tmp_path / "part" / "blocks.kernel" / "3.0.0").read_bytes()
  np.testing.assert_array_equal(np.frombuffer(row, np.float32).reshape(8, 16), flat["blocks/kernel"][3])


@pytest.mark.parametrize(("rows", "most"), [(30, 14), (11, 4), (256384, 8192), (7, 1), (3, 50)])
def test_little_is_stored_beyond_the_parameter(rows, most):
  """At most one row per file."""
  shape, dtype = (rows, part_writer.CHUNK_BYTES // most // 2), np.dtype(np.float16)
  chunk = part_writer.chunk_rows(shape, dtype)
  files = -(-rows // chunk)
  assert chunk <= most
  assert files == -(-rows // most)
  assert files * chunk - rows < files


def test_extra_files_are_checked_like_the_others(tmp_path):
  flat, leaves = _leaves(_params())
  part_writer.write_part(tmp_path / "part", leaves, _pieces(flat), {"source.json": b"{}"})
  assert (tmp_path / "part" / "source.json").read_bytes() == b"{}"
  (tmp_path / "part" / "source.json").write_bytes(b"[]")
  with pytest.raises(ConfigError, match=r"source\.json is corrupt"):
    checkpoint.load_params(tmp_path / "part", _abstract(_params()))


def _refused(folder, leaves, pieces) -> str:
  with pytest.raises(ConfigError) as caught:
    part_writer.write_part(folder / "part", leaves, pieces)
  assert list(folder.iterdir()) == []
  return str(caught.value)


def test_pieces_that_do_not_make_the_part(tmp_path):
  flat, leaves = _leaves(_params())
  pieces = list(_pieces(flat))
  assert "rows are missing of blocks/kernel" in _refused(tmp_path, leaves, pieces[7:])
  assert "steps has too many rows" in _refused(tmp_path, leaves, [*pieces, Piece("steps", np.zeros(1))])
  assert "other is not a parameter" in _refused(tmp_path, leaves, [*pieces, Piece("other", np.zeros(1))])
  assert "embedding: a piece [2, 5]" in _refused(tmp_path, leaves, [Piece("embedding", np.zeros((2, 5)))])
  assert "embedding: a piece [12, 6]" in _refused(tmp_path, leaves, [Piece("embedding", np.zeros((12, 6)))])


def test_values_that_cannot_be_stored(tmp_path):
  flat, leaves = _leaves(_params(), np.float16)
  flat["embedding"][3, 1] = 1e6
  assert "too large for float16: embedding" in _refused(tmp_path, leaves, _pieces(flat))
  flat["embedding"][3, 1] = np.nan
  assert "NaN or Inf: embedding" in _refused(tmp_path, leaves, _pieces(flat))


def test_an_existing_folder_is_kept(tmp_path):
  flat, leaves = _leaves(_params())
  (tmp_path / "part").mkdir()
  (tmp_path / "part" / "thesis.txt").write_text("ten years")
  with pytest.raises(ConfigError, match="exists"):
    part_writer.write_part(tmp_path / "part", leaves, _pieces(flat))
  assert [path.name for path in tmp_path.rglob("*")] == ["part", "thesis.txt"]


def test_a_source_that_breaks_off_leaves_nothing(tmp_path):
  flat, leaves = _leaves(_params())

  def broken():
    yield from list(_pieces(flat))[:5]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    part_writer.write_part(tmp_path / "part", leaves, broken())
  assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
  (tmp_path / ".part.partial" / "embedding").mkdir(parents=True)
  (tmp_path / ".part.partial" / "embedding" / "0.0").write_bytes(b"half")
  flat, leaves = _leaves(_params())
  part_writer.write_part(tmp_path / "part", leaves, _pieces(flat))
  assert [path.name for path in tmp_path.iterdir()] == ["part"]
  checkpoint.load_params(tmp_path / "part", _abstract(_params()))


def test_a_full_disk_is_one_line(tmp_path):
  resource = pytest.importorskip("resource")
  signal = pytest.importorskip("signal")
  flat, leaves = _leaves(_params())
  before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    message = _refused(tmp_path, leaves, _pieces(flat))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
  assert "cannot write" in message
  assert len(message.splitlines()) == 1
