"""Configuration: frozen dataclasses, and the presets that name complete models.

Every size here is static: it is part of what XLA compiles. Two kinds of object:

* `ModelConfig` describes a model as it was trained (backbone, codec, text encoder, schedule, attention window).
* `SearchConfig` describes one test-time search over it (candidates, beams, noise, pruning, sinks).

Units: a *latent frame* is one time step of the VAE's latent; a *chunk* is `chunk_frames` latent frames; a *token* is
one patch of a latent frame.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any, Literal, TypeVar

from streamt1_jax.messages import one_line, shortened

# Published per-channel statistics of the Wan 2.1 latent space (docs/reference/wan_vae.md).
WAN_LATENT_MEAN = (
  -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
  2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


# Metadata of a field that files written before it lack: it is stored only where it differs from its default.
LATER = {"later": True}


class ConfigError(ValueError):
  """A configuration or an input that cannot work; the message names the field and what is allowed.

  Whatever text of a file is in it, the message is one line of at most `messages.MESSAGE_LIMIT` characters.
  """

  def __init__(self, message: str):
    super().__init__(one_line(message))


T = TypeVar("T")


def required(value: T | None, what: str) -> T:
  """`value`. Raises ConfigError, which names it as `what`, if it is None."""
  if value is None:
    raise ConfigError(f"{what} is missing")
  return value


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


MAX_SIZE = 2**24
"""Largest number in the configuration of a model: one digit too many is told before arrays of that size are made."""


def require_sizes(config: Any, zero: Collection[str] = (), signed: Collection[str] = ()) -> None:
  """Raises ConfigError, naming the field, unless every number of a dataclass, alone or in a tuple, is in its range.

  Integers must be in 1..MAX_SIZE, other numbers above 0 and at most MAX_SIZE.

  Args:
    config: the dataclass; its fields that hold something else are left alone.
    zero: names of fields that may be 0 as well.
    signed: names of fields that may have any sign.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    for number in value if isinstance(value, tuple) else (value,):
      if type(number) not in (int, float):
        continue
      least = -MAX_SIZE if field.name in signed else 0
      above = number > 0 or field.name in zero or field.name in signed
      _require(
        least <= number <= MAX_SIZE and above,
        f"{field.name} must be {_allowed(type(number), field.name in zero, least)}, got {shortened(number)}",
      )


