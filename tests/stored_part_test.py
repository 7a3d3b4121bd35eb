"""Reading a stored part piece by piece: whatever box, chunks and slabs, the values are those that were stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.io import checkpoint, part_writer, stored_part

SHAPE = (11, 4, 6)
VALUES = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
ABSTRACT = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}


@pytest.fixture(params=["database", "one chunk", "chunks of 3 rows"])
def folder(request, tmp_path, monkeypatch):
  """The same weights in orbax's database, and as a conversion writes them, in one chunk and in several."""
  if request.param == "database":
    checkpoint.save_params(tmp_path / "part", {"w": VALUES})
  else:
    if request.param == "chunks of 3 rows":
      monkeypatch.setattr(part_writer, "CHUNK_BYTES", 3 * VALUES[0].nbytes)
    part_writer.write_part(tmp_path / "part", ABSTRACT, [part_writer.Piece("w", VALUES)])
  return tmp_path / "part"


@pytest.fixture(params=[1, 5])
def slab_rows(request, monkeypatch):
  monkeypatch.setattr(stored_part, "_SLAB_BYTES", request.param * VALUES[0].nbytes)


@pytest.mark.usefixtures("slab_rows")
class TestReading:
  @pytest.mark.parametrize(
    "box", [np.s_[:], np.s_[2:9], np.s_[5:6], np.s_[4:11, 1:3], np.s_[:, :, 2:5], np.s_[1:2, 3:]]
  )
  def test_boxes(self, folder, box):
    part = stored_part.open_part(folder, ABSTRACT)
    box = box if isinstance(box, tuple) else (box,)
    values = part.read("w", box)
    np.testing.assert_array_equal(values, VALUES[box])
    assert values.ctypes.data % 64 == 0

  @pytest.mark.parametrize("rows", [[0], [10], [2, 3, 7], list(range(11))])
  def test_rows(self, folder, rows):
    part = stored_part.open_part(folder, ABSTRACT)
    np.testing.assert_array_equal(part.read_rows("w", np.array(rows)), VALUES[rows])

  def test_conversion(self, folder):
    part = stored_part.open_part(folder, ABSTRACT, jnp.bfloat16)
    np.testing.assert_array_equal(part.read("w", (slice(1, 8),)), VALUES[1:8].astype(jnp.bfloat16))
    np.testing.assert_array_equal(part.read_rows("w", np.array([1, 4])), VALUES[[1, 4]].astype(jnp.bfloat16))


def test_slabs_end_between_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(part_writer, "CHUNK_BYTES", 3 * VALUES[0].nbytes)
  monkeypatch.setattr(stored_part, "_SLAB_BYTES", 7 * VALUES[0].nbytes)
  part_writer.write_part(tmp_path / "part", ABSTRACT, [part_writer.Piece("w", VALUES)])
  store = stored_part.open_part(tmp_path / "part", ABSTRACT).stores["w"]
  assert list(stored_part._slabs(store)) == [slice(0, 6), slice(6, 11)]
  shifted = store[2:][stored_part.ts.d[0].translate_to[0]]
  assert list(stored_part._slabs(shifted)) == [slice(0, 4), slice(4, 9)]


def test_files_that_vanish_after_the_check_are_one_line(folder):
  part = stored_part.open_part(folder, ABSTRACT)
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(ConfigError, match="part cannot be read") as error:
    part.read("w")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("axis", [0, 1])
def test_shards_of_every_layout_are_restored(folder, axis):
  shape = (8, 4, 6) if axis == 0 else SHAPE
  devices = jax.devices()[:4]
  mesh = jax.sharding.Mesh(np.array(devices), ("model",))
  sharding = jax.NamedSharding(mesh, jax.P(*[None] * axis, "model"))
  if axis == 0:
    checkpoint.save_params(folder.parent / "even", {"w": VALUES[:8]})
    folder = folder.parent / "even"
  loaded = checkpoint.load_params(folder, {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)})["w"]
  assert loaded.sharding == sharding
  np.testing.assert_array_equal(loaded, VALUES[: shape[0]])


def test_bounding_box():
  boxes = [(slice(2, 4), slice(None)), (slice(6, 7), slice(0, 2))]
  assert stored_part.bounding_box(boxes, (8, 5)) == (slice(2, 7), slice(0, 5))
