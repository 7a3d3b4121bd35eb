"""PyTorch and safetensors read the files of random weights as files of their own."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file

# ruff: noqa: E402
from streamt1_jax.measuring import random_weights
from streamt1_jax.measuring.random_weights import Tensor

TENSORS = {
  "model.matrix": Tensor((30, 20), "float32", 1),
  "model.narrow": Tensor((7, 3), "bfloat16", 2),
  "model.scalar": Tensor((), "float32", 3),
}


def test_torch_and_safetensors_read_the_same(tmp_path):
  random_weights.write_torch(tmp_path / "model.pt", {"generator_ema": TENSORS, "step": 3000})
  random_weights.write_safetensors(tmp_path / "model.safetensors", TENSORS)
  loaded = torch.load(tmp_path / "model.pt", weights_only=True)
  other = load_file(tmp_path / "model.safetensors")
  assert loaded["step"] == 3000
  assert loaded["generator_ema"].keys() == other.keys() == TENSORS.keys()
  for name, tensor in TENSORS.items():
    assert tuple(other[name].shape) == tensor.shape
    assert str(other[name].dtype) == f"torch.{tensor.dtype}"
    assert torch.equal(loaded["generator_ema"][name], other[name])
    raw = np.frombuffer(b"".join(tensor.pieces()), np.uint8)
    np.testing.assert_array_equal(other[name].contiguous().reshape(-1).view(torch.uint8).numpy(), raw)
