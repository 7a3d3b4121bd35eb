"""Files of random weights are what they claim to be, to the readers of published ones.

`tests/oracle/random_weights_test.py` asks PyTorch and safetensors themselves.
"""

import json

import ml_dtypes
import numpy as np
import pytest

from streamt1_jax.convert.formats import safetensors_file, torch_file
from streamt1_jax.measuring import random_weights
from streamt1_jax.measuring.random_weights import Tensor


def _values(tensor: Tensor) -> np.ndarray:
  dtype = np.dtype(getattr(ml_dtypes, tensor.dtype, tensor.dtype))
  return np.frombuffer(b"".join(tensor.pieces()), dtype).reshape(tensor.shape)


TENSORS = {
  "matrix": Tensor((30, 20), "float32", 1),
  "narrow": Tensor((7, 3), "bfloat16", 2),
  "scalar": Tensor((), "float32", 3),
  "long": Tensor((5_000_000,), "float32", 4),  # Longer than the period of the values.
}


@pytest.mark.parametrize("name", TENSORS)
def test_values_have_the_shape_and_distribution_asked_for(name):
  values = _values(TENSORS[name]).astype(np.float32)
  assert np.isfinite(values).all()
  assert np.abs(values).max() < 0.15
  if values.size > 100:
    np.testing.assert_allclose(values.std(), 0.02, rtol=0.1)


def test_both_dtypes_hold_the_same_values_and_seeds_differ():
  wide, narrow = (_values(Tensor((40, 50), dtype, 5)) for dtype in ("float32", "bfloat16"))
  np.testing.assert_array_equal(wide, narrow.astype(np.float32))
  assert (wide != _values(Tensor((40, 50), "float32", 6))).mean() > 0.9
  assert len(np.unique(wide, axis=0)) == 40


def test_safetensors(tmp_path):
  random_weights.write_safetensors(tmp_path / "model.safetensors", TENSORS)
  loaded = safetensors_file.load(tmp_path / "model.safetensors")
  assert loaded.keys() == TENSORS.keys()
  for name, tensor in TENSORS.items():
    np.testing.assert_array_equal(np.asarray(loaded[name]), _values(tensor))


def test_shards_are_bounded_and_indexed(tmp_path):
  random_weights.write_sharded(tmp_path / "transformer", "model", TENSORS, shard_bytes=2500)
  index = json.loads((tmp_path / "transformer/model.safetensors.index.json").read_text())
  assert index["weight_map"].keys() == TENSORS.keys()
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
  assert set(index["weight_map"].values()) == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
  for name, file in index["weight_map"].items():
    loaded = safetensors_file.load(tmp_path / "transformer" / file)
    np.testing.assert_array_equal(np.asarray(loaded[name]), _values(TENSORS[name]))


def test_torch_file(tmp_path):
  random_weights.write_torch(tmp_path / "model.pt", {"generator": TENSORS, "step": 3000})
  loaded = torch_file.load(tmp_path / "model.pt")
  assert loaded["step"] == 3000
  assert loaded["generator"].keys() == TENSORS.keys()
  for name, tensor in TENSORS.items():
    np.testing.assert_array_equal(np.asarray(loaded["generator"][name]), _values(tensor))
