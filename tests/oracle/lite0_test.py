"""EfficientNet-Lite0 against its port for PyTorch, with random parameters from a file in PyTorch's old format."""

import numpy as np
import pytest

from streamt1_jax.evaluation.metrics import lite0

torch = pytest.importorskip("torch")
port = pytest.importorskip("efficientnet_lite_pytorch")


def test_features_with_random_weights(tmp_path):
  model = port.EfficientNet.from_name("efficientnet-lite0").eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.state_dict().items():
      if name.endswith("running_var"):
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
      elif value.dtype == torch.float32:
        fan = value[0].numel() if value.ndim > 1 else 4
        value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5)
  torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
  params = lite0.folded(lite0.read_state_dict(tmp_path / "old.pth"))
  pictures = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
  inputs = torch.from_numpy((pictures.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
  with torch.no_grad():
    expected = model.extract_features(inputs).mean((2, 3)).numpy()
  assert expected.std() > 0.1
  np.testing.assert_allclose(np.asarray(lite0.features(params, pictures)), expected, atol=5e-5)
