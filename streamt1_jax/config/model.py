"""A model as it was trained: backbone, codec, text encoder, schedule and attention window."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from streamt1_jax.config.base import LATER, ConfigError, require, require_sizes, required

# Published per-channel statistics of the Wan 2.1 latent space (docs/reference/wan_vae.md).
WAN_LATENT_MEAN = (
  -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
  2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
  """Causal Wan DiT.

  Attributes:
    dim: width of the residual stream.
    ffn_dim: hidden width of the feed-forward layers.
    num_heads: attention heads; `dim` is a multiple of it and `dim / num_heads` is even.
    num_layers: transformer blocks.
    freq_dim: width of the sinusoidal timestep features, even.
    text_dim: width of the text encoder's output.
    text_len: text tokens seen by cross-attention; shorter prompts are zero-padded and the padding is attended to.
    latent_channels: channels of the latent, both in and out.
    patch_size: height and width of a token, in latent pixels.
    max_frames: latent frames for which rotary tables exist, and so the longest video.
    eps: epsilon of every LayerNorm and RMSNorm.
  """

  dim: int
  ffn_dim: int
  num_heads: int
  num_layers: int
  freq_dim: int
  text_dim: int
  text_len: int
  latent_channels: int = 16
  patch_size: int = 2
  max_frames: int = 1024
  eps: float = 1e-6

  def __post_init__(self):
    require_sizes(self)
    require(
      self.dim % self.num_heads == 0 and self.head_dim % 2 == 0,
      f"dim {self.dim} must be a multiple of num_heads {self.num_heads} with an even quotient",
    )
    require(self.freq_dim % 2 == 0, f"freq_dim must be even, got {self.freq_dim}")

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class CodecConfig:
  """Wan causal video VAE.

  Attributes:
    base_dim: channels of the first stage.
    dim_mult: channel multiplier per stage.
    num_res_blocks: residual blocks per encoder stage (the decoder has one more); 0 if all widths are equal.
    spatial_down: per stage transition, whether height and width halve (encoder order).
    temporal_down: per stage transition, whether time halves (encoder order).
    latent_channels: channels of the latent.
    patch_size: pixels on a side folded into channels before the encoder and unfolded after the decoder; 1 for Wan 2.1.
    latent_mean: per-channel mean of the raw latent.
    latent_std: per-channel standard deviation of the raw latent.
  """

  base_dim: int = 96
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  spatial_down: tuple[bool, ...] = (True, True, True)
  temporal_down: tuple[bool, ...] = (False, True, True)
  latent_channels: int = 16
  patch_size: int = 1
  latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
  latent_std: tuple[float, ...] = WAN_LATENT_STD

  def __post_init__(self):
    require_sizes(self, zero=("num_res_blocks",), signed=("latent_mean",))
    require(1 <= len(self.dim_mult) <= 16, f"dim_mult must have 1 to 16 entries, got {len(self.dim_mult)}")
    # Every one is a module of its own, which takes time even before it has weights.
    require(self.num_res_blocks <= 64, f"num_res_blocks must be at most 64, got {self.num_res_blocks}")
    stages = len(self.dim_mult) - 1
    require(
      len(self.spatial_down) == stages and len(self.temporal_down) == stages,
      f"spatial_down and temporal_down need one entry per stage transition ({stages})",
    )
    require(
      self.num_res_blocks > 0 or set(self.dim_mult) == {1},
      f"num_res_blocks 0 needs a dim_mult of ones, got {self.dim_mult}",
    )
    require(
      len(self.latent_mean) == len(self.latent_std) == self.latent_channels,
      f"latent_mean and latent_std need {self.latent_channels} entries",
    )

  @property
  def spatial_stride(self) -> int:
    """Pixels per latent pixel."""
    return self.patch_size * 2 ** sum(self.spatial_down)

  @property
  def temporal_stride(self) -> int:
    """Pixel frames per latent frame, after the first."""
    return 2 ** sum(self.temporal_down)


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """UMT5 encoder.

  Attributes:
    vocab_size: rows of the token embedding.
    dim: width of the residual stream.
    attn_dim: total width of the attention heads.
    ffn_dim: hidden width of the gated feed-forward layers.
    num_heads: attention heads; `attn_dim` is a multiple of it.
    num_layers: encoder blocks.
    num_buckets: relative-position buckets, a multiple of 4.
    max_distance: distance at which the buckets saturate.
    max_len: longest token sequence, end token included.
    eps: epsilon of every RMSNorm.
  """

  vocab_size: int = 256384
  dim: int = 4096
  attn_dim: int = 4096
  ffn_dim: int = 10240
  num_heads: int = 64
  num_layers: int = 24
  num_buckets: int = 32
  max_distance: int = 128
  max_len: int = 512
  eps: float = 1e-6

  def __post_init__(self):
    require_sizes(self)
    require(
      self.attn_dim % self.num_heads == 0,
      f"attn_dim {self.attn_dim} must be a multiple of num_heads {self.num_heads}",
    )
    require(
      self.num_buckets % 4 == 0 and self.max_distance > self.num_buckets // 4,
      f"num_buckets must be a multiple of 4 and less than 4 times max_distance ({self.max_distance}), "
      f"got {self.num_buckets}",
    )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Few-step flow-matching schedule.

  Attributes:
    denoising_steps: entries of the 1000-step table, largest first; warped through `shift`.
    shift: timestep shift; `sigma = shift * s / (1 + (shift - 1) * s)`.
    num_train_timesteps: length of the table.
    context_timestep: timestep of the clean pass that writes the memory.
    sampler: name in `sampling.SAMPLERS` of what happens between two steps.
  """

  denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
  shift: float = 5.0
  num_train_timesteps: int = 1000
  context_timestep: float = 0.0
  sampler: str = dataclasses.field(default="renoise", metadata=LATER)

  def __post_init__(self):
    require_sizes(self, zero=("context_timestep",))
    steps = self.denoising_steps
    require(
      bool(steps) and all(a > b for a, b in itertools.pairwise(steps)),
      f"denoising_steps must be strictly decreasing and not empty, got {steps}",
    )
    require(
      steps[-1] > 0 and steps[0] <= self.num_train_timesteps,
      f"denoising_steps must lie in 1..{self.num_train_timesteps}, got {steps}",
    )


