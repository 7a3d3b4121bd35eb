"""Two ways to run the same chunk step: `stream`, chunk by chunk from Python, and `rollout`, one XLA program.

Survivors point to their parents, so a finished video is read backwards along its lineage (`lineage`): no beam ever
carries its own past frames, and the state stays the same size however long the video is.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int, Shaped

from streamt1_jax.chunk_step import chunk_step
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.execution import compiler_options
from streamt1_jax.generator import Models
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel.sharding import RULES, placed, with_shardings
from streamt1_jax.policies import Event, inside_event, names_winner
from streamt1_jax.rewards import window_codecs
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.state import ChunkTrace, Condition, SearchState, init_state
from streamt1_jax.typing import HostArray, SearchParams

PART_CHUNKS = 80
"""Chunks of a video that a reward judges at once when the video is finished: a minute of Wan's."""


class SearchError(RuntimeError):
  """A search that cannot go on: every candidate of a chunk is NaN or Inf, or the policy chose one that cannot survive.

  Attributes:
    prompt: index of the video among those searched together.
  """

  def __init__(self, message: str, prompt: int = 0):
    super().__init__(message)
    self.prompt = prompt


class FinalBeams(NamedTuple):
  """The surviving videos, in the order of the last chunk's survivors.

  Attributes:
    latents: of the whole videos.
    frames: their decoded frames.
    scores: what the video reward gives each whole video.
    best: index of the video that is shown: the best whole video, the earliest of equals, unless the policy names one.
  """

  latents: Float32[np.ndarray, "K frames C H W"]
  frames: Shaped[np.ndarray, "K num_frames ..."]
  scores: Float32[np.ndarray, " K"]
  best: int


# Prompts of one batch are searched in lockstep: they share the counters, and with them every shape and every branch.
# Where a state or a condition has arrays, these have the axes that `jax.vmap` takes.
_STATE_AXES = cast(Any, SearchState)(
  chunk_index=None, base_seed=0, begin=None, num_past=None, beams=0, policy=0, spare=0
)
_CONDITION_AXES = cast(Any, Condition)(text=0, image_reward=0, video_reward=0, num_chunks=None, image=0)


class _JittedChunkStep:
  """`chunk_step` compiled twice per search, for the first chunk and for all others; the state is donated.

  A search that does not judge every chunk has a third program for the chunks between.

  Where the state has a seed per prompt, all its arrays but the counters lead with prompts, and so do those of the
  condition and of the trace.
  """

  def __call__(
    self, params, state, condition, models, search, *, first, judged=True, record=False
  ) -> tuple[SearchState, ChunkTrace]:
    step = _jitted(compiler_options(state.base_seed, runs_once=first))
    return step(params, state, condition, models, search, first=first, judged=judged, record=record)

  def lower(self, params, state, condition, models, search, *, first, judged=True, record=False) -> jax.stages.Lowered:
    """Traces and lowers the step for arguments, or for their shapes; `compile` of what it returns compiles it."""
    step = _jitted(compiler_options(state.base_seed, runs_once=first))
    return step.lower(params, state, condition, models, search, first=first, judged=judged, record=record)


jitted_chunk_step = _JittedChunkStep()

Border = Callable[[SearchState, Condition], tuple[SearchState, Condition] | None]
"""What happens between two chunks: the state and the prompt that the next chunk begins with; None ends the video.

It may take the state's buffers.
"""


@functools.cache
def _jitted(options: tuple[tuple[str, int], ...]) -> Callable:
  return jax.jit(
    _chunk_step,
    static_argnames=("models", "search", "first", "judged", "record"),
    donate_argnames=("state",),
    compiler_options=dict(options) or None,
  )


def _chunk_step(params, state, condition, models, search, *, first, judged, record):
  step = functools.partial(chunk_step, models=models, search=search, first=first, judged=judged, record=record)
  if state.base_seed.ndim:
    axes = (None, _STATE_AXES, _CONDITION_AXES)
    step = jax.vmap(step, in_axes=axes, out_axes=(_STATE_AXES, 0), spmd_axis_name=RULES["prompt"])
  return step(params, state, condition)


def jitted_init_state(params, seed, models, search, num_chunks=None) -> SearchState:
  """`init_state` of one seed, or of a seed per prompt; compiled once for all videos that fill the sliding window."""
  return _init_state(params, seed, models, search, min(num_chunks or search.sliding_window, search.sliding_window))