def _allowed(number_type: type, zero: bool, least: int) -> str:
  if least < 0:
    return f"from {least} to {MAX_SIZE}"
  if number_type is int:
    return f"in {0 if zero else 1}..{MAX_SIZE}"
  return f"{'at least' if zero else 'above'} 0 and at most {MAX_SIZE}"


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
    _require(
      self.dim % self.num_heads == 0 and self.head_dim % 2 == 0,
      f"dim {self.dim} must be a multiple of num_heads {self.num_heads} with an even quotient",
    )
    _require(self.freq_dim % 2 == 0, f"freq_dim must be even, got {self.freq_dim}")

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
    _require(1 <= len(self.dim_mult) <= 16, f"dim_mult must have 1 to 16 entries, got {len(self.dim_mult)}")
    # Every one is a module of its own, which takes time even before it has weights.
    _require(self.num_res_blocks <= 64, f"num_res_blocks must be at most 64, got {self.num_res_blocks}")
    stages = len(self.dim_mult) - 1
    _require(
      len(self.spatial_down) == stages and len(self.temporal_down) == stages,
      f"spatial_down and temporal_down need one entry per stage transition ({stages})",
    )
    _require(
      self.num_res_blocks > 0 or set(self.dim_mult) == {1},
      f"num_res_blocks 0 needs a dim_mult of ones, got {self.dim_mult}",
    )
    _require(
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
    _require(
      self.attn_dim % self.num_heads == 0,
      f"attn_dim {self.attn_dim} must be a multiple of num_heads {self.num_heads}",
    )
    _require(
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
    _require(
      bool(steps) and all(a > b for a, b in itertools.pairwise(steps)),
      f"denoising_steps must be strictly decreasing and not empty, got {steps}",
    )
    _require(
      steps[-1] > 0 and steps[0] <= self.num_train_timesteps,
      f"denoising_steps must lie in 1..{self.num_train_timesteps}, got {steps}",
    )


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

  def __post_init__(self):
    require_sizes(self)
    patch, chunk = self.backbone.patch_size, self.chunk_frames
    _require(
      self.latent_height % patch == 0 and self.latent_width % patch == 0,
      f"latent {self.latent_height}x{self.latent_width} is not a whole number of {patch}x{patch} patches",
    )
    for field in ("local_attention_frames", "sink_frames"):
      value = getattr(self, field)
      _require(
        value > 0 and value % chunk == 0, f"{field} must be a positive multiple of the chunk ({chunk}), got {value}"
      )
    _require(
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
  def sink_chunks(self) -> int:
    return self.sink_frames // self.chunk_frames

  @property
  def max_chunks(self) -> int:
    """Chunks of the longest video that there are rotary tables for."""
    return self.backbone.max_frames // self.chunk_frames


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """One test-time search (Stream-T1, arXiv 2605.04461).

  Attributes:
    beam_size: candidates drawn per beam and chunk.
    top_k: beams kept after every chunk. The first chunk draws `beam_size * top_k` candidates as well.
    noise_sigma: weight of the parent's noise in a candidate's noise, in (-1, 1); 0 draws independent noise.
    short_threshold: a chunk whose short-term score exceeds its lineage's baseline by more than this is worth
      remembering.
    long_threshold: a chunk whose long-term score falls by more than this marks a change of scene.
    fusion_cap: largest weight of the short-term score in the hybrid score, in [0, 1].
    sliding_window: chunks the video reward sees, the current one included.
    max_sink_frames: latent frames the sinks may grow to.
    sink_ema_decay: weight kept by the old sink in an EMA update.
    first_candidate: "reuse" gives candidate 0 its parent's fresh noise again (released code); "fresh" draws a new one.
    short_baseline: "history" averages every short-term score of the lineage (released code); "window" the last
      `sliding_window - 1`.
    sink_ema_dtype: "compute" mixes sinks in the memory's dtype (released code: in bfloat16 the decay is lost);
      "float32" accumulates in float32.
    reward_decode: "streamed" decodes every chunk once with the codec's carried state; "scratch" decodes each
      candidate's chunk and window anew, as the released code does.
    policy: who survives a chunk, a `policies.Policy`; None is `policies.TopK`, what the paper does.
    judges: whether rewards judge the candidates. Without them all scores are 0, so a beam draws one candidate.
  """

  beam_size: int = 2
  top_k: int = 2
  noise_sigma: float = -0.1
  short_threshold: float = 0.0
  long_threshold: float = 0.2
  fusion_cap: float = 0.4
  sliding_window: int = 10
  max_sink_frames: int = 15
  sink_ema_decay: float = 0.999
  first_candidate: Literal["reuse", "fresh"] = "reuse"
  short_baseline: Literal["history", "window"] = "history"
  sink_ema_dtype: Literal["compute", "float32"] = "compute"
  reward_decode: Literal["streamed", "scratch"] = "streamed"
  # Typed as Any, because policies know the search and not the other way round.
  policy: Any = dataclasses.field(default=None, metadata=LATER)
  judges: bool = dataclasses.field(default=True, metadata=LATER)

  def __post_init__(self):
    # Upper bounds: released seeds are seed + 1000 * chunk + 100 * beam + candidate, and must stay distinct.
    _require(1 <= self.beam_size <= 100, f"beam_size must be in 1..100, got {self.beam_size}")
    _require(1 <= self.top_k <= 10, f"top_k must be in 1..10, got {self.top_k}")
    _require(-1.0 < self.noise_sigma < 1.0, f"noise_sigma must be in (-1, 1), got {self.noise_sigma}")
    _require(0.0 <= self.fusion_cap <= 1.0, f"fusion_cap must be in [0, 1], got {self.fusion_cap}")
    _require(self.sliding_window >= 1, f"sliding_window must be at least 1 chunk, got {self.sliding_window}")
    _require(0.0 <= self.sink_ema_decay <= 1.0, f"sink_ema_decay must be in [0, 1], got {self.sink_ema_decay}")
    _require(
      self.short_baseline != "window" or self.sliding_window >= 2,
      "short_baseline 'window' needs a sliding_window of at least 2 chunks",
    )
    _require(
      self.judges or self.beam_size == 1,
      f"judges=False leaves nothing to choose by: beam_size must be 1, got {self.beam_size}",
    )
    _require(
      self.policy is None or all(hasattr(self.policy, name) for name in ("init", "select")),
      f"policy must have init and select, as policies.Policy describes, got {self.policy!r}",
    )
    for field, allowed in (
      ("first_candidate", ("reuse", "fresh")),
      ("short_baseline", ("history", "window")),
      ("sink_ema_dtype", ("compute", "float32")),
      ("reward_decode", ("streamed", "scratch")),
    ):
      _require(getattr(self, field) in allowed, f"{field} must be one of {allowed}, got {getattr(self, field)!r}")

  @property
  def num_candidates(self) -> int:
    return self.beam_size * self.top_k

  @classmethod
  def released(cls, **overrides) -> SearchConfig:
    """What the released code does; the published numbers came from it."""
    return cls(**overrides)

  @classmethod
  def paper(cls, **overrides) -> SearchConfig:
    """What the paper's text says, where the released code differs."""
    corrected: dict[str, Any] = {"first_candidate": "fresh", "short_baseline": "window", "sink_ema_dtype": "float32"}
    return cls(**(corrected | overrides))

  @classmethod
  def streaming(cls, model: ModelConfig) -> SearchConfig:
    """Plain streaming: one candidate, independent noise, no judges, and the first sink stays what it is."""
    return cls(
      beam_size=1,
      top_k=1,
      noise_sigma=0.0,
      first_candidate="fresh",
      max_sink_frames=model.sink_frames,
      sink_ema_decay=1.0,
      judges=False,
    )

  def validate_for(self, model: ModelConfig) -> None:
    """Raises ConfigError unless this search can run on `model`."""
    chunk = model.chunk_frames
    _require(
      self.max_sink_frames % chunk == 0 and self.max_sink_frames >= model.sink_frames,
      f"max_sink_frames must be a multiple of the chunk ({chunk}) and at least sink_frames ({model.sink_frames}), "
      f"got {self.max_sink_frames}",
    )


def _wan_1_3b() -> ModelConfig:
  return ModelConfig(
    name="wan_1_3b",
    backbone=BackboneConfig(
      dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096, text_len=512
    ),
    codec=CodecConfig(),
    text=TextConfig(),
    latent_height=60,
    latent_width=104,
  )


def _tiny() -> ModelConfig:
  return ModelConfig(
    name="tiny",
    backbone=BackboneConfig(dim=192, ffn_dim=768, num_heads=2, num_layers=6, freq_dim=64, text_dim=128, text_len=32),
    codec=CodecConfig(
      base_dim=72,
      dim_mult=(1, 1, 1),
      num_res_blocks=0,
      spatial_down=(False, False),
      temporal_down=(True, True),
      patch_size=8,
      latent_mean=(0.0,) * 16,
      latent_std=(1.0,) * 16,
    ),
    text=TextConfig(
      vocab_size=128, dim=128, attn_dim=128, ffn_dim=256, num_heads=4, num_layers=2, max_distance=32, max_len=32
    ),
    latent_height=8,
    latent_width=8,
  )


def _bench_mid() -> ModelConfig:
  return ModelConfig(
    name="bench_mid",
    backbone=BackboneConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=6, freq_dim=32, text_dim=32, text_len=16),
    codec=None,
    text=None,
    latent_height=16,
    latent_width=24,
  )


def _golden() -> ModelConfig:
  return ModelConfig(
    name="golden",
    backbone=BackboneConfig(dim=96, ffn_dim=192, num_heads=4, num_layers=3, freq_dim=32, text_dim=32, text_len=16),
    codec=None,
    text=None,
    latent_height=6,
    latent_width=8,
  )


PRESETS = {"wan_1_3b": _wan_1_3b, "tiny": _tiny, "bench_mid": _bench_mid, "golden": _golden}


def preset(name: str) -> ModelConfig:
  """The named preset. Raises ConfigError for a name that is not in `PRESETS`."""
  _require(name in PRESETS, f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
  return PRESETS[name]()


def require_video_model(model: ModelConfig, where: str) -> None:
  """Raises ConfigError, naming `where` the model is from, unless it has all parts that make a video."""
  _require(
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
    _require(
      num_latent_frames > 0 and num_latent_frames % chunk == 0,
      f"num_latent_frames must be a positive multiple of the chunk ({chunk}), got {num_latent_frames}",
    )
    return num_latent_frames // chunk
  _require(0 < seconds < float("inf"), f"seconds must be positive, got {seconds}")
  # The first latent frame is one frame of the video, every later one is `stride` frames.
  stride = model.required_codec.temporal_stride
  return max(1, round((seconds * model.fps / stride + 1 - 1 / stride) / chunk))
