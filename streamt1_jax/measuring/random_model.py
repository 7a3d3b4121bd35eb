"""A whole checkpoint of random weights, for programs and tests that need a model and no pictures."""

from __future__ import annotations

import jax
import numpy as np
from etils import epath
from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ModelConfig
from streamt1_jax.convert.engine import abstract_params
from streamt1_jax.io import checkpoint
from streamt1_jax.io.checkpoint import TOKENIZER_FILE
from streamt1_jax.text.umt5 import UMT5Encoder


def save(folder: epath.PathLike, model: ModelConfig, tokenizer: epath.PathLike, *, backbone_scale: float = 0.1) -> None:
  """Writes a folder that `Pipeline.load` reads; every weight is normally distributed.

  Args:
    folder: where; made if missing.
    model: sizes.
    tokenizer: sentencepiece model that is copied.
    backbone_scale: standard deviation of the backbone's weights; that of the others is 0.3.
  """
  folder, random = epath.Path(folder), np.random.default_rng(0)
  parts = {
    "backbone": (backbone_scale, lambda: CausalWanDiT(model, nnx.Rngs(0))),
    "codec": (0.3, lambda: VideoCodec(model.required_codec, rngs=nnx.Rngs(0))),
    "text": (0.3, lambda: UMT5Encoder(model.required_text, nnx.Rngs(0))),
  }
  for name, (scale, build) in parts.items():
    fill = lambda leaf, scale=scale: np.float32(scale) * random.standard_normal(leaf.shape, np.float32)
    checkpoint.save_params(folder / name, jax.tree.map(fill, abstract_params(build)))
  epath.Path(tokenizer).copy(folder / TOKENIZER_FILE)
  checkpoint.save_config(folder, model, {"source": "random weights"})
