"""Our reader of `.pt` files against files that PyTorch wrote."""

import argparse
import collections
import io
import os
import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

# ruff: noqa: E402
from streamt1_jax.config import ConfigError
from streamt1_jax.convert.formats import torch_file, weight_files
from streamt1_jax.convert.formats.lazy import LazyTensor
from tests import published_files


def _as_numpy(tensor) -> np.ndarray:
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.detach().numpy()


def _assert_same(found, expected):
  if isinstance(expected, torch.Tensor):
    assert isinstance(found, LazyTensor)
    array = np.asarray(found)
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert array.dtype == _as_numpy(expected).dtype
    assert array.tobytes() == _as_numpy(expected).tobytes()
    assert array.shape == tuple(expected.shape)
  elif isinstance(expected, dict):
    assert list(found) == list(expected)
    for key, value in expected.items():
      _assert_same(found[key], value)
  elif isinstance(expected, (list, tuple)) and not isinstance(expected, torch.Size):
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    for item, value in zip(found, expected, strict=True):
      _assert_same(item, value)
  else:
    assert found == expected


def _round_trip(tmp_path, content):
  torch.save(content, tmp_path / "file.pt")
  found = torch_file.load(tmp_path / "file.pt")
  _assert_same(found, content)
  return found


@pytest.mark.parametrize(
  "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_dtypes(tmp_path, dtype):
  dtype = getattr(torch, dtype)
  values = torch.randn(3, 4, 5) * 50
  _round_trip(tmp_path, {"weight": (values > 0) if dtype == torch.bool else values.to(dtype)})


def test_special_values_keep_their_bits(tmp_path):
  values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
  _round_trip(tmp_path, {name: values.to(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")})


def test_views_and_shared_storages(tmp_path):
  base = torch.arange(60.0).reshape(3, 4, 5)
  content = {
    "base": base,
    "again": base,
    "tail": base[1:, 2:],
    "transposed": base.permute(2, 0, 1),
    "every other": base[:, ::2, 1::3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "scalar": base[2, 3, 4],
    "empty": torch.zeros(0, 3),
    "one": torch.ones(1, 1, 1),
  }
  found = _round_trip(tmp_path, content)
  for name in ("base", "tail", "transposed", "every other", "expanded"):
    np.testing.assert_array_equal(np.concatenate(list(found[name].blocks(1))), content[name].numpy())
    np.testing.assert_array_equal(found[name].read(1, 2), content[name][1:2].numpy())


def test_containers(tmp_path):
  content = {
    "generator": collections.OrderedDict(weight=torch.ones(2), nested={"deep": [torch.zeros(1), (1, "two", None)]}),
    "step": 600,
    "large": 2**40,
    "rate": 1e-5,
    "flags": [True, False],
    "note": "é" * 300,
    "shape": torch.Size([2, 3]),
  }
  _round_trip(tmp_path, content)


def test_state_dict_of_a_module_and_its_optimizer(tmp_path):
  module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
  optimizer = torch.optim.AdamW(module.parameters())
  module(torch.ones(2, 3)).sum().backward()
  optimizer.step()
  assert hasattr(module.state_dict(), "_metadata")
  _round_trip(tmp_path, {"model": module.state_dict(), "optimizer": optimizer.state_dict()})


def test_parameters_are_tensors(tmp_path):
  torch.save({"weight": torch.nn.Parameter(torch.ones(2, 2))}, tmp_path / "file.pt")
  np.testing.assert_array_equal(torch_file.load(tmp_path / "file.pt")["weight"], np.ones((2, 2)))


def test_later_pickle_protocols(tmp_path):
  content = {"weight": torch.randn(3, 3), "note": "text", "state": torch.nn.Linear(2, 2).state_dict()}
  for protocol in (3, 4, 5):
    torch.save(content, tmp_path / "file.pt", pickle_protocol=protocol)
    _assert_same(torch_file.load(tmp_path / "file.pt"), content)


def test_pytorch_reads_our_test_files(tmp_path):
  """So that what the other tests write without PyTorch is what PyTorch writes."""
  arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "nested": {"b": np.ones(2, ml_dtypes.bfloat16)}, "n": 3}
  published_files.write_torch(tmp_path / "file.pt", arrays)
  content = torch.load(tmp_path / "file.pt", weights_only=True)
  _assert_same(torch_file.load(tmp_path / "file.pt"), content)
  np.testing.assert_array_equal(content["a"].numpy(), arrays["a"])


class _Bomb:
  """Runs a command when it is unpickled."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __reduce__(self):
    return os.system, (f"touch {self._path}",)


def test_code_is_refused_by_name_and_not_run(tmp_path):
  trace = tmp_path / "it_ran"
  for protocol in (2, 4):
    torch.save({"weight": torch.ones(2), "bomb": _Bomb(trace)}, tmp_path / "file.pt", pickle_protocol=protocol)
    with pytest.raises(ConfigError, match=r"refers to posix\.system, .* not executed"):
      torch_file.load(tmp_path / "file.pt")
    assert not trace.exists()
  torch.load(tmp_path / "file.pt", weights_only=False)
  assert trace.exists()  # The bomb was live.


def test_foreign_objects_are_refused_by_name(tmp_path):
  torch.save({"weight": torch.ones(2), "args": argparse.Namespace(lr=1)}, tmp_path / "file.pt")
  with pytest.raises(ConfigError, match=r"argparse\.Namespace"):
    torch_file.load(tmp_path / "file.pt")
  torch.save(torch.nn.Linear(2, 2), tmp_path / "file.pt")
  with pytest.raises(ConfigError, match=r"torch\.nn\.modules\.linear\.Linear"):
    torch_file.load(tmp_path / "file.pt")


def test_other_formats_of_pytorch_are_named(tmp_path):
  torch.save({"weight": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
  with pytest.raises(ConfigError, match=r"old\.pt is in the format of PyTorch before 1\.6"):
    weight_files.load(tmp_path / "old.pt")
  torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
  with pytest.raises(ConfigError, match="TorchScript"):
    weight_files.load(tmp_path / "script.pt")
  with (tmp_path / "plain.pkl").open("wb") as file:
    pickle.dump({"weight": 1}, file)
  with pytest.raises(ConfigError, match="neither a file of torch.save nor safetensors"):
    weight_files.load(tmp_path / "plain.pkl")


def test_a_real_file_cut_anywhere_is_one_line(tmp_path):
  buffer = io.BytesIO()
  torch.save({"weight": torch.randn(100), "bias": torch.randn(10)}, buffer)
  content = buffer.getvalue()
  for size in range(1, len(content), 41):
    (tmp_path / "file.pt").write_bytes(content[:size])
    with pytest.raises(ConfigError, match=r"file\.pt") as caught:
      weight_files.load(tmp_path / "file.pt")
    assert len(str(caught.value).splitlines()) == 1


def test_a_bit_flipped_anywhere_is_one_line_or_harmless(tmp_path):
  buffer = io.BytesIO()
  weight = torch.randn(100)
  torch.save({"weight": weight}, buffer)
  content, refusals = buffer.getvalue(), 0
  for position in range(0, len(content), 7):
    damaged = bytearray(content)
    damaged[position] ^= 1 << (position % 8)
    (tmp_path / "file.pt").write_bytes(damaged)
    found = _weight_or_error(tmp_path / "file.pt")
    if isinstance(found, str):
      refusals += 1
      assert len(found.splitlines()) == 1
    else:  # Padding, dates and the like.
      np.testing.assert_array_equal(found, weight.numpy())
  assert refusals > 80  # At least the 400 bytes of weights and the pickle.


def _weight_or_error(path: pathlib.Path) -> np.ndarray | str:
  try:
    return np.asarray(weight_files.load(path).content["weight"])
  except ConfigError as error:
    return str(error)