@dataclasses.dataclass(frozen=True)
class SearchDefaults:
  """What a search over one model is set to where nobody says otherwise: fields of `SearchConfig` of the same names.

  The published values by default. Thresholds stand in the units of the rewards, so a model with rewards of its own
  needs others.
  """

  noise_sigma: float = -0.1
  short_threshold: float = 0.0
  long_threshold: float = 0.2
  max_sink_frames: int = 15

  def __post_init__(self):
    require(-1.0 < self.noise_sigma < 1.0, f"noise_sigma must be in (-1, 1), got {self.noise_sigma}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A complete model.

  Attributes:
    name: preset name, stored with every checkpoint.
    backbone: the causal DiT.
    codec: the VAE, or None for a model that is searched in latent space (tests, benchmark).
    text: the text encoder, or None when text embeddings are given.
    latent_height: rows of the latent, a multiple of the backbone's patch.
    latent_width: columns of the latent, likewise.
    chunk_frames: latent frames generated together.
    schedule: denoising schedule.
    local_attention_frames: latent frames a query can see before any sink is appended (first sink, window and its own
      chunk).
    sink_frames: latent frames at the start of the video that never leave the memory.
    fps: pixel frames per second of the decoded video.
    image_start: how a video begins with a picture. "still": the picture, repeated, is the first chunk, which is given;
      "clamp": it is the first latent frame of the first chunk that is made, which a model must be trained for.
    search: what a search over this model is set to by default.
  """

  name: str
  backbone: BackboneConfig
  codec: CodecConfig | None
  text: TextConfig | None
  latent_height: int
  latent_width: int
  chunk_frames: int = 3
  schedule: ScheduleConfig = ScheduleConfig()
  local_attention_frames: int = 12
  sink_frames: int = 3
  fps: int = 16
  image_start: Literal["still", "clamp"] = dataclasses.field(default="still", metadata=LATER)
  search: SearchDefaults = dataclasses.field(default=SearchDefaults(), metadata=LATER)

  def __post_init__(self):
    require_sizes(self)
    patch, chunk = self.backbone.patch_size, self.chunk_frames
    require(
      self.latent_height % patch == 0 and self.latent_width % patch == 0,
      f"latent {self.latent_height}x{self.latent_width} is not a whole number of {patch}x{patch} patches",
    )
    for field in ("local_attention_frames", "sink_frames"):
      value = getattr(self, field)
      require(
        value > 0 and value % chunk == 0, f"{field} must be a positive multiple of the chunk ({chunk}), got {value}"
      )
    require(self.image_start in ("still", "clamp"), f"image_start must be 'still' or 'clamp', got {self.image_start!r}")
    require(
      self.local_attention_frames >= self.sink_frames + chunk,
      f"local_attention_frames {self.local_attention_frames} leaves no room for a chunk ({chunk}) beside the sinks "
      f"({self.sink_frames})",
    )

  @property
  def required_codec(self) -> CodecConfig:
    """`codec`. Raises ConfigError for a model without one."""
    return required(self.codec, f"the codec of preset {self.name!r}")

  @property
  def required_text(self) -> TextConfig:
    """`text`. Raises ConfigError for a model without one."""
    return required(self.text, f"the text encoder of preset {self.name!r}")

  @property
  def frame_tokens(self) -> int:
    """Tokens per latent frame."""
    return (self.latent_height // self.backbone.patch_size) * (self.latent_width // self.backbone.patch_size)

  @property
  def chunk_tokens(self) -> int:
    return self.chunk_frames * self.frame_tokens

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """Shape of one chunk of latents, `[F, C, H, W]`."""
    return (self.chunk_frames, self.backbone.latent_channels, self.latent_height, self.latent_width)

  @property
  def window_chunks(self) -> int:
    """Chunks of the rolling window, the current one included."""
    return (self.local_attention_frames - self.sink_frames) // self.chunk_frames

  @property
  def max_chunks(self) -> int:
    """Chunks of the longest video that there are rotary tables for."""
    return self.backbone.max_frames // self.chunk_frames


def require_video_model(model: ModelConfig, where: str) -> None:
  """Raises ConfigError, naming `where` the model is from, unless it has all parts that make a video."""
  require(
    model.codec is not None and model.text is not None,
    f"{where}: preset {model.name!r} has no codec or no text encoder, so it cannot make videos",
  )


def video_chunks(model: ModelConfig, *, seconds: float | None = None, num_latent_frames: int | None = None) -> int:
  """Chunks of a video of a given length; `seconds` is rounded to the nearest whole chunk (5 s are 21 latent frames).

  Raises ConfigError for a length that is not positive or, in latent frames, no whole number of chunks.
  """
  if (seconds is None) == (num_latent_frames is None):
    raise ConfigError("give either seconds or num_latent_frames")
  chunk = model.chunk_frames
  if seconds is None:
    assert num_latent_frames is not None
    require(
      num_latent_frames > 0 and num_latent_frames % chunk == 0,
      f"num_latent_frames must be a positive multiple of the chunk ({chunk}), got {num_latent_frames}",
    )
    return num_latent_frames // chunk
  require(0 < seconds < float("inf"), f"seconds must be positive, got {seconds}")
  # The first latent frame is one frame of the video, every later one is `stride` frames.
  stride = model.required_codec.temporal_stride
  return max(1, round((seconds * model.fps / stride + 1 - 1 / stride) / chunk))
