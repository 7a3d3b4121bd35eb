"""From a checkpoint folder and a prompt to a searched video.

pipeline = Pipeline.load()
video = pipeline.generate("a red circle moves left over a dark blue background", seconds=5, seed=0)
video.save("outputs/circle.mp4")
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from streamt1_jax import drivers, shipped
from streamt1_jax.backbone.dit import TextMemory
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, require_video_model, video_chunks
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.generator import Models
from streamt1_jax.io.checkpoint import load_config, load_params, tokenizer_file
from streamt1_jax.io.video import write_video
from streamt1_jax.models import abstract_backbone, abstract_codec, make_models
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel.sharding import RULES, placed, tree_shardings, with_shardings
from streamt1_jax.rewards import selection
from streamt1_jax.rewards.selection import Rewards
from streamt1_jax.rewards.spec import RewardTable
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.text import PromptEncoder
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.typing import Implementation, Params
from streamt1_jax.wan_generator import WanGenerator

_LARGE_FRAME = 256 * 256  # pixels; a candidate's chunk then takes a gigabyte or so to decode


@dataclasses.dataclass(frozen=True)
class Video:
  """A searched video.

  Attributes:
    frames: [T, height, width, 3] uint8.
    fps: frames per second.
    latents: [num_latent_frames, C, H, W] float32.
    score: what the video reward gives the whole video.
    beams: all surviving videos; this one is `beams.best`.
    traces: what every chunk left behind.
  """

  frames: np.ndarray
  fps: int
  latents: np.ndarray
  score: float
  beams: drivers.FinalBeams
  traces: list[ChunkTrace]

  def save(self, path: epath.PathLike) -> None:
    """Writes an H.264 mp4; small videos are enlarged by whole pixels so that they can be watched."""
    write_video(path, self.frames, self.fps, scale=display_scale(self.frames.shape[1]))


def display_scale(height: int) -> int:
  """Whole factor that brings a small frame to about 256 rows."""
  return max(1, 256 // height)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A loaded model.

  Attributes:
    models: the static half of a search.
    params: weights of backbone, codec and rewards, by name.
    text: prompts to embeddings; its weights stay on disk.
    rewards: what judges.
  """

  models: Models
  params: Params
  text: PromptEncoder
  rewards: Rewards

  @classmethod
  def load(
    cls,
    directory: epath.PathLike | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    latent_size: tuple[int, int] | None = None,
    reward: str | None = None,
    reward_weights: Mapping[str, float] | None = None,
    short_frames: int | None = None,
    reward_dtype: DTypeLike | None = None,
    reward_table: RewardTable = REWARDS,
    mesh: Mesh | None = None,
    decoding: Decoding | None = None,
    attention: Implementation | None = None,
  ) -> "Pipeline":
    """Reads a checkpoint folder.

    Args:
      directory: folder with `config.json`, `backbone/`, `codec/`, `text/`, `tokenizer.model` or `tokenizer.json`, and
        `rewards/` if it has any. By default the small model that travels with this package.
      dtype: dtype of weights and activations.
      latent_size: rows and columns of the latent; the model's own by default. No weight depends on it.
      reward: names of rewards, such as "videoalign+hpsv3"; see `rewards.selection.choose`.
      reward_weights: factors of their scores.
      short_frames: frames of a chunk that image rewards see; all by default.
      reward_dtype: dtype of the rewards' backbones; `dtype` by default. int8 halves what they take in bfloat16.
      reward_table: the rewards there are; `{**REWARDS, "mine": SPEC}` adds one.
      mesh: devices, as `parallel.mesh.make_mesh` arranges them; weights go straight to their shards. None for one.
      decoding: how much memory decoding may take, see `execution.Execution`; candidates of more than 256x256
        pixels are decoded in turn by default.
      attention: implementation of the backbone's attention, see `backbone.attention`; by platform if None.

    Raises:
      ConfigError: the folder is missing, foreign, damaged or of another model, or the rewards are impossible; the
        message names the file or the argument.
    """
    directory = shipped.checkpoint() if directory is None else epath.Path(directory)
    config = load_config(directory)
    require_video_model(config, str(directory))
    codec, encoder = config.required_codec, config.required_text
    choice = selection.choose(
      directory,
      reward,
      reward_weights,
      short_frames=short_frames,
      chunk_frames=codec.temporal_stride * config.chunk_frames,
      table=reward_table,
    )
    tokenizer = Tokenizer(tokenizer_file(directory), encoder.max_len)
    text = PromptEncoder(directory / "text", encoder, tokenizer, config.backbone.text_len, dtype)
    if latent_size is not None:
      config = dataclasses.replace(config, latent_height=latent_size[0], latent_width=latent_size[1])
    restore = functools.partial(_restore, directory, dtype=dtype, mesh=mesh)
    backbone_params = restore("backbone", abstract_backbone(config)[1])
    codec_params = restore("codec", abstract_codec(codec)[1])
    rewards = selection.load(
      directory, choice, fps=config.fps, dtype=reward_dtype or dtype, mesh=mesh, table=reward_table
    )
    if decoding is None:
      pixels = config.latent_height * config.latent_width * codec.spatial_stride**2
      decoding = "in_turn" if pixels > _LARGE_FRAME else "together"
    execution = Execution(mesh=mesh, attention=attention, decoding=decoding)
    models = make_models(config, rewards.image.reward, rewards.video.reward, execution=execution)
    params = {
      "backbone": backbone_params,
      "codec": codec_params["decoder"],
      "image_reward": rewards.image.params,
      "video_reward": rewards.video.params,
    }
    return cls(models, params, text, rewards)

  @property
  def config(self) -> ModelConfig:
    generator = self.models.generator
    assert isinstance(generator, WanGenerator)
    return generator.config

  def num_chunks(self, *, seconds: float | None = None, num_latent_frames: int | None = None) -> int:
    """Chunks of a video of a given length; `seconds` is rounded to the nearest whole chunk (5 s are 21 latent frames).

    Raises ConfigError for a length that is not positive or, in latent frames, no whole number of chunks.
    """
    return video_chunks(self.config, seconds=seconds, num_latent_frames=num_latent_frames)

  def condition(self, prompt: str, num_chunks: int) -> Condition:
    """Everything that depends on the prompt alone. Before many prompts call `text.prepare` with all of them.

    Raises ConfigError for an empty prompt or one that a reward cannot read; a prompt over the token limit is cut with
    a warning.
    """
    if not prompt.strip():
      raise ConfigError("the prompt is empty")
    image, video = self.reward_features(prompt)
    condition = Condition(
      text=_text_memory(self.params["backbone"], self.text(prompt), self.models.generator, self.models.execution.mesh),
      image_reward=self.rewards.image.reward.init(self.params["image_reward"], image),
      video_reward=self.rewards.video.reward.init(self.params["video_reward"], video),
      num_chunks=jnp.int32(num_chunks),
    )
    mesh = self.models.execution.mesh
    return condition if mesh is None else jax.device_put(condition, tree_shardings(mesh, "condition", condition))

  def reward_features(self, prompt: str) -> tuple[Any, Any]:
    """What the image reward and the video reward read of a prompt, on the device.

    Raises ConfigError for a prompt that a reward cannot read, such as one that holds a special token.
    """
    features = self.rewards.image.prompt(prompt), self.rewards.video.prompt(prompt)
    return jax.tree.map(jnp.asarray, features)

  def stream(
    self, condition: Condition, search: SearchConfig, *, num_chunks: int, seed: int | Sequence[int]
  ) -> Iterator[ChunkTrace]:
    """Yields every chunk as soon as it is searched; see `drivers.stream`."""
    return drivers.stream(self.params, condition, self.models, search, num_chunks=num_chunks, seed=seed)

  @property
  def mesh_sizes(self) -> dict[str, int] | None:
    """Axes and sizes of the mesh, or None on one device."""
    mesh = self.models.execution.mesh
    return None if mesh is None else dict(mesh.shape)

  @property
  def prompts_together(self) -> int:
    """How many prompts the devices search at the same time."""
    mesh = self.models.execution.mesh
    return 1 if mesh is None else mesh.shape[RULES["prompt"]]

  def stream_states(
    self,
    conditions: Sequence[Condition],
    search: SearchConfig,
    *,
    num_chunks: int,
    seeds: Sequence[int],
    state: SearchState | None = None,
  ) -> Iterator[tuple[SearchState, list[ChunkTrace]]]:
    """As `drivers.stream_states`, for one video or several of one length in lockstep: a trace per video, on the host.

    SearchError tells by its `prompt` which of them failed.
    """
    condition, seed = conditions[0], seeds[0]
    if self.prompts_together > 1:
      condition = drivers.stack_conditions(self._fill(conditions), self.models.execution.mesh)
      seed = self._fill(seeds)
    options = {"num_chunks": num_chunks, "seed": seed, "state": state}
    for state, trace in drivers.stream_states(self.params, condition, self.models, search, **options):
      trace = hosts.to_host(trace)
      if self.prompts_together == 1:
        yield state, [trace]
      else:
        yield state, [drivers.of_prompt(trace, index) for index in range(len(conditions))]

  def abstract_state(self, search: SearchConfig, *, num_chunks: int, seeds: Sequence[int]) -> SearchState:
    """Shapes, dtypes and shardings of the states that `stream_states` yields."""
    seed = self._fill(seeds) if self.prompts_together > 1 else seeds[0]
    return drivers.abstract_state(self.params, self.models, search, seed, num_chunks=num_chunks)

  def _fill(self, items: Sequence[Any]) -> list[Any]:
    """The last one is repeated until the devices have work."""
    return [*items, *[items[-1]] * (-len(items) % self.prompts_together)]

  def assemble(self, condition: Condition, search: SearchConfig, traces: list[ChunkTrace]) -> Video:
    """The best of the surviving videos."""
    scores = drivers.last_window_scores(search, traces)
    beams = drivers.final_beams(self.params, condition, self.models, search, traces, scores=scores)
    best = beams.best
    return Video(
      frames=beams.frames[best],
      fps=self.config.fps,
      latents=beams.latents[best],
      score=float(beams.scores[best]),
      beams=beams,
      traces=traces,
    )

  def generate(
    self,
    prompt: str,
    *,
    seconds: float | None = None,
    num_latent_frames: int | None = None,
    search: SearchConfig | None = None,
    seed: int = 0,
    on_chunk: Callable[[ChunkTrace], None] | None = None,
  ) -> Video:
    """Searches one video.

    Args:
      prompt: what to show.
      seconds: length; or
      num_latent_frames: length in latent frames. 5 seconds if neither is given.
      search: how to search; `SearchConfig.released()` by default.
      seed: base seed, int32.
      on_chunk: called with every chunk's trace.

    Raises:
      ConfigError: bad input.
      SearchError: every candidate of a chunk is NaN or Inf.
    """
    search = search or SearchConfig.released()
    if seconds is None and num_latent_frames is None:
      seconds = 5.0
    num_chunks = self.num_chunks(seconds=seconds, num_latent_frames=num_latent_frames)
    condition = self.condition(prompt, num_chunks)
    traces = []
    for trace in self.stream(condition, search, num_chunks=num_chunks, seed=seed):
      traces.append(trace)
      if on_chunk is not None:
        on_chunk(trace)
    return self.assemble(condition, search, traces)

  def generate_together(
    self, prompts: Sequence[str], seeds: Sequence[int], *, num_latent_frames: int, search: SearchConfig
  ) -> list[Video]:
    """As `generate`, for several videos of one length: in lockstep where devices are divided by prompts."""
    if self.prompts_together == 1:
      options = {"num_latent_frames": num_latent_frames, "search": search}
      return [self.generate(prompt, seed=seed, **options) for prompt, seed in zip(prompts, seeds, strict=True)]
    num_chunks = self.num_chunks(num_latent_frames=num_latent_frames)
    conditions = [self.condition(prompt, num_chunks) for prompt in prompts]
    chunks = [traces for _, traces in self.stream_states(conditions, search, num_chunks=num_chunks, seeds=seeds)]
    by_prompt = zip(conditions, zip(*chunks, strict=True), strict=True)
    return [self.assemble(condition, search, list(traces)) for condition, traces in by_prompt]


def _restore(directory: epath.Path, part: str, shapes: Params, *, dtype: DTypeLike, mesh: Mesh | None) -> Params:
  """The weights of one part of a checkpoint; nothing else is allocated."""
  return load_params(directory / part, placed(mesh, part, shapes), dtype)


@functools.partial(jax.jit, static_argnames=("generator", "mesh"))
def _text_memory(params: Params, embeddings: jax.Array, generator: WanGenerator, mesh: Mesh | None) -> TextMemory:
  return with_shardings(mesh, "text", generator.text_memory(params, embeddings))
