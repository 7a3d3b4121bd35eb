"""The trained codec, for trainings and evaluations that encode clips."""

import jax.numpy as jnp
from etils import epath
from flax import nnx

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ModelConfig
from streamt1_jax.io.checkpoint import load_params


def load_codec(folder: epath.PathLike, model: ModelConfig) -> VideoCodec:
  """Encoder and decoder of a model, in float32. Raises ConfigError if the folder holds no weights of its size."""
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: VideoCodec(model.required_codec, rngs=nnx.Rngs(0))), nnx.Param)
  return nnx.merge(graphdef, load_params(folder, nnx.to_pure_dict(abstract), jnp.float32))
