"""A search small enough for a test: random weights everywhere, latents for frames, rewards with fixed patterns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.config import BackboneConfig, ModelConfig, ScheduleConfig, SearchConfig
from streamt1_jax.generator import Models
from streamt1_jax.models import abstract_backbone, make_models
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import Condition

MODEL = ModelConfig(
  name="small",
  backbone=BackboneConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    freq_dim=8,
    text_dim=6,
    text_len=5,
    latent_channels=4,
    max_frames=192,
  ),
  codec=None,
  text=None,
  latent_height=4,
  latent_width=4,
  schedule=ScheduleConfig(denoising_steps=(1000, 500)),
)
SEARCH = SearchConfig(sliding_window=3, max_sink_frames=6, long_threshold=0.0)
FRAME = (4, 4, 4)  # channels, rows, columns of a latent frame of MODEL


def pattern(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(FRAME).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ImageMatch(Promptless):
  """Mean product of a chunk's frames with a fixed pattern."""

  seed: int = 1

  def __call__(self, params, condition, chunk, info):
    return (chunk * pattern(self.seed)[None]).mean()


@dataclasses.dataclass(frozen=True)
class WindowChecksum(Promptless):
  """Sum over the window's frames of (index + 1) * mean(frame * pattern): depends on every frame and on its place."""

  seed: int = 2

  def __call__(self, params, condition, window, info):
    index = jnp.arange(window.past.shape[0] + window.chunk.shape[0])
    frames = window.take(jnp.minimum(index, window.num_frames - 1))
    match = (frames * pattern(self.seed)[None]).mean(axis=(1, 2, 3))
    return jnp.where(index < window.num_frames, (index + 1) * match, 0.0).sum()

  def by_numpy(self, frames: np.ndarray) -> float:
    """The same of exactly these frames."""
    match = (frames.astype(np.float64) * pattern(self.seed)).mean(axis=(1, 2, 3))
    return float((np.arange(1, len(frames) + 1) * match).sum())


def random_leaf(path, leaf, generator: np.random.Generator) -> np.ndarray:
  """Values at the scale a trained model has; nothing is zero or one, which would hide a mistake."""
  name, noise = path[-1].key, generator.standard_normal(leaf.shape)
  if name == "kernel":
    noise = noise * leaf.shape[-2] ** -0.5
  elif name == "scale":
    noise = 1.0 + 0.2 * noise
  else:
    noise = 0.3 * noise
  return jnp.asarray(noise, leaf.dtype)


@functools.cache
def backbone(model: ModelConfig = MODEL, seed: int = 0) -> tuple[nnx.GraphDef, dict]:
  """Graph definition and random float32 parameters."""
  graphdef, shapes = abstract_backbone(model)
  generator = np.random.default_rng(seed)
  fill = lambda path, leaf: random_leaf(path, leaf, generator)
  return graphdef, jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def models(model: ModelConfig = MODEL) -> Models:
  return make_models(model, ImageMatch(), WindowChecksum())


def params(model: ModelConfig = MODEL) -> dict:
  return {"backbone": backbone(model)[1], "codec": {}, "image_reward": {}, "video_reward": {}}


@functools.partial(jax.jit, static_argnums=0)
def _text_memory(graphdef, weights, embeddings):
  return nnx.merge(graphdef, weights).text_memory(embeddings)


def condition(num_chunks: int, prompt: int = 0, model: ModelConfig = MODEL) -> Condition:
  """Condition of random text embeddings; `prompt` chooses them."""
  graphdef, weights = backbone(model)
  shape = (model.backbone.text_len, model.backbone.text_dim)
  embeddings = jnp.asarray(np.random.default_rng(100 + prompt).standard_normal(shape), jnp.float32)
  return Condition(_text_memory(graphdef, weights, embeddings), (), (), jnp.int32(num_chunks))


def per_candidate(x) -> np.ndarray:
  """[K, B, ...] to [N, ...]."""
  return np.asarray(x).reshape(-1, *np.shape(x)[2:])