@functools.partial(jax.jit, static_argnames=("models", "search", "num_chunks"))
def _init_state(params, seed, models, search, num_chunks):
  init = lambda seed: init_state(params, models, search, seed, num_chunks)
  mesh = models.execution.mesh
  if jnp.ndim(seed):
    return with_shardings(mesh, "state", jax.vmap(init, out_axes=_STATE_AXES)(seed), leading=("prompt",))
  return with_shardings(mesh, "state", init(seed))


def check_length(models: Models, search: SearchConfig, num_chunks: int | None) -> None:
  """Raises ConfigError unless a video of `num_chunks` chunks, or one without an end, can be searched."""
  models.generator.check(search)
  window_codecs.require_usable(search.reward_codec)
  longest = models.generator.max_chunks(search)
  if num_chunks is not None and not 1 <= num_chunks <= longest:
    raise ConfigError(f"the number of chunks must be in 1..{longest}, the longest of this model, got {num_chunks}")
  if num_chunks is not None:
    check_judged(search, num_chunks)
  _check_event(models, inside_event(search))
  _check_rounds(models, search)


def check_judged(search: SearchConfig, num_chunks: int) -> None:
  """Raises ConfigError unless a video has the chunks that must be judged, and more than a search looks ahead."""
  if search.judge_every > num_chunks:
    raise ConfigError(f"judge_every must be in 1..{num_chunks}, the chunks of the video, got {search.judge_every}")
  if search.look_ahead and search.look_ahead >= num_chunks:
    raise ConfigError(
      f"look_ahead must be in 0..{num_chunks - 1}, below the chunks of the video, got {search.look_ahead}"
    )
  if names_winner(search) and not search.judges_chunk(num_chunks - 1):
    raise ConfigError(
      f"the policy names the video that is shown in the last of {num_chunks} chunks, which is not judged: judge_every "
      f"must divide {num_chunks - 1}, got {search.judge_every}"
    )


def _check_event(models: Models, event: Event | None) -> None:
  """Raises ConfigError unless the model and its mesh allow what a policy does inside of denoising."""
  if event is None:
    return
  steps, frames = len(models.generator.sigmas), models.generator.latent_shape[0]
  mesh = models.execution.mesh
  siblings = 1 if mesh is None else mesh.shape[RULES["candidate"]]
  if event.step >= steps - 1:
    raise ConfigError(
      f"step must be before the last of the {steps} denoising steps, in 0..{steps - 2}: got {event.step}"
    )
  if event.latent_frames > frames:
    raise ConfigError(f"latent_frames must be in 1..{frames}, those of a chunk, got {event.latent_frames}")
  if event.start % siblings:
    raise ConfigError(f"start must be a multiple of the {siblings} devices of a beam's candidates, got {event.start}")


def _check_rounds(models: Models, search: SearchConfig) -> None:
  """Raises ConfigError unless candidates can be drawn in the rounds of a search, if it has some."""
  mesh, size = models.execution.mesh, search.round_size
  siblings = 1 if mesh is None else mesh.shape[RULES["candidate"]]
  if size % siblings:
    raise ConfigError(f"round_size must be a multiple of the {siblings} devices of a beam's candidates, got {size}")
  if size and inside_event(search) is not None:
    raise ConfigError(f"a search with rounds rejects no candidate early: round_size must be 0, got {size}")


def stream(
  params: SearchParams,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  *,
  num_chunks: int,
  seed: int | Sequence[int],
  record: bool = False,
) -> Iterator[ChunkTrace]:
  """Yields the trace of every chunk as soon as it is searched.

  With a seed per prompt, and a condition that `stack_conditions` made, several prompts are searched at once and all
  arrays of a trace lead with them; `of_prompt` takes one out.

  Raises:
    ConfigError: the length or the search does not fit the model, or the prompts do not divide by the mesh.
    SearchError: all candidates of a prompt's chunk are NaN or Inf. Chunks yielded before are good.
  """
  options = {"num_chunks": num_chunks, "seed": seed, "record": record}
  for _, trace in stream_states(params, condition, models, search, **options):
    yield trace


