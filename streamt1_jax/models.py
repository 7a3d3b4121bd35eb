"""From the sizes of a model to what a search calls: `make_models` puts the static half together, without any weights.

ModelConfig ── graph definitions ──┐
rewards ───────────────────────────┼── Models, static under `jit`
Execution ─────────────────────────┘
ModelConfig ── abstract_params ─────── shapes of the weights, to load them or to compile for them
"""

import functools

import jax
from flax import nnx
from jax.typing import DTypeLike

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.codec.base import Codec, LatentCodec
from streamt1_jax.codec.streaming import StreamingDecoder
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import CodecConfig, ConfigError, ModelConfig
from streamt1_jax.execution import Execution
from streamt1_jax.generator import Models
from streamt1_jax.nn.abstract import abstract_module
from streamt1_jax.noise_propagation import DrawNoise, gaussian_noise
from streamt1_jax.rewards.base import JudgesChunk, JudgesWindow
from streamt1_jax.sampling import SAMPLERS
from streamt1_jax.typing import Params
from streamt1_jax.wan_generator import WanGenerator


def make_models(
  config: ModelConfig,
  image_reward: JudgesChunk,
  video_reward: JudgesWindow,
  *,
  execution: Execution | None = None,
  draw_noise: DrawNoise | None = None,
) -> Models:
  """The static half of a search over a Wan model; no weights are made.

  Args:
    config: sizes. A model without a codec is searched in latent space: its frames are its latent frames.
    image_reward: gives the short-term score.
    video_reward: gives the long-term score.
    execution: on which devices, and how; one device by default.
    draw_noise: seed to noise; standard normal draws by default.

  Raises:
    ConfigError: there is no sampler of the name that the schedule gives.
  """
  if config.schedule.sampler not in SAMPLERS:
    raise ConfigError(f"schedule.sampler must be one of {', '.join(SAMPLERS)}, got {config.schedule.sampler!r}")
  execution = execution or Execution()
  return Models(
    generator=WanGenerator(config, abstract_backbone(config)[0]),
    codec=_codec(config, frame_by_frame=execution.decoding != "together"),
    image_reward=image_reward,
    video_reward=video_reward,
    draw_noise=draw_noise or gaussian_noise(config.latent_shape, len(config.schedule.denoising_steps)),
    sampler=SAMPLERS[config.schedule.sampler],
    execution=execution,
  )


def _codec(config: ModelConfig, *, frame_by_frame: bool) -> Codec:
  if config.codec is None:
    return LatentCodec(config.latent_shape[1:])
  size = config.latent_height, config.latent_width
  return StreamingDecoder(_decoder(config.codec), config.codec, size, frame_by_frame=frame_by_frame)


@functools.cache
def abstract_backbone(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
  """Graph definition of the causal DiT, and the shapes of its weights in float32 as a nested dict."""
  return abstract_module(lambda: CausalWanDiT(config, nnx.Rngs(0)))


@functools.cache
def abstract_codec(config: CodecConfig) -> tuple[nnx.GraphDef, Params]:
  """Graph definition of a codec, and the shapes of its weights in float32: "encoder" and "decoder"."""
  return abstract_module(lambda: VideoCodec(config, rngs=nnx.Rngs(0)))


@functools.cache
def _decoder(config: CodecConfig) -> nnx.GraphDef:
  return nnx.graphdef(nnx.merge(*abstract_codec(config)).decoder)


@functools.cache
def encoder_graphdef(config: CodecConfig) -> nnx.GraphDef:
  """Graph definition of a codec's encoder."""
  return nnx.graphdef(nnx.merge(*abstract_codec(config)).encoder)


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> dict[str, Params]:
  """Shapes of the weights of backbone and codec in `dtype`, by the names that a search's `params` have."""
  codec: Params = {} if config.codec is None else abstract_codec(config.codec)[1]["decoder"]
  cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype)
  return jax.tree.map(cast, {"backbone": abstract_backbone(config)[1], "codec": codec})
