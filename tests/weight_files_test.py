"""Weights in files: both formats are read bit-exactly, and every way a file can be wrong is one clear line.

What PyTorch itself writes is read in tests/oracle/torch_file_test.py.
"""

import json
import pathlib
import struct
import time
import tracemalloc
import warnings
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
      # Lists in lists, ten times each, 25 bytes a level: as text they would have 10^60 entries.
      (b"\x80\x02(]q\x09" + (b"](" + b"h\x09" * 10 + b"eq\x09") * 60 + b"t.", "no checkpoint does"),
      (b"\x80\x02" + b"N" * (2**24 - 3) + b".", "more than 524288 instructions"),
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


def _torch_view(path, offset, shape, strides, values, kind="Float") -> pathlib.Path:
  """A file whose entry "a" is a view of one storage."""

  def number(value):
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)

  text = lambda value: b"X" + struct.pack("<I", len(value)) + value
  numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"
  storage = b"(" + text(b"storage") + f"ctorch\n{kind}Storage\n".encode() + text(b"0") + text(b"cpu")
  view = number(offset) + numbers(shape) + numbers(strides) + b"\x89)"
  pickle = b"\x80\x02}" + text(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n("
  write_archive(path, pickle + storage + number(values.size) + b"tQ" + view + b"tRs.", [values])
  return path


class TestViews:
  """Every number of a view is where its offset and strides say, whichever rows are read."""

  @pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
      (0, (4, 6), (6, 1)),
      (5, (3, 4), (4, 1)),
      (0, (6, 4), (1, 6)),  # Transposed.
      (2, (3, 2), (7, 3)),  # Every third of every seventh.
      (23, (), ()),
      (3, (5, 2), (0, 1)),  # One row five times.
      (1, (2, 3, 2), (11, 2, 5)),
      (23, (1, 1), (2**50, 2**59)),  # A stride that nothing goes along.
      (0, (0, 5), (2**59, 1)),
      (9, (2, 0), (5, 5)),
    ],
  )
  def test_by_hand(self, tmp_path, offset, shape, strides):
    values = np.arange(24, dtype=np.float32) ** 2
    tensor = weight_files.load(_torch_view(tmp_path / "a.pt", offset, shape, strides, values)).content["a"]
    at = lambda index: values[offset + sum(i * stride for i, stride in zip(index, strides))]
    expected = np.array([at(index) for index in np.ndindex(shape)], np.float32).reshape(shape)
    np.testing.assert_array_equal(np.asarray(tensor), expected)
    for row in range(min(shape[0], 10) if shape else 0):
      np.testing.assert_array_equal(tensor.read(row, row + 1), expected[row : row + 1])

  @pytest.mark.parametrize(
    ("offset", "shape", "strides", "fragment"),
    [
      (21, (2, 2), (2, 1), "leaves its storage"),
      (0, (2**40, 2), (2**40, 1), "leaves its storage"),
      (0, (2, 1), (2**70, 1), "strides must be whole numbers of 0 to 2^59"),
      (2**70, (1,), (1,), "offset must be"),
      (0, (2**63,), (0,), "shape must be"),
      (0, (2**40, 2**40), (0, 0), "more than 2^59 numbers"),
      (0, (2**59, 2**59, 0), (0, 0, 0), "more than 2^59 numbers"),
      (0, (1,) * 65, (1,) * 65, "65 dimensions; at most 64"),
      (0, (2**58,) * 20_000, (0,) * 20_000, "20000 dimensions"),
      (0, (1, 1), (1,), "2 dimensions and 1 strides"),
    ],
  )
  def test_claims_beyond_any_model(self, tmp_path, offset, shape, strides, fragment):
    assert fragment in _refused(_torch_view(tmp_path / "a.pt", offset, shape, strides, np.zeros(24, np.float32)))


