"""Weights in files: both formats are read bit-exactly, and every way a file can be wrong is one clear line.

What PyTorch itself writes is read in tests/oracle/torch_file_test.py.
"""

import json
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats import weight_files
from tests.published_files import write_archive, write_safetensors, write_sharded, write_torch

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64]


def _tensors(dtype=np.float32, seed=0):
  generator = np.random.default_rng(seed)
  shapes = {"a.weight": (3, 4, 5), "a.bias": (7,), "scalar": (), "empty": (0, 2), "b.weight": (6, 2)}
  return {name: np.asarray(50 * generator.standard_normal(shape), dtype) for name, shape in shapes.items()}


def _assert_same(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
    assert np.asarray(found[name]).tobytes() == array.tobytes()


def _read_all(path):
  return {name: np.asarray(tensor) for name, tensor in weight_files.load(path).content.items()}


def _refused(path) -> str:
  with pytest.raises(ConfigError) as caught:
    _read_all(pathlib.Path(path))
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trips(tmp_path, dtype):
  tensors = _tensors(dtype)
  for name, write in (("torch", write_torch), ("safetensors", write_safetensors)):
    path = write(tmp_path / name, tensors)
    loaded = weight_files.load(path)
    _assert_same(loaded.content, tensors)
    assert loaded.files == [path]


def test_the_format_is_in_the_content_not_in_the_name(tmp_path):
  tensors = _tensors()
  _assert_same(weight_files.load(write_safetensors(tmp_path / "a.pt", tensors)).content, tensors)
  _assert_same(weight_files.load(write_torch(tmp_path / "a.safetensors", tensors)).content, tensors)


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
@pytest.mark.parametrize("max_bytes", [1, 50, 10**6])
def test_rows_arrive_in_order(tmp_path, write, max_bytes):
  tensors = _tensors()
  loaded = weight_files.load(write(tmp_path / "file", tensors)).content
  for name, array in tensors.items():
    blocks = list(loaded[name].blocks(max_bytes))
    row_bytes = array[:1].nbytes if array.ndim else array.nbytes
    assert all(block.nbytes <= max(max_bytes, row_bytes) for block in blocks)
    assert sum(block.size for block in blocks) == array.size
    assert b"".join(block.tobytes() for block in blocks) == array.tobytes()


class TestShards:
  def test_index_or_folder(self, tmp_path):
    tensors = _tensors()
    index = write_sharded(tmp_path / "model", tensors, shards=3)
    for path in (index, tmp_path / "model"):
      loaded = weight_files.load(path)
      assert loaded.path == path
      assert [file.name for file in loaded.files] == [
        index.name,
        *(f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)),
      ]
      _assert_same({name: loaded.content[name] for name in tensors}, tensors)
      assert len(loaded.content) == len(tensors)

  def test_half_a_checkpoint(self, tmp_path):
    index = write_sharded(tmp_path, _tensors(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    line = _refused(index)
    assert "model-00002-of-00003.safetensors of 3 files named by model.safetensors.index.json is missing" in line

  def test_shards_that_disagree_with_the_index(self, tmp_path):
    index = write_sharded(tmp_path, _tensors())
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"other": np.zeros(2, np.float32)})
    assert "does not hold what model.safetensors.index.json says" in _refused(index)

  def test_a_shard_without_its_index(self, tmp_path):
    write_sharded(tmp_path, _tensors()).unlink()
    assert "must hold one *.safetensors.index.json or one *.safetensors" in _refused(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    assert "give model.safetensors.index.json" in weight_files.shard_advice(shard)
    assert weight_files.shard_advice(tmp_path / "model.safetensors") == ""

  @pytest.mark.parametrize(
    ("index", "fragment"),
    [
      ({}, "no weight_map"),
      ([], "no weight_map"),
      ({"weight_map": {"a": "../a.safetensors"}}, "files beside it"),
      ({"weight_map": {"a": 3}}, "files beside it"),
    ],
  )
  def test_corrupt_index(self, tmp_path, index, fragment):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fragment in _refused(tmp_path / "model.safetensors.index.json")

  def test_index_that_is_no_json(self, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in _refused(tmp_path / "model.safetensors.index.json")


class TestOtherFiles:
  @pytest.mark.parametrize(
    ("content", "fragment"),
    [
      (b"", "0 bytes"),
      (b"\xff\xd8\xff\xe0 a picture" * 30, "neither a file of torch.save nor safetensors"),
      (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "pointer of git-lfs"),
      (b"<!DOCTYPE html><html>", "web page"),
      (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
      (b"\x1f\x8b\x08\x00", "gzip"),
      (b"a".ljust(257, b"\0") + b"ustar" + bytes(250), "tar file"),
      (b"PK\x03\x04" + bytes(100), "truncated or corrupt zip file"),
    ],
  )
  def test_named_for_what_they_are(self, tmp_path, content, fragment):
    (tmp_path / "model.pt").write_bytes(content)
    line = _refused(tmp_path / "model.pt")
    assert fragment in line
    assert "model.pt" in line

  def test_nothing_there(self, tmp_path):
    assert "does not exist" in _refused(tmp_path / "model.pt")
    assert "found none" in _refused(tmp_path)

  def test_a_zip_file_of_something_else(self, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
      archive.writestr("readme.txt", "hello")
    assert "without a data.pkl" in _refused(tmp_path / "model.pt")

  def test_not_a_dict(self, tmp_path):
    assert "holds a list" in _refused(write_torch(tmp_path / "model.pt", [1, 2]))


def _compressed(path: pathlib.Path, size: int) -> pathlib.Path:
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data.pkl", bytes(size))
  return path


class TestHostileArchives:
  def test_zip_bomb(self, tmp_path):
    path = _compressed(tmp_path / "model.pt", 50 * 2**20)
    assert path.stat().st_size < 10**5
    assert "archive/data.pkl is compressed" in _refused(path)

  def test_members_that_share_their_bytes(self, tmp_path):
    path = write_torch(tmp_path / "model.pt", _tensors())
    content = bytearray(path.read_bytes())
    first, second = _directory_entries(content)[2:4]
    content[second + 42 : second + 46] = content[first + 42 : first + 46]  # The offset of its header.
    path.write_bytes(content)
    assert "corrupt" in _refused(path)

  def test_a_member_that_claims_more_than_the_file(self, tmp_path):
    path = write_torch(tmp_path / "model.pt", _tensors())
    content = bytearray(path.read_bytes())
    entry = _directory_entries(content)[2]
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)
    assert "overlaps" in _refused(path)

  def test_an_enormous_pickle(self, tmp_path):
    write_archive(tmp_path / "model.pt", bytes(17 * 2**20), [])
    assert "at most 16777216 are read" in _refused(tmp_path / "model.pt")

  def test_a_flipped_bit_in_the_weights(self, tmp_path):
    tensors = {"a": np.full(100, 3.0, np.float32), "b": np.ones(4, np.float32)}
    path = write_torch(tmp_path / "model.pt", tensors)
    content = bytearray(path.read_bytes())
    content[content.index(tensors["a"].tobytes()) + 50] ^= 4
    path.write_bytes(content)
    loaded = weight_files.load(path).content
    np.testing.assert_array_equal(loaded["b"], tensors["b"])
    with pytest.raises(ConfigError, match=r"archive/data/0 does not have the checksum"):
      loaded["a"].read(0, 1)


def _directory_entries(content: bytes) -> list[int]:
  positions, start = [], 0
  while (start := content.find(b"PK\x01\x02", start)) >= 0:
    positions.append(start)
    start += 4
  return positions


class TestHostilePickles:
  @pytest.mark.parametrize(
    ("pickle", "fragment"),
    [
      (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "refers to os.system"),
      (b"\x80\x02cposix\nsystem\ncbuiltins\neval\n0.", "builtins.eval, posix.system"),
      (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "refers to os.system"),
      (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "instruction INST"),
      (b"\x80\x02)cos\nsystem\n\x81.", "refers to os.system"),
      (b"\x80\x02\x82\x01.", "instruction EXT1"),
      (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "corrupt"),
      (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls Global(name='torch.FloatStorage')"),
      (b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00bb.", "corrupt"),
      (b"\x80\x02}r\xff\xff\xff\xffX\x01\x00\x00\x00a.", "corrupt"),
      (b"\x80\x02X\xff\xff\xff\x7fa.", "corrupt"),
      (b"\x80\x02]K\x01u.", "corrupt"),
      (b"\x80\x02a.", "corrupt"),
      (b"\x80\x02\x85.", "corrupt"),
      (b"\x80\x02h\x05.", "corrupt"),
      (b"\x80\x02}", "corrupt"),
      (b"", "corrupt"),
    ],
  )
  def test_refused(self, tmp_path, pickle, fragment):
    write_archive(tmp_path / "model.pt", pickle, [])
    line = _refused(tmp_path / "model.pt")
    assert "data.pkl" in line
    assert fragment in line

  @pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2,), (4,)), (0, (2,), (1, 1)), (-1, (2,), (1,)), (0, (2,), (-1,))],
  )
  def test_views_that_leave_their_storage(self, tmp_path, offset, shape, strides):
    """Storage 0 has four numbers."""
    numbers = lambda values: b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x04tQ"
    view = numbers([offset])[1:-1] + numbers(shape) + numbers(strides) + b"\x89)"
    pickle = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tRs."
    write_archive(tmp_path / "model.pt", pickle, [np.zeros(4, np.float32)])
    assert "a tensor" in _refused(tmp_path / "model.pt")

  def test_a_storage_of_another_size(self, tmp_path):
    pickle = write_torch(tmp_path / "model.pt", {"a": np.zeros(4, np.float32)})
    with zipfile.ZipFile(pickle) as archive:
      data = archive.read("archive/data.pkl")
    write_archive(pickle, data, [np.zeros(3, np.float32)])
    assert "archive/data/0 has 12 bytes, expected 4 of float32" in _refused(pickle)


class TestDamagedSafetensors:
  def _path(self, tmp_path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return tmp_path / "model.safetensors"

  def test_cut_anywhere(self, tmp_path):
    content = write_safetensors(tmp_path / "model.safetensors", _tensors()).read_bytes()
    for size in range(0, len(content), 13):
      (tmp_path / "cut").write_bytes(content[:size])
      _refused(tmp_path / "cut")

  def test_bytes_too_many(self, tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", _tensors())
    path.write_bytes(path.read_bytes() + b"\0")
    assert "truncated or corrupt" in _refused(path)

  @pytest.mark.parametrize(
    ("entry", "fragment"),
    [
      ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "invalid shape"),
      ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "expected usize"),
      ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "expected usize"),
      ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}, "overflow"),
      ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "invalid offset for tensor `a`"),
      ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "invalid offset for tensor `a`"),
      ({"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}, "invalid shape"),
      ({"dtype": "F32", "shape": [1]}, "missing field `data_offsets`"),
      ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "this program reads F64"),
      ({"dtype": "F9", "shape": [4], "data_offsets": [0, 4]}, "unknown variant `F9`"),
      (3, "expected struct TensorInfo"),
    ],
  )
  def test_corrupt_entries(self, tmp_path, entry, fragment):
    line = _refused(self._path(tmp_path, {"a": entry}, bytes(4)))
    assert fragment in line
    assert str(tmp_path / "model.safetensors") in line

  def test_headers_that_are_no_json(self, tmp_path):
    assert "invalid JSON" in _refused(self._path(tmp_path, b"{'a': 1}"))
    assert "invalid UTF-8" in _refused(self._path(tmp_path, b"{\xff}"))
    assert "recursion limit" in _refused(self._path(tmp_path, b'{"a":' + b"[" * 10**5 + b"}"))

  @pytest.mark.parametrize(("length", "fragment"), [(10**6, "invalid header length"), (2**40, "neither")])
  def test_a_header_longer_than_the_file(self, tmp_path, length, fragment):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    assert fragment in _refused(tmp_path / "model.safetensors")

  def test_overlapping_tensors(self, tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert "invalid offset for tensor" in _refused(self._path(tmp_path, {"a": entry, "b": entry}, bytes(4)))

  def test_a_name_of_two_lines(self, tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    assert "invalid offset for tensor `a" in _refused(self._path(tmp_path, {"a\nb": entry}, bytes(8)))


def test_tensors_in_another_order_than_the_header(tmp_path):
  """The format leaves the order of the names free; the bytes decide."""
  header = {
    "last": {"dtype": "F32", "shape": [1], "data_offsets": [6, 10]},
    "none": {"dtype": "F32", "shape": [0, 2], "data_offsets": [6, 6]},
    "first": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
  }
  first, last = np.array([1, -2, 3], ml_dtypes.bfloat16), np.array([7], np.float32)
  text = json.dumps(header).encode()
  path = tmp_path / "model.safetensors"
  path.write_bytes(struct.pack("<Q", len(text)) + text + first.tobytes() + last.tobytes())
  found = _read_all(path)
  np.testing.assert_array_equal(found["first"], first)
  np.testing.assert_array_equal(found["last"], last)
  assert found["none"].shape == (0, 2)


def test_a_file_of_the_library(tmp_path):
  tensors = _tensors() | {"half": np.arange(6, dtype=np.float16).reshape(2, 3)}
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  found = _read_all(tmp_path / "model.safetensors")
  assert found.keys() == tensors.keys()
  for name, array in tensors.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found[name], array)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
  path = write_safetensors(tmp_path / "model.safetensors", {"a": np.ones((9, 9), np.float32)})
  tensor = weight_files.load(path).content["a"]
  path.write_bytes(path.read_bytes()[:-4])
  np.testing.assert_array_equal(tensor.read(0, 8), np.ones((8, 9)))
  with pytest.raises(ConfigError, match=r"model\.safetensors is truncated"):
    tensor.read(8, 9)
