"""HPSv3: how much people would like each frame, given the prompt (docs/reference/rewards.md).

  frames [Q, H, W, 3] ── bicubic ── vision tower, one slice per frame ──┐
  prompt tokens ── embeddings (once per video) ──────────────────────── decoder ── <|Reward|> ── mu, log sigma

All frames of a chunk have one length and one prompt, so they need no padding. They are judged a few at a time: under
the search's `vmap`s all candidates' frames of one place are one batch, and memory does not grow with the chunk.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from streamt1_jax.config import require_sizes
from streamt1_jax.nn import precision
from streamt1_jax.nn.abstract import abstract_module
from streamt1_jax.rewards.base import CandidateInfo, size_of
from streamt1_jax.rewards.qwen2_vl import flop, loading, preprocess, prompts
from streamt1_jax.rewards.qwen2_vl import model as qwen2_vl
from streamt1_jax.rewards.qwen2_vl.config import Qwen2VLConfig, qwen2_vl_preset
from streamt1_jax.rewards.qwen2_vl.layout import LAYOUT
from streamt1_jax.rewards.qwen2_vl.model import PromptEmbedding, PromptTokens, Qwen2VL
from streamt1_jax.rewards.spec import PublishedText, RewardSpec, Training
from streamt1_jax.typing import FloatScalar, Frames, HostArray, Params

_PIXELS = 256 * 28 * 28


@dataclasses.dataclass(frozen=True)
class HPSv3Config:
  """HPSv3.

  Attributes:
    backbone: Qwen2-VL.
    head_dims: hidden widths of the reward MLP.
    min_pixels: least area of a resized frame.
    max_pixels: largest area of a resized frame.
  """

  backbone: Qwen2VLConfig = qwen2_vl_preset("qwen2_vl_7b", vocab_size=151658)
  head_dims: tuple[int, int] = (1024, 16)
  min_pixels: int = _PIXELS
  max_pixels: int = _PIXELS

  def __post_init__(self):
    require_sizes(self)

  def resized(self, size: tuple[int, int]) -> tuple[int, int]:
    """Size in which a frame of `size` is looked at. Raises ConfigError as `preprocess.smart_resize` does."""
    return preprocess.smart_resize(*size, self.backbone.vision.token_pixels, self.min_pixels, self.max_pixels)


def shapes_config() -> HPSv3Config:
  """A million parameters, for 64 x 64 frames of the shapes world."""
  return HPSv3Config(qwen2_vl_preset("qwen2_vl_shapes"), head_dims=(64, 16), min_pixels=64 * 64, max_pixels=64 * 64)


class RewardMLP(nnx.Module):
  """Three linear layers with ReLU between them; always computed in float32, which accelerators would round."""

  def __init__(self, dim: int, hidden_dims: tuple[int, int], rngs: nnx.Rngs):
    first, second = hidden_dims
    exactly = jax.lax.Precision.HIGHEST
    self.first = nnx.Linear(dim, first, precision=exactly, rngs=rngs)
    self.second = nnx.Linear(first, second, precision=exactly, rngs=rngs)
    self.out = nnx.Linear(second, 2, precision=exactly, rngs=rngs)

  def __call__(self, hidden: Float[Array, "*axes M"]) -> Float32[Array, "*axes 2"]:
    x = jax.nn.relu(self.first(hidden.astype(jnp.float32)))
    return self.out(jax.nn.relu(self.second(x)))


class HPSv3Model(nnx.Module):
  """Weights of HPSv3; the head's stay float32 whatever the backbone's dtype."""

  def __init__(self, config: HPSv3Config, rngs: nnx.Rngs):
    self.backbone = Qwen2VL(config.backbone, rngs)
    self.head = RewardMLP(config.backbone.decoder.dim, config.head_dims, rngs)

  def __call__(
    self, prompt: PromptEmbedding, patches: Float[Array, "Q N V"], grid: tuple[int, int]
  ) -> Float32[Array, "Q 2"]:
    """Mean and log standard deviation of the preference, of the patches of Q pictures."""
    media = self.backbone.vision(patches, grid)
    hidden = jax.vmap(self.backbone.read, in_axes=(None, 0))(prompt, media)
    return self.head(hidden[:, 0])


def abstract_params(config: HPSv3Config, dtype: DTypeLike = jnp.float32) -> Params:
  """Shapes of the parameters; the backbone in `dtype`, the head in float32."""
  return qwen2_vl.backbone_in(_abstract(config)[1], dtype)


def graphdef(config: HPSv3Config) -> nnx.GraphDef:
  return _abstract(config)[0]


@functools.cache
def _abstract(config: HPSv3Config) -> tuple[nnx.GraphDef, Params]:
  return abstract_module(lambda: HPSv3Model(config, nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class HPSv3:
  """`ImageReward`: the mean over the chunk's frames of HPSv3's mu, about 6 to 11 for pictures people like.

  Attributes:
    config: sizes.
    tokens_at_once: most tokens of a candidate's frames in one batch; one frame is always judged. At full size a frame
      has about 900 tokens, and its activations and attention scores take 0.2 GB.
  """

  config: HPSv3Config = HPSv3Config()
  tokens_at_once: int = 1024

  def init(self, params: Params, prompt_features: PromptTokens | PromptEmbedding) -> PromptEmbedding:
    """Embeds a prompt tokenised by `prompts.RewardPrompt`, or takes what `loading.EmbeddedPrompt` embedded."""
    return self.model(params).backbone.embed_prompt(prompt_features)

  def __call__(self, params: Params, condition: PromptEmbedding, chunk: Frames, info: CandidateInfo) -> FloatScalar:
    """Score of the frames together."""
    return self.frame_scores(params, condition, chunk)[:, 0].mean()

  def frame_scores(self, params: Params, condition: PromptEmbedding, frames: Frames) -> Float32[Array, "Q 2"]:
    """Mu and log sigma of each frame.

    Raises ConfigError for frames too elongated for the pixel budget.
    """
    vision, size = self.config.backbone.vision, self.config.resized(size_of(frames))
    grid = preprocess.grid_of(size, vision)

    def score(frame: jax.Array) -> jax.Array:
      patches = preprocess.pictures_to_patches(preprocess.normalise(frame[None]), vision)
      with precision.of_weights(params):
        return self.model(params)(condition, patches, grid)[0]

    length = condition.before.shape[0] + math.prod(grid) // vision.merge_size**2 + condition.after.shape[0]
    batch = qwen2_vl.whole_batch(len(frames), max(1, self.tokens_at_once // length))
    return jax.lax.map(score, preprocess.resize_like_pillow(frames, size), batch_size=batch)

  def model(self, params: Params) -> HPSv3Model:
    """The model that holds `params`; for use inside a transformation."""
    return nnx.merge(graphdef(self.config), params)


def candidate_flop(reward: HPSv3, frames: int, size: tuple[int, int], text_tokens: int) -> int:
  """FLOP of judging a chunk, without the head, which is a millionth of it.

  Args:
    reward: the reward.
    frames: frames that are looked at.
    size: rows and columns of a frame.
    text_tokens: length of a sequence without its picture.
  """
  vision, decoder = reward.config.backbone.vision, reward.config.backbone.decoder
  patches = math.prod(preprocess.grid_of(reward.config.resized(size), vision))
  length = text_tokens + patches // vision.merge_size**2
  return frames * (flop.vision_flop(vision, decoder.dim, patches) + flop.decoder_flop(decoder, length))


def initial_params(config: HPSv3Config, seed: int) -> Params:
  """Fresh weights; the logarithm of sigma is not trained, and is 0."""
  params = nnx.to_pure_dict(nnx.state(HPSv3Model(config, nnx.Rngs(seed)), nnx.Param))
  params["head"]["out"]["kernel"] = params["head"]["out"]["kernel"].at[:, 1].set(0.0)
  return params


def with_unit_scores(
  params: Params, config: HPSv3Config, mean: Float[HostArray, "1"], std: Float[HostArray, "1"]
) -> tuple[HPSv3Config, Params]:
  """Weights whose mu has mean 0 and standard deviation 1 where that of `params` has these.

  HPSv3 has no constants for it, so the last layer is rescaled.
  """
  out = params["head"]["out"]
  kernel = out["kernel"].at[:, 0].divide(std[0])
  bias = out["bias"].at[0].set((out["bias"][0] - mean[0]) / std[0])
  return config, params | {"head": params["head"] | {"out": {"kernel": kernel, "bias": bias}}}


# The text is the instruction followed by the request for the rating.
TEXT = PublishedText(
  reward_tokens=("<|Reward|>",),
  sha256="f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c",
  length=(15, 704),
)

SPEC = RewardSpec(
  "hpsv3",
  "image",
  make=lambda config, fps: HPSv3(config),
  config_type=HPSv3Config,
  abstract_params=abstract_params,
  read_prompt=functools.partial(prompts.read_folder, "hpsv3", TEXT),
  load=loading.load,
  searched=loading.without_table,
  layout=LAYOUT,
  candidate_flop=candidate_flop,
  text=TEXT,
  training=Training(
    text="Does the picture show this, drawn well? {text_prompt} Score: <|Reward|>",
    config=shapes_config,
    graphdef=graphdef,
    initial_params=initial_params,
    with_unit_scores=with_unit_scores,
  ),
)
