"""VideoAlign (VideoReward): visual quality, motion quality, text alignment of a window (docs/reference/rewards.md).

  window ── 4 to 14 of its frames ── bicubic ── vision tower, two frames per slice ──┐
  prompt tokens ── embeddings (once per video) ────────────────────────────────── decoder ── VQ, MQ, TA

The reward tokens of visual and motion quality come before the prompt in the text, so only text alignment reads it.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from streamt1_jax.config import ConfigError, require_sizes
from streamt1_jax.nn import precision
from streamt1_jax.nn.abstract import abstract_module
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow, LoadedReward, PromptReader, size_of
from streamt1_jax.rewards.qwen2_vl import flop, loading, preprocess, prompts
from streamt1_jax.rewards.qwen2_vl import model as qwen2_vl
from streamt1_jax.rewards.qwen2_vl.config import Qwen2VLConfig, qwen2_vl_preset
from streamt1_jax.rewards.qwen2_vl.layout import LAYOUT
from streamt1_jax.rewards.qwen2_vl.model import PromptEmbedding, PromptTokens, Qwen2VL
from streamt1_jax.rewards.scorers import ScoringOptions, VideoScores, require_finite
from streamt1_jax.rewards.spec import PublishedText, RewardSpec, Training
from streamt1_jax.typing import FloatScalar, Frames, HostArray, IntScalar, Params

DIMENSIONS = ("VQ", "MQ", "TA")


@dataclasses.dataclass(frozen=True)
class VideoAlignConfig:
  """VideoAlign.

  Attributes:
    backbone: Qwen2-VL.
    min_pixels: least area of a resized frame.
    max_pixels: largest area of a resized frame.
    sample_fps: frames per second that are looked at, within the limits.
    min_frames: fewest frames looked at, if the video has as many.
    max_frames: most frames looked at.
    mean: mean of the raw scores VQ, MQ, TA; normalised score = (raw - mean) / std.
    std: standard deviation of the raw scores.
    head_dtype: "float32"; or "bfloat16" as in the reference, where close candidates tie.
  """

  backbone: Qwen2VLConfig = qwen2_vl_preset("qwen2_vl_2b", vocab_size=151660)
  min_pixels: int = 128 * 28 * 28
  max_pixels: int = 256 * 28 * 28
  sample_fps: float = 2.0
  min_frames: int = 4
  max_frames: int = 768
  mean: tuple[float, float, float] = (3.6757, 1.1646, 2.8105)
  std: tuple[float, float, float] = (2.2476, 1.3811, 2.5121)
  head_dtype: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    require_sizes(self, signed=("mean",))
    if self.min_frames > self.max_frames:
      raise ConfigError(f"min_frames must be at most max_frames ({self.max_frames}), got {self.min_frames}")
    if self.head_dtype not in ("float32", "bfloat16"):
      raise ConfigError(f"head_dtype must be float32 or bfloat16, got {self.head_dtype!r}")

  def resized(self, size: tuple[int, int]) -> tuple[int, int]:
    """Size in which a frame of `size` is looked at. Raises ConfigError as `preprocess.smart_resize` does."""
    return preprocess.smart_resize(*size, self.backbone.vision.token_pixels, self.min_pixels, self.max_pixels)


def shapes_config() -> VideoAlignConfig:
  """A million parameters, for 64 x 64 frames of the shapes world; scores are not normalised before training ends."""
  backbone = qwen2_vl_preset("qwen2_vl_shapes")
  pixels = 64 * 64
  return VideoAlignConfig(backbone, min_pixels=pixels, max_pixels=pixels, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class VideoAlignModel(nnx.Module):
  """Weights of VideoAlign; one row of weights reads all three reward tokens."""

  def __init__(self, config: VideoAlignConfig, rngs: nnx.Rngs):
    dim = config.backbone.decoder.dim
    self.backbone = Qwen2VL(config.backbone, rngs)
    # Accelerators would round the factors of a product in float32; one in bfloat16 has nothing to round.
    exactly = jax.lax.Precision.HIGHEST
    dtype = jnp.dtype(config.head_dtype)
    self.head = nnx.Linear(dim, 1, use_bias=False, dtype=dtype, precision=exactly, rngs=rngs)

  def __call__(
    self,
    prompt: PromptEmbedding,
    patches: Float[Array, "S N V"],
    grid: tuple[int, int],
    slices: IntScalar | None = None,
  ) -> Float32[Array, "3"]:
    """Raw VQ, MQ, TA of the patches of one video, whose first `slices` count (None: all)."""
    media = self.backbone.see(patches, grid, slices)
    tokens = None if slices is None else slices * (media.shape[0] // patches.shape[0])
    hidden = self.backbone.read(prompt, media, tokens)
    return self.head(hidden)[:, 0].astype(jnp.float32)


def abstract_params(config: VideoAlignConfig, dtype: DTypeLike = jnp.float32) -> Params:
  """Shapes of the parameters; the backbone in `dtype`, the head in float32."""
  return qwen2_vl.backbone_in(_abstract(config)[1], dtype)


def graphdef(config: VideoAlignConfig) -> nnx.GraphDef:
  return _abstract(config)[0]


@functools.cache
def _abstract(config: VideoAlignConfig) -> tuple[nnx.GraphDef, Params]:
  return abstract_module(lambda: VideoAlignModel(config, nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class VideoAlign:
  """`VideoReward`: Overall, the sum of the three scores, each minus its mean and divided by its standard deviation.

  Attributes:
    fps: frames per second of the windows to be judged. With a wrong one the model sees another speed.
    config: sizes and constants.
    normalised: False sums raw scores.
  """

  fps: float
  config: VideoAlignConfig = VideoAlignConfig()
  normalised: bool = True

  def init(self, params: Params, prompt_features: PromptTokens | PromptEmbedding) -> PromptEmbedding:
    """Embeds a prompt tokenised by `prompts.RewardPrompt`, or takes what `loading.EmbeddedPrompt` embedded."""
    return self.model(params).backbone.embed_prompt(prompt_features)

  def __call__(
    self, params: Params, condition: PromptEmbedding, window: FrameWindow, info: CandidateInfo
  ) -> FloatScalar:
    """Score of a window of uint8 RGB frames; float32 scalar.

    How many frames are looked at depends on the window's length. Where `window.num_past` is an int, the program is
    compiled for that count alone; else one program serves every length: it is as long as the longest window needs, and
    what a shorter one lacks has no influence.

    Raises ConfigError for a window, or a chunk that could be one, of one frame.
    """
    if isinstance(window.num_past, int):
      sampled = self.sample(window.num_past + window.chunk.shape[0])
      return self.overall(self.raw_scores(params, condition, window.take(sampled)))
    shortest = window.chunk.shape[0]
    sampled = [self.sample(total) for total in range(shortest, shortest + window.past.shape[0] + 1)]
    counts = np.asarray([len(indices) for indices in sampled], np.int32)
    table = np.stack([np.pad(indices, (0, counts.max() - len(indices)), mode="edge") for indices in sampled])
    frames = window.take(jnp.asarray(table)[window.num_past])
    return self.overall(self.raw_scores(params, condition, frames, jnp.asarray(counts)[window.num_past]))

  def sample(self, num_frames: int) -> Int32[np.ndarray, " n"]:
    """Indices of the frames looked at in a video of `num_frames` frames; n is even."""
    c = self.config
    return preprocess.sample_frames(num_frames, self.fps, c.sample_fps, c.min_frames, c.max_frames)

  def raw_scores(
    self, params: Params, condition: PromptEmbedding, frames: Frames, count: IntScalar | None = None
  ) -> Float32[Array, "3"]:
    """Raw VQ, MQ, TA of sampled frames.

    Args:
      params: weights.
      condition: from `init`.
      frames: an even number of them.
      count: even, in 2..n: the first frames that count; None for all.

    Raises:
      ConfigError: the frames are too elongated for the pixel budget.
    """
    vision, size = self.config.backbone.vision, self.config.resized(size_of(frames))
    patches = preprocess.to_patches(preprocess.normalise(preprocess.resize(frames, size)), vision)
    slices = None if count is None else count // vision.temporal_patch
    with precision.of_weights(params):
      return self.model(params)(condition, patches, preprocess.grid_of(size, vision), slices)

  def normalise(self, raw: Float32[HostArray, "*axes 3"]) -> Float32[Array, "*axes 3"]:
    """(raw - mean) / std of raw scores in the order VQ, MQ, TA."""
    lead = (1,) * (raw.ndim - 1)
    mean, std = (jnp.asarray(x, jnp.float32).reshape(*lead, 3) for x in (self.config.mean, self.config.std))
    return (jnp.asarray(raw) - mean) / std

  def overall(self, raw: Float32[HostArray, "*axes 3"]) -> Float32[Array, "*axes"]:
    """Sum over VQ, MQ, TA of raw scores, which are normalised first if the reward is."""
    return (self.normalise(raw) if self.normalised else jnp.asarray(raw)).sum(axis=-1)

  def model(self, params: Params) -> VideoAlignModel:
    """The model that holds `params`; for use inside a transformation."""
    return nnx.merge(graphdef(self.config), params)


@dataclasses.dataclass(frozen=True, eq=False)
class VideoAlignScorer:
  """VideoAlign on the frames its sampler takes at the video's own speed; columns `name_VQ`, `_MQ`, `_TA`, `_Overall`.

  Attributes:
    name: of the reward.
    reward: its `fps` is not used.
    params: its weights.
    prompt: turns a caption into tokens.
  """

  name: str
  reward: VideoAlign
  params: Params
  prompt: PromptReader

  reads_prompt = True

  @property
  def columns(self) -> tuple[str, ...]:
    return tuple(f"{self.name}_{column}" for column in (*DIMENSIONS, "Overall"))

  def look_at(self, num_frames: int, fps: float) -> Int32[np.ndarray, " n"]:
    return dataclasses.replace(self.reward, fps=fps).sample(num_frames)

  def __call__(self, prompt: str | None, frames: Frames) -> VideoScores:
    scores = _all_scores(self.params, self.reward, self.prompt(prompt or ""), frames)
    return require_finite(self.name, dict(zip(self.columns, np.asarray(scores).tolist(), strict=True)))


@functools.partial(jax.jit, static_argnames="reward")
def _all_scores(params: Params, reward: VideoAlign, tokens: PromptTokens, frames: Frames) -> Float32[Array, "4"]:
  """VQ, MQ, TA, Overall of the sampled frames."""
  raw = reward.raw_scores(params, reward.init(params, tokens), frames)
  return jnp.append(reward.normalise(raw) if reward.normalised else raw, reward.overall(raw))


def make_scorer(name: str, loaded: LoadedReward, options: ScoringOptions) -> VideoAlignScorer:
  """`RewardSpec.scorer`; the options are about image rewards."""
  return VideoAlignScorer(name, loaded.reward, loaded.params, loaded.prompt)


def candidate_flop(reward: VideoAlign, frames: int, size: tuple[int, int], text_tokens: int) -> int:
  """FLOP of judging a window that is known when it is compiled, without the head, which is a millionth of it.

  In a search the decoder reads as many tokens as the longest window has.

  Args:
    reward: the reward.
    frames: frames of the window; it looks at some of them.
    size: rows and columns of a frame.
    text_tokens: length of a sequence without its frames.
  """
  vision, decoder = reward.config.backbone.vision, reward.config.backbone.decoder
  patches = math.prod(preprocess.grid_of(reward.config.resized(size), vision))
  slices = len(reward.sample(frames)) // vision.temporal_patch
  length = text_tokens + slices * patches // vision.merge_size**2
  return slices * flop.vision_flop(vision, decoder.dim, patches) + flop.decoder_flop(decoder, length)


def initial_params(config: VideoAlignConfig, seed: int) -> Params:
  """Fresh weights."""
  return nnx.to_pure_dict(nnx.state(VideoAlignModel(config, nnx.Rngs(seed)), nnx.Param))


def with_unit_scores(
  params: Params, config: VideoAlignConfig, mean: Float[HostArray, "3"], std: Float[HostArray, "3"]
) -> tuple[VideoAlignConfig, Params]:
  """Constants under which scores have mean 0 and standard deviation 1 where raw VQ, MQ, TA have these."""

  def as_tuple(values: Float[HostArray, "3"]) -> tuple[float, float, float]:
    visual, motion, text = (round(float(value), 4) for value in values)
    return visual, motion, text

  return dataclasses.replace(config, mean=as_tuple(mean), std=as_tuple(std)), params


TEXT = PublishedText(
  reward_tokens=("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"),
  sha256="fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700",
  length=(15, 960),
)

SPEC = RewardSpec(
  "videoalign",
  "video",
  make=lambda config, fps: VideoAlign(fps, config),
  config_type=VideoAlignConfig,
  abstract_params=abstract_params,
  read_prompt=functools.partial(prompts.read_folder, "videoalign", TEXT),
  load=loading.load,
  searched=loading.without_table,
  layout=LAYOUT,
  scorer=make_scorer,
  candidate_flop=candidate_flop,
  text=TEXT,
  training=Training(
    text="How clear are the frames? <|VQ_reward|> How steady is the motion? <|MQ_reward|> "
    "Does the video show this? {text_prompt} <|TA_reward|>",
    config=shapes_config,
    graphdef=graphdef,
    initial_params=initial_params,
    with_unit_scores=with_unit_scores,
  ),
)
