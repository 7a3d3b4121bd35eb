"""The trained codec, for trainings and evaluations that encode clips."""

import jax.numpy as jnp
from etils import epath
from flax import nnx

from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ModelConfig
from streamt1_jax.io.checkpoint import load_params
from streamt1_jax.models import abstract_codec


def load_codec(folder: epath.PathLike, model: ModelConfig) -> VideoCodec:
  """Encoder and decoder of a model, in float32. Raises ConfigError if the folder holds no weights of its size."""
  graphdef, abstract = abstract_codec(model.required_codec)
  return nnx.merge(graphdef, load_params(folder, abstract, jnp.float32))