class TestMembers:
  """The places of a zip file that decide which bytes are a storage."""

  def _members(self, path, *members) -> pathlib.Path:
    pickle = write_torch(path, {"a": np.arange(6, dtype=np.float32)})
    with zipfile.ZipFile(pickle) as archive:
      data = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
      for name, content in (("archive/data.pkl", data), *members):
        archive.writestr(name, content)
    return path

  def test_big_endian_numbers(self, tmp_path):
    numbers = np.arange(6, dtype=">f4").tobytes()
    path = self._members(tmp_path / "a.pt", ("archive/byteorder", "big"), ("archive/data/0", numbers))
    assert "holds big-endian numbers" in _refused(path)
    little = self._members(tmp_path / "b.pt", ("archive/data/0", np.arange(6, dtype="<f4").tobytes()))
    np.testing.assert_array_equal(_read_all(little)["a"], np.arange(6))  # Before 2.1 PyTorch wrote no byte order.

  def test_a_member_that_is_there_twice(self, tmp_path):
    one, other = (np.full(6, value, np.float32).tobytes() for value in (1, 2))
    path = self._members(tmp_path / "a.pt", ("archive/data/0", one), ("archive/data/0", other))
    assert "archive/data/0 overlaps another member" in _refused(path)

  def test_data_inside_the_data_of_another(self, tmp_path):
    """A storage whose bytes hold a whole member of their own, header included."""
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w") as archive:
      archive.writestr("archive/data/1", bytes(8))
    local = inner.read_bytes()[: 30 + len("archive/data/1") + 8]
    path = self._members(tmp_path / "a.pt", ("archive/data/0", b"\0" * 8 + local), ("archive/data/1", bytes(8)))
    content = bytearray(path.read_bytes())
    entry = _directory_entries(content)[2]
    content[entry + 42 : entry + 46] = struct.pack("<I", content.index(local))
    path.write_bytes(content)
    assert "overlaps another member" in _refused(path)

  def test_a_checksum_that_is_wrong(self, tmp_path):
    path = self._members(tmp_path / "a.pt", ("archive/data/0", bytes(24)))
    content = bytearray(path.read_bytes())
    entry = _directory_entries(content)[1]
    content[entry + 16 : entry + 20] = bytes(4)
    path.write_bytes(content)
    line = _refused(path)
    assert "archive/data/0 does not have the checksum it was written with" in line
    assert "PyTorch can leave checksums out" in line
    assert "set_crc32_options(True)" in line

  @pytest.mark.parametrize("offset", [2**31, 2**62, 2**64 - 1])
  def test_a_member_beyond_any_file(self, tmp_path, offset):
    path = self._members(tmp_path / "a.pt", ("archive/data/0", bytes(24)))
    content = bytearray(path.read_bytes())
    entry = _directory_entries(content)[1]
    name = len("archive/data/0")
    content[entry + 42 : entry + 46] = b"\xff" * 4
    content[entry + 30 : entry + 32] = struct.pack("<H", 12)
    content[entry + 46 + name : entry + 46 + name] = struct.pack("<HHQ", 1, 8, offset)
    end = content.index(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", struct.unpack("<I", content[end + 12 : end + 16])[0] + 12)
    path.write_bytes(content)
    assert "is truncated: it ends before byte" in _refused(path)

  @pytest.mark.parametrize(
    ("count", "fragment"), [(70_000, "table of contents has 70000 entries"), (300_000, "at most 8388608 are read")]
  )
  def test_members_without_end(self, tmp_path, count, fragment):
    """A table of contents of many members, all at the same empty place."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 8) + bytes(16)
    table = b"".join(entry + b"%08d" % index for index in range(count))
    end = b"PK\x05\x06" + bytes(4) + struct.pack("<HHIIH", count % 2**16, count % 2**16, len(table), 34, 0)
    path = tmp_path / "a.pt"
    path.write_bytes(b"PK\x03\x04" + bytes(30) + table + end)
    assert fragment in _refused(path)


class TestLimits:
  """Headers that cost nothing to write and much to believe."""

  def _path(self, tmp_path, text, data=b""):
    text = text.encode() if isinstance(text, str) else json.dumps(text).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return tmp_path / "model.safetensors"

  @pytest.mark.parametrize(
    ("entry", "fragment"),
    [
      ({"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}, "65 dimensions; at most 64"),
      ({"dtype": "F32", "shape": [1] * 5000, "data_offsets": [0, 4]}, "5000 dimensions"),
      ({"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}, "shape must be whole numbers of 0 to 2^59"),
      ({"dtype": "F32", "shape": [2**59, 2**59, 0], "data_offsets": [0, 0]}, ""),
      ({"dtype": "F32", "shape": [0] + [2**59] * 10, "data_offsets": [0, 0]}, ""),
      ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "model.safetensors"),
      ({"dtype": {"F32": None}, "shape": [1], "data_offsets": [0, 4]}, "a tensor needs dtype"),
      (["F32", [1], [0, 4]], "a tensor needs dtype"),
    ],
  )
  def test_claims_beyond_any_model(self, tmp_path, entry, fragment):
    size = 4 if (entry if isinstance(entry, list) else entry["data_offsets"])[-1] in (4, [0, 4]) else 0
    assert fragment in _refused(self._path(tmp_path, {"a": entry}, bytes(size)))

  def test_rows_without_numbers_are_one_block(self, tmp_path):
    entry = {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}
    tensor = weight_files.load(self._path(tmp_path, {"a": entry})).content["a"]
    (block,) = tensor.blocks(1000)
    assert block.shape == (2**40, 0)

  def test_a_name_that_stands_twice(self, tmp_path):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    path = self._path(tmp_path, f'{{"a": {entry}, "a": {entry}}}', bytes(4))
    assert "the name 'a' stands twice" in _refused(path)

  def test_an_entry_whose_field_stands_twice(self, tmp_path):
    path = self._path(
      tmp_path, '{"a": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)
    )
    assert "duplicate field `dtype`" in _refused(path)

  def test_names_of_any_length(self, tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert "1 to 1024 characters" in _refused(self._path(tmp_path, {"x" * 10**6: entry}, bytes(4)))
    assert "1 to 1024 characters" in _refused(self._path(tmp_path, {"": entry}, bytes(4)))
    line = _refused(self._path(tmp_path, {"a\n\x1b[2J": entry | {"dtype": "F8_E4M3"}}, bytes(1)))
    assert line.isprintable()

  def test_300_000_empty_entries(self, tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path = self._path(tmp_path, "{" + ",".join(f'"{index}":{entry}' for index in range(300_000)) + "}")
    start = time.perf_counter()
    assert "at most 16777216 are read" in _refused(path)
    assert time.perf_counter() - start < 5  # 0.05 s on an idle machine; parsed, they took 10 s.

  def test_a_header_of_brackets(self, tmp_path):
    """Empty lists are three bytes in the file and 64 in memory."""
    path = self._path(tmp_path, '{"a":[' + "[]," * (5 * 2**20) + "[]]}")
    tracemalloc.start()
    assert "lists and objects" in _refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**20

  def test_a_header_longer_than_any_model_needs(self, tmp_path):
    assert "at most 16777216" in _refused(self._path(tmp_path, "{" + " " * 2**24 + "}"))

  @pytest.mark.parametrize("name", ["x" * 300, "\0", "é" * 200, "\ud800", "a\nb", "..", ""])
  def test_shards_of_any_name(self, tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert _refused(tmp_path).isprintable()

  def test_an_index_that_claims_too_much(self, tmp_path):
    for text, fragment in (
      (json.dumps({"weight_map": {str(index): f"{index}.safetensors" for index in range(70_000)}}), "70000 entries"),
      ('{"weight_map": {' + ",".join(f'"{i}": "a"' for i in range(10)) + ', "3": "b"}}', "'3' stands twice"),
      ('{"weight_map": ' + "[" * 2**21, "too many lists and objects"),
      (" " * (2**26 + 1), "is too large"),
    ):
      (tmp_path / "model.safetensors.index.json").write_text(text)
      assert fragment in _refused(tmp_path)


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
