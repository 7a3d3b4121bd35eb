"""The models that a check of a device runs: at full size, or so small that a CPU runs them in seconds."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, preset
from streamt1_jax.execution import Execution
from streamt1_jax.generator import Models
from streamt1_jax.measuring import random_search
from streamt1_jax.models import abstract_codec, make_models
from streamt1_jax.planning import request
from streamt1_jax.planning.request import Request
from streamt1_jax.rewards.table import DEFAULT_REWARDS, PUBLISHED_REWARDS, REWARDS
from streamt1_jax.state import Condition
from streamt1_jax.typing import Params


class NotHere(Exception):
  """A part has nothing to do on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is run.

  Attributes:
    video: the model whose speed is measured.
    dtype: of its weights and activations.
    chunks: of a timed video; the last `timed` of them count, when the window is full.
    timed: those that count.
    numerics: a model for numerics, whose heads fit every kernel.
    rewards: name to configuration of the large rewards.
    frame: rows and columns of what they judge.
    product: rows and columns of the matrices whose product gives the machine's rate.
    text: tokens before and after the media of a large reward; None for those of its published text.
  """

  video: ModelConfig
  dtype: DTypeLike
  chunks: int
  timed: int
  numerics: ModelConfig
  rewards: dict[str, Any]
  frame: tuple[int, int]
  product: int
  text: tuple[int, int] | None


def _numerics(tokens: tuple[int, int]) -> ModelConfig:
  """Two heads of 128 channels, which both kernels take, and one step: with random weights, more only blow errors up."""
  model = preset("bench_mid")
  schedule = dataclasses.replace(model.schedule, denoising_steps=model.schedule.denoising_steps[:1])
  backbone = dataclasses.replace(model.backbone, dim=256, ffn_dim=512, num_heads=2, num_layers=2)
  size = {"latent_height": tokens[0], "latent_width": tokens[1]}
  return dataclasses.replace(model, backbone=backbone, schedule=schedule, **size)


def _full() -> Sizes:
  rewards = {name: REWARDS[name].make_config() for name in PUBLISHED_REWARDS}
  return Sizes(preset("wan_1_3b"), jnp.bfloat16, 10, 4, _numerics((16, 24)), rewards, (480, 832), 8192, None)


def _small() -> Sizes:
  tiny = preset("tiny")
  narrow = dataclasses.replace(tiny.backbone, dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=16)
  codec = dataclasses.replace(tiny.required_codec, base_dim=8)
  video = dataclasses.replace(tiny, backbone=narrow, codec=codec, latent_height=4, latent_width=4)
  rewards = {name: REWARDS[name].required_training.config() for name in PUBLISHED_REWARDS}
  return Sizes(video, jnp.float32, 4, 2, _numerics((4, 4)), rewards, (64, 64), 256, (16, 128))


SIZES = {"full": _full, "small": _small}
"""Sizes by name."""


@dataclasses.dataclass(frozen=True)
class RandomVideo:
  """A search with random weights that decodes and judges frames.

  Attributes:
    params: weights of all models.
    condition: a random prompt.
    models: static half of the step.
    search: how to search.
  """

  params: dict[str, Params]
  condition: Condition
  models: Models
  search: SearchConfig


def random_video(sizes: Sizes, search: SearchConfig, attention: Any = None, *, decodes: bool = True) -> RandomVideo:
  """A search of the sizes' video on one device, with the decoding that the memory plan chooses.

  Without `decodes` its frames are its latents, and nothing is judged.
  """
  model = sizes.video if decodes else dataclasses.replace(sizes.video, codec=None)
  execution = Execution(attention=attention)
  if decodes:
    kernel = request.uses_kernel(attention, jax.default_backend(), model.backbone.head_dim)
    asked = Request(model, search, {}, sizes.dtype, sizes.dtype, execution, kernel, sizes.chunks)
    plan = request.plan(asked, request.device_limit(None))
    if not plan.fits:
      raise ConfigError("the memory plan says that this device does not hold the search")
    execution = dataclasses.replace(execution, decoding=plan.chosen.decoding)
  built = random_search.build(model, execution, sizes.dtype, sizes.chunks, append_always=False)
  if not decodes:
    return RandomVideo(built.params, built.condition, built.models, search)
  image, video = (cast(Any, REWARDS[name].make(None, model.fps)) for name in DEFAULT_REWARDS)
  params = built.params | {"codec": random_like(abstract_codec(model.required_codec)[1]["decoder"], sizes.dtype)}
  condition = built.condition._replace(image_reward={}, video_reward={})
  return RandomVideo(params, condition, make_models(model, image, video, execution=execution), search)


def random_like(shapes: Params, dtype: DTypeLike | None = None, scale: float = 0.02) -> Params:
  """Normal weights of standard deviation `scale`, made on the device; integers are 1. Their own dtypes by default."""

  @jax.jit
  def make() -> Params:
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([_random_leaf(key, leaf, dtype, scale) for key, leaf in zip(keys, leaves, strict=True)])

  return make()


def _random_leaf(key: jax.Array, leaf: jax.ShapeDtypeStruct, dtype: DTypeLike | None, scale: float) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jnp.integer):
    return jnp.ones(leaf.shape, leaf.dtype)
  wanted = leaf.dtype if dtype is None else dtype
  return (scale * jax.random.normal(key, leaf.shape, jnp.bfloat16)).astype(wanted)
