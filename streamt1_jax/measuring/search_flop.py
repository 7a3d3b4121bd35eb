"""FLOP of a search, from shapes: 2 per multiply-add, for the forwards it makes and the keys that are visible.

  cost.Cost (counted work) ── Prices (FLOP of one piece) ── Flop

Products and convolutions count, nothing else: rewards without weights cost nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from streamt1_jax.codec.base import Codec
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.cost import Cost
from streamt1_jax.generator import Models
from streamt1_jax.measuring import flop_count
from streamt1_jax.models import abstract_params, make_models
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards.base import LoadedReward
from streamt1_jax.rewards.table import PUBLISHED_REWARDS, REWARDS
from streamt1_jax.state import Condition


def forward_flop(model: ModelConfig, visible_chunks: float) -> float:
  """FLOP of one forward of one chunk with cached text that sees `visible_chunks` chunks, its own included."""
  c, tokens = model.backbone, model.chunk_tokens
  # Self-attention has four square projections, cross-attention two: its keys and values are cached.
  linear = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
  self_attention = 4 * tokens * visible_chunks * tokens * c.dim
  cross_attention = 4 * tokens * c.text_len * c.dim
  patches = 2 * 2 * tokens * c.latent_channels * c.patch_size**2 * c.dim
  time = 2 * model.chunk_frames * (c.freq_dim * c.dim + c.dim**2 + 6 * c.dim**2)
  return c.num_layers * (linear + self_attention + cross_attention) + patches + time


def search_flop(model: ModelConfig, search: SearchConfig, visible: Iterable[Float[np.ndarray, " beams"]]) -> float:
  """FLOP of a search; `visible` has, chunk by chunk, how many chunks each beam of every prompt showed."""
  forwards = search.beam_size * len(model.schedule.denoising_steps) + 1
  return sum(forwards * forward_flop(model, seen) for chunk in visible for seen in chunk)


class Flop(NamedTuple):
  """FLOP of the parts of a search, which add up."""

  forwards: float = 0.0
  decoding: float = 0.0
  image_reward: float = 0.0
  video_reward: float = 0.0

  @property
  def tflop(self) -> float:
    """All of them, in TFLOP."""
    return sum(self) / 1e12


def add(parts: Iterable[Flop]) -> Flop:
  """The sum."""
  return Flop(*map(sum, zip(*(Flop(), *parts), strict=True)))


@dataclasses.dataclass(frozen=True)
class Prices:
  """FLOP of one piece of work, of a model at its own size and of its rewards.

  Attributes:
    model: gives those of a forward.
    frame: of decoding one latent frame of a stream.
    begin: by how much the first `chunk_frames` of a stream are cheaper.
    image: of judging one frame: an image reward looks at frames by themselves.
    video: of judging one window or video, by its frames.
    uncounted: rewards with weights whose FLOP nobody counts.
  """

  model: ModelConfig
  frame: float
  begin: float
  image: float
  video: Callable[[int], float]
  uncounted: tuple[str, ...] = ()

  def of(self, cost: Cost, begun: int = 0, seen: float = 1.0) -> Flop:
    """FLOP of what was counted.

    Args:
      cost: calls of the video reward are taken to be of one length.
      begun: streams that the decodes began.
      seen: chunks that a forward saw, its own included; the mean.
    """
    decoding = (cost.decoded + cost.previewed) * self.frame - begun * self.begin
    video = cost.video_calls and cost.video_calls * self.video(round(cost.video_frames / cost.video_calls))
    return Flop(cost.forwards * forward_flop(self.model, seen), decoding, cost.image_frames * self.image, video)


def prices(pipeline: Pipeline, condition: Condition) -> Prices:
  """The prices of a loaded model; prompts are as long as that of `condition`."""
  size = pipeline.models.codec.frame_shape()[:2]
  uncounted = []

  def reward(loaded: LoadedReward, conditions: Any) -> Callable[[int], float]:
    terms = []
    for term in loaded.reward.terms:
      spec = REWARDS.get(term.name)
      if spec is not None and spec.candidate_flop is not None:
        text = conditions[term.name]
        terms.append((spec, term.reward, text.before.shape[0] + text.after.shape[0]))
      elif jax.tree.leaves(loaded.params[term.name]):
        uncounted.append(term.name)
    return lambda frames: float(sum(spec.flop(reward, frames, size, tokens) for spec, reward, tokens in terms))

  image = reward(pipeline.rewards.image, condition.image_reward)(1)
  video = reward(pipeline.rewards.video, condition.video_reward)
  return Prices(pipeline.config, *_decode_flop(pipeline.models.codec, pipeline.config), image, video, tuple(uncounted))


def published(model: ModelConfig) -> Models:
  """The static half of a search of `model` that the published reward models judge; no weights are made."""
  return make_models(model, *(_published_reward(name, model) for name in PUBLISHED_REWARDS))


def published_prices(model: ModelConfig) -> Prices:
  """The prices of a model with a codec, and of the published reward models with a prompt of 127 tokens."""
  codec = published(model).codec
  height, width, _ = codec.frame_shape()

  def reward(name: str) -> Callable[[int], float]:
    spec, made = REWARDS[name], _published_reward(name, model)
    return lambda frames: float(spec.flop(made, frames, (height, width), sum(spec.required_text.length)))

  return Prices(model, *_decode_flop(codec, model), reward("hpsv3")(1), reward("videoalign"))


def _published_reward(name: str, model: ModelConfig) -> Any:
  return REWARDS[name].make(REWARDS[name].make_config(), model.fps)


@functools.cache
def _decode_flop(codec: Codec, model: ModelConfig) -> tuple[float, float]:
  """FLOP of a latent frame of a stream, and by how much its first chunk is cheaper. Nothing is computed."""
  params = abstract_params(model, jnp.float32)["codec"]
  latents = jax.ShapeDtypeStruct(model.latent_shape, jnp.float32)
  state = jax.eval_shape(codec.init_state, params)
  chunk = lambda first: flop_count.count(
    jax.make_jaxpr(lambda *inputs: codec.decode(*inputs, first=first))(params, latents, state)
  )
  first, later = chunk(True), chunk(False)
  return later / model.chunk_frames, later - first


def plain_flop(prices: Prices, num_chunks: int, given_chunks: int = 0) -> Flop:
  """FLOP of plain streaming of the same length, which judges nothing."""
  model = prices.model
  chunks = range(given_chunks, given_chunks + num_chunks)
  steps = len(model.schedule.denoising_steps) + 1
  forwards = sum(steps * forward_flop(model, min(index, most_seen(model)) + 1) for index in chunks)
  first = prices.begin if given_chunks == 0 else 0.0
  return Flop(forwards, num_chunks * model.chunk_frames * prices.frame - first)


def most_seen(model: ModelConfig) -> int:
  """Chunks that a memory without added sinks has, once it is full, for the next one to see."""
  return model.sink_frames // model.chunk_frames + model.window_chunks - 1
