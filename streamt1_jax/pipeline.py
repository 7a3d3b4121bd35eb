"""From a checkpoint folder and a prompt to a searched video.

pipeline = Pipeline.load()
video = pipeline.generate("a red circle moves left over a dark blue background", seconds=5, seed=0)
video.save("outputs/circle.mp4")
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float32, UInt8

from streamt1_jax import drivers, saved_session, shipped
from streamt1_jax.backbone.dit import TextMemory
from streamt1_jax.codec.encoder import ChunkEncoder
from streamt1_jax.config import (
  SINK_DISTANCE,
  ConfigError,
  ModelConfig,
  SearchConfig,
  SessionConfig,
  SwitchConfig,
  require_video_model,
  video_chunks,
)
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.generator import Models
from streamt1_jax.io import hub
from streamt1_jax.io.checkpoint import load_config, load_params, parts_sha256, tokenizer_file
from streamt1_jax.io.timeline import ChunkClock, Timeline
from streamt1_jax.io.video import write_video
from streamt1_jax.models import abstract_backbone, abstract_codec, encoder_graphdef, make_models
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel.sharding import RULES, placed, tree_shardings, with_shardings
from streamt1_jax.planning.request import Request, device_limit, plan, reward_configs, uses_kernel
from streamt1_jax.rewards import selection
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.rewards.selection import Rewards
from streamt1_jax.rewards.spec import RewardTable
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.session import Session
from streamt1_jax.starts.base import Studio
from streamt1_jax.starts.table import STARTS
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.steering import NOTHING, Start
from streamt1_jax.text import PromptEncoder
from streamt1_jax.text.prompts import require_whole_characters
from streamt1_jax.text.tokenizer import Tokenizer, clean
from streamt1_jax.typing import Implementation, Params
from streamt1_jax.wan_generator import WanGenerator


@dataclasses.dataclass(frozen=True)
class Video:
  """A searched video.

  Attributes:
    frames: [T, height, width, 3] uint8.
    fps: frames per second.
    latents: [num_latent_frames, C, H, W] float32.
    score: what the video reward gives the whole video.
    beams: all surviving videos; this one is `beams.best`.
    traces: what every chunk that was made left behind.
    segments: first chunk and prompt of every segment.
    given_chunks: chunks that the video begins with and that were not made.
  """

  frames: UInt8[np.ndarray, "T height width 3"]
  fps: int
  latents: Float32[np.ndarray, "num_latent_frames C H W"]
  score: float
  beams: drivers.FinalBeams
  traces: list[ChunkTrace]
  segments: tuple[tuple[int, str], ...] = ()
  given_chunks: int = 0

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
    encoder: pixels to latents, for videos that begin with a picture or another video; its weights stay on disk until
      then. None without a checkpoint.
    sha256: identifies the checkpoint and its rewards; empty without one.
    model_sha256: identifies the checkpoint alone: latents are of a model, whatever judged them.
  """

  models: Models
  params: Params
  text: PromptEncoder
  rewards: Rewards
  encoder: ChunkEncoder | None = None
  sha256: str = ""
  model_sha256: str = ""

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
        `rewards/` if it has any; or "hf://org/name[@revision]", such a folder on the hub. By default the small model of
        this package.
      dtype: dtype of weights and activations; products of float32 are exact on accelerators too, see `nn.precision`.
      latent_size: rows and columns of the latent; the model's own by default. No weight depends on it.
      reward: names of rewards, such as "videoalign+hpsv3"; see `rewards.selection.choose`.
      reward_weights: factors of their scores.
      short_frames: frames of a chunk that image rewards see; all by default.
      reward_dtype: dtype of the rewards' backbones; `dtype` by default. int8 halves what they take in bfloat16.
      reward_table: the rewards there are; `{**REWARDS, "mine": SPEC}` adds one.
      mesh: devices, as `parallel.mesh.make_mesh` arranges them; weights go straight to their shards. None for one.
      decoding: how much memory decoding may take, see `execution.Execution`. By default what fits the device in a
        search by the published settings, see `planning.memory`.
      attention: implementation of the backbone's attention, see `backbone.attention`; by platform if None.

    Raises:
      ConfigError: the folder is missing, foreign, damaged or of another model, or the rewards are impossible; the
        message names the file or the argument.
    """
    directory = shipped.checkpoint() if directory is None else hub.local(directory)
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
    asked = Request(
      model=config,
      search=SearchConfig.of(config),
      rewards=reward_configs(directory, choice, reward_table),
      dtype=dtype,
      reward_dtype=reward_dtype or dtype,
      execution=Execution(mesh, attention),
      kernel=uses_kernel(attention, jax.default_backend(), config.backbone.head_dim),
    )
    execution = dataclasses.replace(asked.execution, decoding=decoding or _plan_decoding(asked))
    restore = functools.partial(_restore, directory, dtype=dtype, mesh=mesh)
    backbone_params = restore("backbone", abstract_backbone(config)[1])
    codec_params = restore("codec", abstract_codec(codec)[1])
    rewards = selection.load(
      directory, choice, fps=config.fps, dtype=reward_dtype or dtype, mesh=mesh, table=reward_table
    )
    models = make_models(config, rewards.image.reward, rewards.video.reward, execution=execution)
    params = {
      "backbone": backbone_params,
      "codec": codec_params["decoder"],
      "image_reward": rewards.image.params,
      "video_reward": rewards.video.params,
    }
    sha256 = parts_sha256(directory, [f"{REWARDS_FOLDER}/{name}" for name in choice.stored])
    load_codec = lambda: restore("codec", abstract_codec(codec)[1])["encoder"]
    encoder = ChunkEncoder(config, encoder_graphdef(codec), load_codec)
    return cls(models, params, text, rewards, encoder, sha256, parts_sha256(directory))

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

    Raises ConfigError for an empty prompt or one that cannot be read; a prompt over the token limit is cut with a
    warning.
    """
    require_whole_characters(prompt, "the prompt")
    if not clean(prompt):
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

  def with_previews(self, count: int) -> "Pipeline":
    """The same model; traces of its searches hold `count` frames of every candidate (`ChunkTrace.previews`)."""
    execution = dataclasses.replace(self.models.execution, preview_frames=count)
    return dataclasses.replace(self, models=dataclasses.replace(self.models, execution=execution))

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
    border: drivers.Border | None = None,
    drive: Callable[..., Iterator[tuple[SearchState, ChunkTrace]]] = drivers.stream_states,
  ) -> Iterator[tuple[SearchState, list[ChunkTrace]]]:
    """As `drivers.stream_states`, for one video or several of one length in lockstep: a trace per video, on the host.

    A `border` is for one video alone, and so is another way to `drive` the chunk step, such as a `methods.Method.run`.

    SearchError tells by its `prompt` which of them failed.
    """
    condition, seed = conditions[0], seeds[0]
    if self.prompts_together > 1:
      condition = drivers.stack_conditions(self._fill(conditions), self.models.execution.mesh)
      seed = self._fill(seeds)
    options = {"num_chunks": num_chunks, "seed": seed, "state": state, "border": border}
    for state, trace in drive(self.params, condition, self.models, search, **options):
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

  def assemble(
    self,
    condition: Condition,
    search: SearchConfig,
    traces: list[ChunkTrace],
    *,
    segments: Sequence[drivers.Segment] = (),
    given: drivers.Given | None = None,
    prompts: Sequence[str] = (),
  ) -> Video:
    """The best of the surviving videos; `prompts` are of the segments, the rest is as in `drivers.final_beams`."""
    alone = len(segments) < 2 and given is None
    scores = drivers.last_window_scores(search, traces) if alone else None
    options = {"scores": scores, "segments": segments, "given": given}
    beams = drivers.final_beams(self.params, condition, self.models, search, traces, **options)
    best = beams.best
    return Video(
      frames=beams.frames[best],
      fps=self.config.fps,
      latents=beams.latents[best],
      score=float(beams.scores[best]),
      beams=beams,
      traces=traces,
      segments=tuple((segment.begin, prompt) for segment, prompt in zip(segments, prompts)),
      given_chunks=0 if given is None else len(given.frames),
    )

  @property
  def clock(self) -> ChunkClock:
    """When chunks begin."""
    frames = functools.partial(self.models.codec.num_frames, self.config.chunk_frames)
    return ChunkClock(self.config.fps, frames(first=True), frames(first=False))

  def session(
    self,
    prompt: str | Timeline,
    *,
    search: SearchConfig | None = None,
    seed: int | None = None,
    switch: SwitchConfig | None = None,
    image: Any = None,
    video: Any = None,
    latents: Any = None,
    image_start: str | None = None,
    num_chunks: int | None = None,
    horizon: int = SessionConfig.horizon,
    emit: str = SessionConfig.emit,
    on_trace: Callable[[ChunkTrace], None] | None = None,
    say: Callable[[str], None] = logging.warning,
  ) -> Session:
    """A video that is steered while it is made.

    Args:
      prompt: what to show; or a timeline, whose prompts take effect at their times.
      search: how to search; one beam with four candidates by default. In a video without an end, sinks are seen at most
        90 latent frames away unless it says otherwise.
      seed: base seed, int32; by default the timeline's, or 0.
      switch: what a new prompt does to the memory.
      image: begins with a picture: a file, or uint8 `[height, width, 3]`; or
      video: with the end of a video: a file, or uint8 `[T, height, width, 3]` at the model's frame rate; or
      latents: with latents of this model, float32 `[latent frames, C, H, W]`, exactly.
      image_start: "still" or "clamp", see `ModelConfig.image_start`, which is the default.
      num_chunks: chunks to make; None for a video without an end.
      horizon: see `SessionConfig`.
      emit: see `SessionConfig`.
      on_trace: called with the trace of every chunk that is made, before it is known to stay.
      say: is told what was done to a picture or video to make it fit.

    Raises:
      ConfigError: bad input.
    """
    start = self.start(image=image, video=video, latents=latents, image_start=image_start, say=say)
    search = search or SessionConfig.search
    if num_chunks is None and search.sink_distance is None:
      search = dataclasses.replace(search, sink_distance=SINK_DISTANCE)
    if isinstance(prompt, Timeline):
      # The text encoder is read from disk once for all of them.
      self.text.prepare([entry.prompt for entry in prompt.entries])
    if seed is None:
      seed = (prompt.seed if isinstance(prompt, Timeline) else None) or 0
    named: Any = {"emit": emit}
    config = SessionConfig(search, seed, switch or SwitchConfig(), num_chunks, horizon, **named)
    return Session(self, self.clock, prompt, config, start=start, on_trace=on_trace, identity=self._identity)

  def resume(
    self,
    folder: epath.PathLike,
    *,
    search: SearchConfig | None = None,
    on_trace: Callable[[ChunkTrace], None] | None = None,
  ) -> Session:
    """The session that `Session.save` wrote, which goes on as if it had not stopped, to the last bit.

    Args:
      folder: where it is.
      search: needed only if it has a policy.
      on_trace: as in `session`.

    Raises:
      ConfigError: the folder holds no session, a damaged one, or one of another model, other devices or another search.
    """
    progress = saved_session.read_progress(folder, self._identity, search)
    config = progress.config
    capacity = config.capacity(progress.num_given)
    # One video, also on a mesh that could search several together.
    shapes = drivers.abstract_state(self.params, self.models, config.search, config.seed, num_chunks=capacity)
    saved = saved_session.read(folder, progress, shapes)
    options = {"start": saved.start, "on_trace": on_trace, "identity": self._identity}
    session = Session(self, self.clock, progress.segments[0][1], config, **options)
    session.restore(saved)
    return session

  def start(
    self,
    *,
    image: Any = None,
    video: Any = None,
    latents: Any = None,
    image_start: str | None = None,
    say: Callable[[str], None] = logging.warning,
  ) -> Start:
    """What a video begins with; arguments as in `session`. Raises ConfigError as it does."""
    image_start = image_start or self.config.image_start
    if image_start not in ("still", "clamp"):
      raise ConfigError(f"image_start must be 'still' or 'clamp', got {image_start!r}")
    given = {image_start: image, "video": video, "latents": latents}
    chosen = [(kind, value) for kind, value in given.items() if value is not None]
    if not chosen:
      return NOTHING
    if len(chosen) > 1:
      raise ConfigError("a video begins with one of image, video and latents")
    ((kind, value),) = chosen
    if self.encoder is None:
      raise ConfigError("this model has no encoder: load it from a checkpoint")
    return STARTS[kind](Studio(self.config, self.encoder, say), value)

  @property
  def _identity(self) -> dict[str, Any]:
    execution, choice = self.models.execution, self.rewards.choice
    rewards = self.params["image_reward"], self.params["video_reward"]
    return {
      "checkpoint_sha256": self.sha256,
      "image_rewards": choice.image,
      "video_rewards": choice.video,
      "short_frames": choice.short_frames,
      "reward_dtypes": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(rewards)}),
      "dtype": str(jax.tree.leaves(self.params["backbone"])[0].dtype),
      "platform": jax.default_backend(),
      "mesh": self.mesh_sizes,
      "decoding": execution.decoding,
      "attention": execution.attention,
      "latent_size": [self.config.latent_height, self.config.latent_width],
    }

  def generate(
    self,
    prompt: str | Timeline,
    *,
    seconds: float | None = None,
    num_latent_frames: int | None = None,
    search: SearchConfig | None = None,
    seed: int | None = None,
    on_chunk: Callable[[ChunkTrace], None] | None = None,
    **steering: Any,
  ) -> Video:
    """Searches one video: a session that is told nothing, or what a timeline says.

    Args:
      prompt: what to show; or a timeline.
      seconds: length of what is made; or
      num_latent_frames: length in latent frames. 5 seconds if neither is given.
      search: how to search; `SearchConfig.of` this model by default.
      seed: base seed, int32; by default the timeline's, or 0.
      on_chunk: called with every chunk's trace.
      **steering: `switch`, `image`, `video`, `latents`, `image_start` and `emit` as in `session`.

    Raises:
      ConfigError: bad input.
      SearchError: every candidate of a chunk is NaN or Inf.
    """
    search = search or SearchConfig.of(self.config)
    if seconds is None and num_latent_frames is None:
      seconds = 5.0
    num_chunks = self.num_chunks(seconds=seconds, num_latent_frames=num_latent_frames)
    traces = []

    def keep(trace: ChunkTrace) -> None:
      traces.append(trace)
      if on_chunk is not None:
        on_chunk(trace)

    session = self.session(prompt, search=search, seed=seed, num_chunks=num_chunks, on_trace=keep, **steering)
    collections.deque(session, maxlen=0)
    told = {
      "segments": session.judged_segments,
      "given": session.given,
      "prompts": [text for _, text in session.segments],
    }
    return self.assemble(session.condition, search, traces, **told)

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


def _plan_decoding(asked: Request) -> Decoding:
  """The way to decode that fits this process's devices; process 0 decides for all."""
  return hosts.first_decides(lambda: plan(asked, device_limit(asked.execution.mesh)).chosen.decoding)


@functools.partial(jax.jit, static_argnames=("generator", "mesh"))
def _text_memory(params: Params, embeddings: jax.Array, generator: WanGenerator, mesh: Mesh | None) -> TextMemory:
  return with_shardings(mesh, "text", generator.text_memory(params, embeddings))