def stream_states(
  params: SearchParams,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  *,
  num_chunks: int | None,
  seed: int | Sequence[int],
  record: bool = False,
  state: SearchState | None = None,
  border: Border | None = None,
) -> Iterator[tuple[SearchState, ChunkTrace]]:
  """As `stream`, with the state after every chunk; a search can go on from any of them.

  The next chunk takes the buffers of the state that was yielded: to keep a state, copy it before asking for more.

  Args:
    params: weights.
    condition: what the video is made for.
    models: static half of the chunk step.
    search: how to search.
    num_chunks: length of the whole video; None for one without an end.
    seed: base seed. With a `state`, it is the seed that the state was begun with.
    record: whether traces hold intermediate arrays.
    state: where an earlier search of the same arguments stopped, as `abstract_state` describes it; its buffers are
      taken too. By default the search begins anew.
    border: called before every chunk.
  """
  check_length(models, search, num_chunks)
  mesh = models.execution.mesh
  if np.ndim(seed) and mesh is not None and np.size(seed) % mesh.shape[RULES["prompt"]]:
    raise ConfigError(f"{np.size(seed)} prompts do not divide by data:{mesh.shape[RULES['prompt']]} of the mesh")
  if state is None:
    state = jitted_init_state(params, np.asarray(seed, np.int32), models, search, num_chunks)
  last = models.generator.max_chunks(search) if num_chunks is None else num_chunks
  for index in range(int(state.chunk_index), last):
    if border is not None:
      begun = border(state, condition)
      if begun is None:
        return
      state, condition = begun
    kind = {"first": index == 0, "judged": index % search.judge_every == 0}
    state, trace = jitted_chunk_step(params, state, condition, models, search, **kind, record=record)
    check_usable(trace, index, seed)
    yield state, trace


def abstract_state(
  params: SearchParams, models: Models, search: SearchConfig, seed: int | Sequence[int], *, num_chunks: int
) -> SearchState:
  """Shapes, dtypes and shardings of the states that `stream_states` yields for these arguments."""
  init = functools.partial(jitted_init_state, models=models, search=search, num_chunks=num_chunks)
  shapes = jax.eval_shape(init, params, np.asarray(seed, np.int32))
  return placed(models.execution.mesh, "state", shapes, leading=("prompt",) * np.ndim(seed))


@functools.partial(jax.jit, static_argnames="mesh")
def stack_conditions(conditions: Sequence[Condition], mesh: Mesh | None = None) -> Condition:
  """The conditions of several videos of one length, as one for `stream`."""
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *conditions)
  stacked = stacked._replace(num_chunks=conditions[0].num_chunks)
  return with_shardings(mesh, "condition", stacked, leading=("prompt",))


def of_prompt(trace: ChunkTrace, index: int) -> ChunkTrace:
  """One prompt's part of the trace of several."""
  return jax.tree.map(lambda x: x[index], trace)


@functools.partial(jax.jit, static_argnames=("models", "search", "num_chunks", "record"))
def _rollout(params, condition, seed, models, search, num_chunks, record):
  step = functools.partial(chunk_step, models=models, search=search, record=record)
  state, first = step(params, init_state(params, models, search, seed, num_chunks), condition, first=True)
  cycles, rest = divmod(num_chunks - 1, search.judge_every)

  def judged(state: SearchState, _):
    return step(params, state, condition, first=False)

  def between(state: SearchState, count: int):
    one = lambda state, _: step(params, state, condition, first=False, judged=False)
    return jax.lax.scan(one, state, length=count) if count else (state, None)

  def cycle(state: SearchState, _):
    state, unjudged = between(state, search.judge_every - 1)
    state, trace = judged(state, None)
    return state, (unjudged, trace)

  state, repeated = jax.lax.scan(cycle, state, length=cycles)
  return first, repeated, between(state, rest)[1]


def _in_turn(traces: ChunkTrace | None) -> list[ChunkTrace]:
  """The traces of chunks, one after the other, that one tree has."""
  return [] if traces is None else [jax.tree.map(lambda x, i=i: x[i], traces) for i in range(len(traces.survivor))]


def rollout(
  params: SearchParams,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  *,
  num_chunks: int,
  seed: int,
  record: bool = False,
) -> list[ChunkTrace]:
  """The traces of all chunks of a whole search that runs as one XLA program; same errors as `stream`.

  Raises ConfigError for a `reward_codec` that works on the host as well.
  """
  check_length(models, search, num_chunks)
  if window_codecs.find(search.reward_codec).on_host:
    raise ConfigError(
      f"reward_codec {search.reward_codec} works on the host, and rollout stays on the device: use stream"
    )
  first, (unjudged, judged), rest = _rollout(params, condition, seed, models, search, num_chunks, record)
  traces = [first]
  for index, trace in enumerate(_in_turn(judged)):
    traces += [*_in_turn(jax.tree.map(lambda x, i=index: x[i], unjudged)), trace]
  traces += _in_turn(rest)
  for index, trace in enumerate(traces):
    check_usable(trace, index, seed)
  return traces


def check_usable(trace: ChunkTrace, chunk_index: int, seed: int | Sequence[int]) -> None:
  """Raises SearchError if a prompt has no usable candidate, or a policy chose one that is not usable or not there."""
  usable, survivor = hosts.to_host((trace.candidates.usable, trace.survivor))
  usable = usable.reshape(*survivor.shape[:-1], -1)
  exists = (survivor >= 0) & (survivor < usable.shape[-1])
  survivors = np.take_along_axis(usable, np.where(exists, survivor, 0), axis=-1)
  for fine, problem in (
    (usable.any(axis=-1), "every candidate is NaN or Inf"),
    (exists.all(axis=-1), f"the policy chose a candidate that is not one of 0..{usable.shape[-1] - 1}"),
    (survivors.all(axis=-1), "the policy chose a candidate that is NaN or Inf"),
  ):
    if not fine.all():
      prompt = int(np.argmin(fine))
      raise SearchError(f"chunk {chunk_index}, seed {np.ravel(seed)[prompt]}: {problem}", prompt)


def lineage(survivors: Sequence[Int[HostArray, " K"]], beam_size: int) -> Int[np.ndarray, "num_chunks K"]:
  """Which survivor of every chunk each final beam descends from.

  Args:
    survivors: per chunk, surviving candidates n = parent * B + i.
    beam_size: B.

  Returns:
    Column k names, chunk by chunk, the survivor on final beam k's lineage.
  """
  path = [np.arange(len(survivors[-1]))]
  for survivor in reversed(survivors[1:]):
    path.append(np.asarray(survivor)[path[-1]] // beam_size)
  return np.stack(path[::-1])


class Segment(NamedTuple):
  """A part of a video under one prompt.

  Attributes:
    begin: its first chunk, counted from the first chunk of the video.
    condition: the prompt.
  """

  begin: int
  condition: Condition


class Given(NamedTuple):
  """The chunks that a video began with and that were not made.

  Attributes:
    latents: chunk by chunk.
    frames: the same decoded, a list because the first chunk has fewer frames.
  """

  latents: Float32[np.ndarray, "chunks F C H W"]
  frames: list[Shaped[np.ndarray, "Q ..."]]


@functools.partial(jax.jit, static_argnames=("models", "last"))
def _whole_video_scores(params, condition, frames, models, last):
  """The video reward of every video, as a window that ends with its last chunk of `last` frames."""

  def score(frames):
    window = FrameWindow(frames[:-last], frames.shape[0] - last, frames[-last:])
    info = CandidateInfo(condition.num_chunks - 1, jnp.int32(0))
    return models.video_reward(params["video_reward"], condition.video_reward, window, info)

  return jax.lax.map(score, frames)


def scores_whole_videos(search: SearchConfig, num_chunks: int) -> bool:
  """Whether the finished videos are judged once more: the last sliding window was not the whole video as it is."""
  judged = search.judges_chunk(num_chunks - 1) and search.reward_decode == "streamed"
  return not judged or num_chunks > search.sliding_window


def known_scores(search: SearchConfig, num_chunks: int, last: ChunkTrace) -> Float32[np.ndarray, " K"] | None:
  """Long-term scores of finished videos, if the last sliding window was the whole video; None otherwise.

  They are what `final_beams` would compute, up to the rounding of another program (2e-7 of scores around 1).
  """
  if scores_whole_videos(search, num_chunks):
    return None
  long, survivor = hosts.to_host((last.candidates.long, last.survivor))
  return long.reshape(-1)[survivor]


def last_window_scores(search: SearchConfig, traces: list[ChunkTrace]) -> Float32[np.ndarray, " K"] | None:
  """`known_scores` of all traces of a video."""
  return known_scores(search, len(traces), traces[-1]) if traces else None


def best_of(scores: Float32[np.ndarray, " K"]) -> int:
  """The best score that is finite; the earliest of equals."""
  return int(np.argmax(np.where(np.isfinite(scores), scores, -np.inf)))


def winner(search: SearchConfig, scores: Float32[np.ndarray, " K"], last: ChunkTrace) -> int:
  """The video that is shown, of those with these whole-video scores: the best, unless the policy names another."""
  return best_of(hosts.to_host(last.score) if names_winner(search) else scores)


def final_beams(
  params: SearchParams,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  traces: list[ChunkTrace],
  *,
  scores: Float32[np.ndarray, " K"] | None = None,
  segments: Sequence[Segment] = (),
  given: Given | None = None,
) -> FinalBeams:
  """Puts the surviving videos together and picks the one whose whole-video score is best, as the released code does.

  Args:
    params: weights.
    condition: what the videos were made for.
    models: static half of the chunk step.
    search: how they were searched.
    traces: of all chunks, in order.
    scores: whole-video scores where they are known, as `last_window_scores` may know them; by default the video
      reward judges every video.
    segments: of a video whose prompt changed, in order. Its score is the mean of the segments' scores, each judged
      under its own prompt, weighted by their frames; one of more than `PART_CHUNKS` is judged part by part. By
      default the whole video is one, under `condition`.
    given: the chunks before the first of `traces`.
  """
  traces = [hosts.to_host(trace._replace(steps=None)) for trace in traces]
  path = lineage([t.survivor for t in traces], search.beam_size)
  videos = len(path[-1])
  first = [] if given is None else [(latents, frames) for latents, frames in zip(*given, strict=True)]
  alike = lambda chunk: np.broadcast_to(chunk[None], (videos, *chunk.shape))
  chunks = [(alike(latents), alike(frames)) for latents, frames in first]
  chunks += [(trace.latents[beam], trace.frames[beam]) for beam, trace in zip(path, traces, strict=True)]
  latents, frames = (np.concatenate(arrays, axis=1) for arrays in zip(*chunks, strict=True))
  ends = np.cumsum([chunk.shape[1] for _, chunk in chunks])
  judge = lambda: _judged(params, segments or [Segment(0, condition)], models, search, frames, ends)
  known = judge() if scores is None else scores
  return FinalBeams(latents=latents, frames=frames, scores=known, best=winner(search, known, traces[-1]))


def _judged(
  params: SearchParams,
  segments: Sequence[Segment],
  models: Models,
  search: SearchConfig,
  frames: np.ndarray,
  ends: np.ndarray,
) -> Float32[np.ndarray, " K"]:
  """Whole-video scores of videos whose chunk c ends before frame `ends[c]`."""
  starts = np.append(0, ends[:-1])
  scores, lengths = [], []
  for segment, begin, after in _parts(segments, len(ends)):
    own, last = frames[:, starts[begin] : ends[after - 1]], int(ends[after - 1] - starts[after - 1])
    scores.append(judged(params, models, search, segment.condition, own, last))
    lengths.append(own.shape[1])
  return mean_score(scores, lengths)


def _parts(segments: Sequence[Segment], num_chunks: int) -> Iterator[tuple[Segment, int, int]]:
  """Segment, first chunk, and chunk after the last of every part of a video that is judged by itself."""
  for segment, end in zip(segments, [*(each.begin for each in segments[1:]), num_chunks], strict=True):
    for begin in range(segment.begin, end, PART_CHUNKS):
      yield segment, begin, min(begin + PART_CHUNKS, end)


def judged(
  params: SearchParams,
  models: Models,
  search: SearchConfig,
  condition: Condition,
  frames: Shaped[np.ndarray, "videos frames ..."],
  last: int,
) -> Float32[np.ndarray, " videos"]:
  """What the video reward gives videos, or parts of videos, whose last chunk has `last` frames."""
  videos, codec = list(frames), window_codecs.find(search.reward_codec)
  coded = [codec.frames(video) for video in videos]
  # Frames that stay as they are need no copy.
  if any(after is not before for after, before in zip(coded, videos, strict=True)):
    frames = np.stack(coded)
  return hosts.to_host(_whole_video_scores(params, condition, frames, models, last))


def mean_score(scores: Sequence[Float32[np.ndarray, " K"]], lengths: Sequence[int]) -> Float32[np.ndarray, " K"]:
  """The score of whole videos: the mean of their parts, weighted by frames."""
  return scores[0] if len(scores) == 1 else np.average(scores, axis=0, weights=lengths).astype(np.float32)
